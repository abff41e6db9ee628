"""How a dial finds a backend: sockets answer what was scripted, and time is an argument."""

import errno
import itertools
import socket
from collections.abc import Callable
from select import EPOLLOUT
from typing import cast

import pytest

from echo_appliance.forward import dial as dial_module
from echo_appliance.forward.destination import SKIP_SECONDS, Backend, Destination
from echo_appliance.forward.dial import BACKLOG_PAUSE, LAST_PAUSE, STAGGER, Dial
from echo_appliance.forward.resolve import Resolver, interleave
from echo_appliance.forward.target import Standby, parse
from echo_appliance.loop import Loop
from tests.unit.fakes import FakeLoop

WAITS = [errno.EINPROGRESS, errno.EALREADY]
REFUSES = [errno.EINPROGRESS, errno.ECONNREFUSED]


class Connecting:
    """A socket whose connect_ex() answers what the script says for that address; then EALREADY."""

    def __init__(self, world: "World", family: int, kind: int) -> None:
        self._world = world
        self._answers: list[int | OSError] = []
        self.family = family
        self.kind = kind & 0xF
        self.made_at = world.loop.now
        self.descriptor = 100 + len(world.made)
        self.address: object = None
        self.error = 0
        self.closed = False
        world.made.append(self)

    def fileno(self) -> int:
        return self.descriptor

    def connect_ex(self, address: object) -> int:
        if self.address is None:
            self.address = address
            self._answers = list(self._world.script.get(_name(address), [0]))
        assert address == self.address
        answer = self._answers.pop(0) if self._answers else errno.EALREADY
        if isinstance(answer, OSError):
            raise answer
        return answer

    def getsockopt(self, *option: object) -> int:
        assert option == (socket.SOL_SOCKET, socket.SO_ERROR)
        return self.error

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


def _name(address: object) -> str:
    return str(address[0]) if isinstance(address, tuple) else str(address)


class Names:
    """Stands where the resolver does: what is not known is answered when the test says so."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.asked: list[Callable[[list[object]], None]] = []

    def known(self, host: str, port: int, _kind: int) -> list[object] | None:
        found = self.addresses.get(host)
        return None if found is None else [addressed(one, port) for one in found]

    def lookup(self, _host: str, _port: int, _kind: int, answered: Callable[..., None]) -> None:
        self.asked.append(answered)


def addressed(host: str, port: int = 1) -> tuple[int, tuple[object, ...]]:
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port)


class World:
    """A destination, and who wants to get there."""

    def __init__(self, *targets: str, **how: float) -> None:
        self.loop = FakeLoop()
        self.names = Names()
        self.standby = Standby()
        self.script: dict[str, list[int | OSError]] = {}
        self.made: list[Connecting] = []
        self.found: list[str] = []
        self.failed: list[str] = []
        self.destination = Destination(
            [parse(one if ":" in one else f"tcp:{one}:1") for one in targets],
            connect_timeout=how.get("timeout", 5.0),
            connect_retry=how.get("retry", 0.0),
        )

    def connected(self, sock: socket.socket, backend: Backend) -> None:
        self.found.append(backend.target.text)
        self.socket = sock

    def not_connected(self, reason: str) -> None:
        self.failed.append(reason)

    def dial(self, kind: int = socket.SOCK_STREAM) -> Dial:
        dial = Dial(
            cast(Loop, self.loop), cast(Resolver, self.names), self.standby, self.destination,
            self, kind,
        )  # fmt: skip
        dial.start()
        return dial

    @property
    def tried(self) -> list[str]:
        return [_name(one.address) for one in self.made]

    def event(self, number: int, *, error: int = 0, answer: int = errno.EISCONN) -> None:
        """Let epoll report the socket that was made as number so and so."""
        sock = self.made[number]
        assert self.loop.watched[sock.descriptor] == EPOLLOUT
        sock.error = error
        sock._answers = [answer]
        self.loop.handlers[sock.descriptor](EPOLLOUT)

    def assert_clean(self) -> None:
        """Nothing is waited for any more, and what is not the caller's is closed."""
        assert not self.loop.watched
        assert not [timer for timer in self.loop.timers if timer.callback]
        kept = [one for one in self.made if not one.closed]
        assert len(kept) == len(self.found)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """Make a World, with its sockets in the place of real ones."""

    def make(*targets: str, **how: float) -> World:
        made = World(*targets, **how)

        def connecting(family: int, kind: int) -> Connecting:
            return Connecting(made, family, kind)

        monkeypatch.setattr(dial_module, "PlainSocket", connecting)
        return made

    return make


