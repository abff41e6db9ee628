"""A Service's life by state and event, with time as an argument."""

import signal
from typing import cast

import pytest

from echo_appliance.loop import Loop
from echo_appliance.metrics import Registry
from echo_appliance.service import Lifetimes, Service
from tests.unit.fakes import FakeLoop, FakeManager


class Source:
    """A socket that would give work."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def start(self) -> None:
        self.heard.append("start")

    def close(self) -> None:
        self.heard.append("close")

    def look_again(self) -> None:
        self.heard.append("look again")


class Connection:
    """Work that is being done."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.aborted: str | None = None
        service.opened(self)

    def close(self) -> None:
        self.service.closed(self)

    def abort(self, reason: str) -> None:
        self.aborted = reason
        self.service.closed(self)


class World:
    """A Service and all that it talks to."""

    def __init__(self, alive_interval: float | None = None, **lifetimes: float) -> None:
        self.loop = FakeLoop()
        self.manager = FakeManager(alive_interval)
        registry = Registry()
        self.counters = registry.counters("demo")
        self.service = Service(
            cast(Loop, self.loop), self.manager, registry, Lifetimes(**lifetimes), "demo"
        )
        self.source = Source()
        self.service.add_source(self.source)
        self.service.obey_signals()


def test_service_start_is_ready_after_its_sources_started() -> None:
    world = World()
    world.service.run()
    assert world.source.heard == ["start"]
    assert world.manager.heard == ["ready demo"]


def test_service_start_sleep_delays_ready() -> None:
    world = World(start_sleep=3)
    world.service.run()
    world.loop.advance(2.9)
    assert not world.manager.heard
    world.loop.advance(0.2)
    assert world.manager.heard == ["ready demo"]


