"""Explain: which binding wins, why, over which others, and which socket takes it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from echo_appliance.dispatch.explain import Packet, explain
from echo_appliance.dispatch.place import Place
from echo_appliance.dispatch.state import Dispatcher
from tests.process.dispatch.space import Space

UDP4 = 2
OTHERS = 3
OTHER = """
import sys
from echo_appliance.dispatch.explain import Steering
from echo_appliance.dispatch.place import Place

steering = Steering(Place(sys.argv[1], None))
print("asking", flush=True)
while True:
    steering.taker(("127.2.0.1", 80), ("127.0.0.1", 1))
"""


def test_explain_is_right_while_others_ask_about_other_packets(space: Space) -> None:
    # A sidecar asks the same program for each reply socket, and its report has room for one.
    space.ok("bind", "web", "udp", "127.1.0.0/16", "80")
    space.ok("bind", "other", "udp", "127.2.0.0/16", "80")
    place = Place(str(space.bpffs), None)
    words = [sys.executable, "-c", OTHER, str(space.bpffs)]
    with ExitStack() as stack:
        for _ in range(OTHERS):  # more than there are processors: each answer is overwritten soon
            other = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE))
            stack.callback(other.kill)
            assert other.stdout is not None
            assert other.stdout.readline() == b"asking\n"
        dispatcher = stack.enter_context(Dispatcher(place, write=False))
        for _ in range(500):
            answer = explain(dispatcher, Packet(UDP4, bytes((127, 1, 0, 1)), 80))
            assert answer.winner is not None
            assert answer.winner.binding.label == "web"


def test_explain_of_an_open_dispatcher_sees_bindings_that_were_replaced(space: Space) -> None:
    place = Place(str(space.bpffs), None)
    packet = Packet(UDP4, bytes((127, 1, 0, 1)), 80)
    with Dispatcher(place, write=False) as dispatcher:
        assert explain(dispatcher, packet).winner is None
        space.ok(
            "load-bindings", "-", stdin='{"bindings": [{"label": "a", "prefix": "127.1.0.1"}]}'
        )
        won = explain(dispatcher, packet).winner
        assert won is not None
        assert won.binding.label == "a"


def test_bind_after_the_ports_of_local_clients_changed_spares_the_new_ones(space: Space) -> None:
    space.ok("bind", "web", "udp", "127.1.0.0/16", "0")
    for port in ("80", "90-99"):  # by the two ways in which bindings are written
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"2{port[0]}000 2{port[0]}999")
        assert "no live socket" in space.ok("explain", "udp", "127.1.0.1", f"2{port[0]}500").out
        space.ok("bind", "web", "udp", "127.3.0.0/16", port)
        assert "local clients" in space.ok("explain", "udp", "127.1.0.1", f"2{port[0]}500").out