Make = Callable[..., World]


# -- one backend -----------------------------------------------------------------


@pytest.mark.parametrize("answers", [[0], [errno.EINPROGRESS, 0]])
def test_dial_backend_that_answers_at_once_is_not_waited_for(
    world: Make, answers: list[int | OSError]
) -> None:
    here = world("127.0.0.1")
    here.script["127.0.0.1"] = answers
    here.dial()
    assert here.found == ["tcp:127.0.0.1:1"]
    here.assert_clean()


def test_dial_backend_that_answers_later_is_waited_for(world: Make) -> None:
    here = world("127.0.0.1")
    here.script["127.0.0.1"] = list(WAITS)
    here.dial()
    assert not here.found
    here.event(0, answer=errno.EALREADY)  # the event of another socket that had this number
    assert not here.found
    here.event(0)
    assert here.found == ["tcp:127.0.0.1:1"]
    here.assert_clean()


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ECONNREFUSED, "connect-refused"),
        (errno.ETIMEDOUT, "connect-timeout"),
        (errno.EHOSTUNREACH, "connect-ehostunreach"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_dial_backend_that_fails_is_told_and_why(
    world: Make, number: int, reason: str, later: bool
) -> None:
    here = world("127.0.0.1")
    here.script["127.0.0.1"] = list(WAITS) if later else [number]
    here.dial()
    if later:
        here.event(0, error=number)
    assert here.failed == [reason]
    here.assert_clean()


def test_dial_address_that_does_not_fit_is_a_failure(world: Make) -> None:
    here = world("127.0.0.1")
    here.script["127.0.0.1"] = [OSError("an address of another family")]
    here.dial()
    assert here.failed == ["connect-einval"]
    here.assert_clean()


def test_dial_without_descriptors_is_a_failure(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world("127.0.0.1", "127.0.0.2")

    def refuse(*_: int) -> None:
        raise OSError(errno.EMFILE, "")

    monkeypatch.setattr(dial_module, "PlainSocket", refuse)
    here.dial()
    assert here.failed == ["connect-emfile"]


def test_dial_that_epoll_cannot_take_is_a_failure(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world("10.0.0.1")
    made.script["10.0.0.1"] = list(WAITS)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(made.loop, "watch", full)
    made.dial()
    assert made.failed == ["connect-enospc"]
    made.assert_clean()


def test_dial_that_is_cancelled_leaves_nothing(world: Make) -> None:
    here = world("name", retry=9.0)
    here.names.addresses["name"] = ["127.0.0.1", "127.0.0.2"]
    here.script |= {"127.0.0.1": list(WAITS), "127.0.0.2": list(WAITS)}
    dial = here.dial()
    here.loop.advance(STAGGER)
    assert len(here.loop.watched) == 2
    dial.cancel()
    here.assert_clean()
    here.loop.advance(60)
    assert (here.found, here.failed) == ([], [])


def test_dial_datagram_backend_gets_a_datagram_socket(world: Make) -> None:
    here = world("udp:127.0.0.1:1")
    here.dial(socket.SOCK_DGRAM)
    assert here.made[0].kind == socket.SOCK_DGRAM


def test_dial_unix_backlog_that_is_full_is_tried_again_without_spinning(world: Make) -> None:
    here = world("unix:/run/backend", timeout=1.0)
    here.script["/run/backend"] = [errno.EAGAIN]
    here.dial()
    here.loop.advance(BACKLOG_PAUSE * 10.5)
    assert len(here.made) == 11
    assert not here.loop.watched
    here.script["/run/backend"] = [0]
    here.loop.advance(BACKLOG_PAUSE)
    assert here.found == ["unix:/run/backend"]
    here.assert_clean()


def test_dial_unix_backlog_that_stays_full_is_given_up_in_time(world: Make) -> None:
    here = world("unix:/run/backend", timeout=1.0)
    here.script["/run/backend"] = [errno.EAGAIN]
    here.dial()
    here.loop.advance(1.0)
    assert here.failed == ["connect-timeout"]
    here.assert_clean()


def test_dial_unix_backend_that_ends_with_its_backlog_full_is_a_failure(world: Make) -> None:
    here = world("unix:/run/backend")
    here.script["/run/backend"] = [errno.EAGAIN]
    here.dial()
    here.script["/run/backend"] = [errno.ECONNREFUSED]
    here.loop.advance(BACKLOG_PAUSE)
    assert here.failed == ["connect-refused"]
    here.assert_clean()


# -- happy eyeballs ----------------------------------------------------------------


def test_dial_addresses_race_each_a_stagger_after_the_one_before(world: Make) -> None:
    here = world("name")
    hosts = ["2001:db8::1", "192.0.2.1", "2001:db8::2"]
    here.names.addresses["name"] = hosts
    here.script = {host: list(WAITS) for host in hosts}
    here.dial()
    assert here.tried == hosts[:1]
    here.loop.advance(STAGGER - 0.001)
    assert here.tried == hosts[:1]
    here.loop.advance(0.001)
    assert here.tried == hosts[:2]
    here.loop.advance(STAGGER)
    assert here.tried == hosts
    here.event(1)
    assert here.found == ["tcp:name:1"]
    assert [one.closed for one in here.made] == [True, False, True]
    here.assert_clean()


def test_dial_address_that_fails_is_followed_at_once(world: Make) -> None:
    here = world("name")
    hosts = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    here.names.addresses["name"] = hosts
    here.script = {hosts[0]: [errno.ECONNREFUSED], hosts[1]: list(WAITS), hosts[2]: list(WAITS)}
    here.dial()
    assert here.tried == hosts[:2]
    here.loop.advance(0.1)
    here.event(1, error=errno.ECONNREFUSED)
    assert here.tried == hosts
    here.event(2)
    assert here.found
    here.assert_clean()


def test_dial_address_that_answered_is_asked_first_from_then_on(world: Make) -> None:
    here = world("name")
    here.names.addresses["name"] = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    here.script = {"192.0.2.1": list(WAITS), "192.0.2.2": list(WAITS)}
    here.dial()
    here.loop.advance(2 * STAGGER)
    assert here.made[2].address == ("192.0.2.3", 1)
    assert here.found == ["tcp:name:1"]
    here.made.clear()
    here.dial()
    assert here.tried == ["192.0.2.3"]


def test_dial_all_addresses_that_fail_are_one_backend_that_failed(world: Make) -> None:
    here = world("name", "192.0.2.9")
    here.names.addresses["name"] = ["192.0.2.1", "192.0.2.2"]
    here.script = {"192.0.2.1": list(REFUSES), "192.0.2.2": list(REFUSES)}
    here.dial()
    assert here.tried == ["192.0.2.1", "192.0.2.2", "192.0.2.9"]
    assert here.found == ["tcp:192.0.2.9:1"]


@pytest.mark.parametrize(
    ("found", "mixed"),
    [
        ([], []),
        (["::1", "::2", "1", "2", "3"], ["::1", "1", "::2", "2", "3"]),
        (["1", "2", "::1"], ["1", "::1", "2"]),
        (["1", "2"], ["1", "2"]),
    ],
)
def test_dial_families_alternate_beginning_with_the_first(
    found: list[str], mixed: list[str]
) -> None:
    assert interleave([addressed(one) for one in found]) == [addressed(one) for one in mixed]


# -- names -------------------------------------------------------------------------


def test_dial_name_that_is_not_known_is_asked_for(world: Make) -> None:
    here = world("name")
    here.dial()
    assert not here.made
    here.names.asked[0]([addressed("192.0.2.1")])
    assert here.found == ["tcp:name:1"]
    here.assert_clean()


def test_dial_name_without_addresses_is_a_failure(world: Make) -> None:
    here = world("name")
    here.dial()
    here.names.asked[0]([])
    assert here.failed == ["name-not-resolved"]
    here.assert_clean()


def test_dial_name_that_is_resolved_too_late_is_given_up(world: Make) -> None:
    here = world("name", "192.0.2.9", timeout=1.0)
    here.dial()
    here.loop.advance(1.0)
    assert here.found == ["tcp:192.0.2.9:1"]
    here.names.asked[0]([addressed("192.0.2.1")])
    assert here.tried == ["192.0.2.9"]
    here.assert_clean()


# -- several backends, and again and again -------------------------------------------


def test_dial_backend_that_does_not_answer_in_time_is_followed_by_the_next(world: Make) -> None:
    here = world("192.0.2.1", "192.0.2.2", timeout=1.0)
    here.script["192.0.2.1"] = list(WAITS)
    here.dial()
    here.loop.advance(0.999)
    assert not here.found
    here.loop.advance(0.001)
    assert here.found == ["tcp:192.0.2.2:1"]
    here.assert_clean()


def test_dial_dead_backend_is_asked_last_for_a_while(world: Make) -> None:
    here = world("192.0.2.1", "192.0.2.2")
    here.script["192.0.2.1"] = [errno.ECONNREFUSED]
    here.dial()
    assert here.tried == ["192.0.2.1", "192.0.2.2"]
    here.made.clear()
    here.loop.advance(SKIP_SECONDS - 1)
    here.dial()
    assert here.tried == ["192.0.2.2"]
    here.made.clear()
    here.loop.advance(1.1)
    here.dial()
    assert here.tried == ["192.0.2.1", "192.0.2.2"]


def test_dial_while_all_are_dead_asks_again_ever_more_slowly(world: Make) -> None:
    here = world("192.0.2.1", "192.0.2.2", retry=4.0)
    here.script = {"192.0.2.1": [errno.ECONNREFUSED], "192.0.2.2": [errno.ECONNREFUSED]}
    began = here.loop.now
    here.dial()
    here.loop.advance(10.0)
    assert here.tried == ["192.0.2.1", "192.0.2.2"] * (len(here.made) // 2)
    rounds = [one.made_at - began for one in here.made[::2]]
    pauses = [round(after - before, 3) for before, after in itertools.pairwise(rounds)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, LAST_PAUSE, LAST_PAUSE, LAST_PAUSE]
    assert here.failed == ["connect-refused"]
    assert 4.0 <= rounds[-1] < 4.0 + LAST_PAUSE
    here.assert_clean()


def test_dial_backend_that_starts_late_is_found(world: Make) -> None:
    here = world("unix:/run/late", retry=30.0)
    here.script["/run/late"] = [errno.ENOENT]
    here.dial()
    here.loop.advance(3.0)
    assert not here.failed
    here.script["/run/late"] = [0]
    here.loop.advance(LAST_PAUSE)
    assert here.found == ["unix:/run/late"]
    here.assert_clean()


# -- descriptors -----------------------------------------------------------------------


def test_dial_passed_connection_is_used_once(world: Make) -> None:
    here = world("fd:back")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        here.standby.add("back", theirs)
        here.dial()
        assert here.socket is theirs
        here.dial()
    assert (here.found, here.failed) == (["fd:back"], ["descriptor-used-up"])


def test_dial_passed_path_is_connected_to_each_time(world: Make) -> None:
    here = world("fd:back")
    here.standby.add_path("back", "/proc/self/fd/7")
    here.dial()
    here.dial()
    assert here.tried == ["/proc/self/fd/7"] * 2
    assert all(one.family == socket.AF_UNIX for one in here.made)
    assert here.found == ["fd:back"] * 2