def test_service_signal_in_start_sleep_ends_without_ready() -> None:
    world = World(start_sleep=3)
    world.service.run()
    world.loop.signals[signal.SIGTERM]()
    assert world.loop.stopped
    world.loop.advance(10)
    assert world.manager.heard == ["stopping SIGTERM: finishing 0 connections"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_service_signal_when_nothing_is_open_ends_at_once(number: signal.Signals) -> None:
    world = World()
    world.service.run()
    world.loop.signals[number]()
    assert world.source.heard == ["start", "close"]
    assert world.loop.stopped


def test_service_signal_waits_for_what_is_open() -> None:
    world = World(drain=5)
    world.service.run()
    first, second = Connection(world.service), Connection(world.service)
    world.loop.signals[signal.SIGTERM]()
    assert world.source.heard[-1] == "close"
    first.close()
    assert not world.loop.stopped
    second.close()
    assert world.loop.stopped


def test_service_drain_that_lasts_too_long_aborts_the_rest() -> None:
    world = World(drain=5)
    world.service.run()
    slow = Connection(world.service)
    world.loop.signals[signal.SIGTERM]()
    world.loop.advance(4.9)
    assert slow.aborted is None
    world.loop.advance(0.2)
    assert slow.aborted == "drain-timeout"
    assert world.loop.stopped


def test_service_second_signal_ends_at_once_and_tells_by_its_status() -> None:
    world = World()
    Connection(world.service)
    world.service.run()
    world.loop.signals[signal.SIGTERM]()
    assert not world.loop.stopped
    world.loop.signals[signal.SIGTERM]()
    assert world.loop.stopped
    assert world.service._exit_status == 128 + signal.SIGTERM


def test_service_idle_for_its_time_ends() -> None:
    world = World(exit_idle=10)
    world.service.run()
    world.loop.advance(9.9)
    assert not world.loop.stopped
    world.loop.advance(0.2)
    assert world.loop.stopped
    assert world.manager.heard[-1].startswith("stopping idle")


def test_service_idle_time_starts_anew_with_each_piece_of_work() -> None:
    world = World(exit_idle=10)
    world.service.run()
    for _ in range(5):
        world.loop.advance(9)
        world.service.touch()
    assert not world.loop.stopped
    world.loop.advance(10)
    assert world.loop.stopped


def test_service_is_not_idle_while_a_connection_is_open() -> None:
    world = World(exit_idle=10)
    world.service.run()
    connection = Connection(world.service)
    world.service.touch()
    world.loop.advance(1000)
    assert not world.loop.stopped
    world.service.touch()
    connection.close()
    world.loop.advance(9.9)
    assert not world.loop.stopped
    world.loop.advance(0.2)
    assert world.loop.stopped


def test_service_with_passed_connections_only_ends_when_they_are_served() -> None:
    loop, manager = FakeLoop(), FakeManager()
    service = Service(cast(Loop, loop), manager, Registry(), Lifetimes(), "connection")
    opened: list[Connection] = []
    service.at_start(lambda: opened.append(Connection(service)))
    service.run()
    assert not loop.stopped
    opened[0].close()
    assert loop.stopped


def test_service_watchdog_is_fed_at_each_interval() -> None:
    world = World(alive_interval=2)
    world.service.run()
    world.loop.advance(6.1)
    assert world.manager.heard.count("alive") == 4, "at once, and after 2, 4 and 6 s"


def test_service_status_is_reported_at_most_once_per_second_and_only_after_work() -> None:
    world = World()
    world.service.run()
    world.loop.advance(100)
    assert world.manager.heard == ["ready demo"]
    for _ in range(50):
        world.service.touch()
        world.loop.advance(0.1)
    assert 4 <= world.manager.heard.count("report demo") <= 6


def test_service_told_idle_says_at_once_when_work_comes() -> None:
    world = World(exit_idle=10)
    idle: list[float] = []
    world.service.on_idle = lambda: idle.append(world.loop.now)
    world.service.run()
    world.loop.advance(10.1)
    assert len(idle) == 1
    world.manager.heard.clear()
    world.service.touch()
    assert world.manager.heard == ["report demo"]


def test_service_drain_without_a_limit_waits_for_who_came_last() -> None:
    world = World(drain=5)
    world.service.run()
    connection = Connection(world.service)
    world.service.drain("idle")
    world.loop.advance(1000)
    assert connection.aborted is None
    world.loop.signals[signal.SIGTERM]()
    world.loop.advance(5.1)
    assert connection.aborted == "drain-timeout"
    assert world.service._exit_status == 0


def test_service_whose_last_source_is_lost_ends() -> None:
    world = World()
    world.service.run()
    connection = Connection(world.service)
    world.service.source_lost()
    assert not world.loop.stopped
    connection.close()
    assert world.loop.stopped


def test_service_source_that_is_no_work_keeps_nothing_alive() -> None:
    loop, manager = FakeLoop(), FakeManager()
    service = Service(cast(Loop, loop), manager, Registry(), Lifetimes(), "connection")
    service.add_source(Source(), is_work=False)
    opened: list[Connection] = []
    service.at_start(lambda: opened.append(Connection(service)))
    service.run()
    opened[0].close()
    assert loop.stopped


def test_service_signal_in_start_sleep_still_serves_a_passed_connection() -> None:
    world = World(start_sleep=3)
    opened: list[Connection] = []
    world.service.at_start(lambda: opened.append(Connection(world.service)))
    world.service.run()
    world.loop.signals[signal.SIGTERM]()
    assert not world.loop.stopped
    opened[0].close()
    assert world.loop.stopped


def test_service_whose_manager_cannot_ask_reports_what_open_connections_do() -> None:
    world = World()
    world.manager.cannot_ask = True
    world.service.run()
    connection = Connection(world.service)
    world.service.touch()
    world.counters.accepted += 1
    world.loop.advance(20.0)
    assert world.manager.heard.count("report demo") == 1, "no news, no report"
    world.counters.received += 1
    world.loop.advance(1.0)
    assert world.manager.heard.count("report demo") == 2
    connection.close()
    world.loop.advance(2.0)
    assert not [timer for timer in world.loop.timers if timer.callback], "nobody to ask about"
