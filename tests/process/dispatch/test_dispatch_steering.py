"""Which socket gets a packet: the table of precedence, families, ranges, several sockets."""

from __future__ import annotations

import socket

import pytest

from tests.process.dispatch.clients import reached, received
from tests.process.dispatch.space import Space


def test_dispatch_steers_all_ports_of_a_prefix_to_one_listener(space: Space) -> None:
    listener = space.tcp()
    space.ok("bind", "web", "tcp", "127.0.0.128/25", "0")
    assert space.register(("web", listener)).status == 0
    for address, port in (("127.0.0.128", 1), ("127.0.0.255", 65535), ("127.0.0.200", 4321)):
        assert reached([listener], address, port) == 0
    assert reached([listener], "127.0.0.127", 4321) is None, "outside the prefix"


# Every row: the bindings, a packet, and the label that wins it.
PRECEDENCE = [
    pytest.param(["all 127.1.0.0/16 0"], 80, "all", id="all-ports"),
    pytest.param(["one 127.1.0.0/16 80", "all 127.1.2.0/24 0"], 80, "all", id="longest-prefix"),
    pytest.param(["host 127.1.2.3/32 0", "net 127.1.2.0/24 80"], 80, "host", id="host-over-port"),
    pytest.param(["one 127.1.0.0/16 80", "all 127.1.0.0/16 0"], 80, "one", id="exact-over-all"),
    pytest.param(
        ["one 127.1.0.0/16 80", "few 127.1.0.0/16 80-81"], 80, "one", id="exact-over-range"
    ),
    pytest.param(
        ["few 127.1.0.0/16 70-90", "many 127.1.0.0/16 1-1000"], 80, "few", id="narrow-over-wide"
    ),
    pytest.param(
        ["many 127.1.0.0/16 1-1000", "all 127.1.0.0/16 0"], 80, "many", id="range-over-all"
    ),
    pytest.param(
        ["low 127.1.0.0/16 70-90", "high 127.1.0.0/16 75-95"], 80, "high", id="tie-higher-wins"
    ),
    # One of them is a block that the other one has not, of the very address of the packet.
    pytest.param(
        ["low 127.1.2.3/32 78-81", "high 127.1.2.3/32 80-83"], 80, "high", id="tie-of-a-host"
    ),
    pytest.param(
        ["one 127.1.2.3/32 80", "few 127.1.2.3/32 80-81", "all 127.1.0.0/16 0"],
        80,
        "one",
        id="port-of-a-host",
    ),
    pytest.param(["few 127.1.0.0/16 70-90", "all 127.1.0.0/16 0"], 91, "all", id="past-the-range"),
    pytest.param(["few 127.1.0.0/16 70-90"], 90, "few", id="last-of-the-range"),
    pytest.param(["few 127.1.0.0/16 70-90"], 91, None, id="nothing-bound"),
    pytest.param(["v6 ::/0 0"], 80, None, id="families-apart"),
]


@pytest.mark.parametrize("turn", ["as-listed", "reversed"])
@pytest.mark.parametrize(("bound", "port", "wins"), PRECEDENCE)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_dispatch_precedence(
    space: Space, protocol: str, bound: list[str], port: int, wins: str | None, turn: str
) -> None:
    names = [line.split()[0] for line in bound]
    sockets = [space.tcp() if protocol == "tcp" else space.udp() for _ in names]
    for sock in sockets:
        sock.setblocking(False)
    for line in bound if turn == "as-listed" else reversed(bound):
        label, prefix, ports = line.split()
        space.ok("bind", label, protocol, prefix, ports)
    assert space.register(*zip(names, sockets, strict=True)).status == 0
    got = (reached if protocol == "tcp" else received)(sockets, "127.1.2.3", port)
    assert got == (None if wins is None else names.index(wins))


def test_dispatch_keeps_protocols_apart(space: Space) -> None:
    stream, datagram = space.tcp(), space.udp()
    space.ok("bind", "a", "tcp", "127.1.0.0/16", "0")
    assert space.register(("a", stream), ("a", datagram)).status == 0
    assert reached([stream], "127.1.0.1", 99) == 0
    assert received([datagram], "127.1.0.1", 99) is None


def test_dispatch_ipv6_prefix_reaches_an_ipv6_listener(space: Space) -> None:
    listener = space.tcp("::1")
    space.run_tool("ip", "-6", "route", "add", "local", "2001:db8::/64", "dev", "lo")
    space.ok("bind", "six", "tcp", "2001:db8::/64", "1000-2000")
    assert space.register(("six", listener)).status == 0
    assert reached([listener], "2001:db8::77", 1500) == 0
    assert reached([listener], "2001:db8::77", 2001) is None


def test_dispatch_dual_stack_socket_counts_for_both_families(space: Space) -> None:
    listener = space.tcp("::", dualstack_ipv6=True)
    space.run_tool("ip", "-6", "route", "add", "local", "2001:db8::/64", "dev", "lo")
    space.ok("bind", "both", "tcp", "2001:db8::/64", "0")
    space.ok("bind", "both", "tcp", "127.1.0.0/16", "0")
    done = space.register(("both", listener))
    assert "both ipv4 tcp" in done.err
    assert "both ipv6 tcp" in done.err
    with socket.create_connection(("127.1.0.1", 7)), socket.create_connection(("2001:db8::1", 7)):
        for address in ("::ffff:127.1.0.1", "2001:db8::1"):
            connection, _ = listener.accept()
            with connection:
                assert connection.getsockname()[:2] == (address, 7)


@pytest.mark.parametrize(("option", "expected"), [("drop", None), ("pass", 1)])
def test_dispatch_binding_without_a_socket_drops_or_passes(
    space: Space, option: str, expected: int | None
) -> None:
    gone, other = space.tcp(), space.tcp("127.0.0.1", 5555)
    space.ok("bind", "--on-miss", option, "web", "tcp", "127.0.0.1", "5555")
    assert space.register(("web", gone)).status == 0
    assert reached([gone, other], "127.0.0.1", 5555) == 0
    gone.close()
    [row] = space.ok("status", "--json").json["destinations"]
    assert row["sockets"] == []
    assert reached([other], "127.0.0.1", 5555) == (None if expected is None else 0)
    [row] = space.ok("status", "--json").json["destinations"]
    assert row["misses"] == row["lookups"] - 1 >= 1  # a dropped SYN may be sent again


def test_dispatch_spreads_flows_over_several_sockets_and_passes_over_the_dead(
    space: Space,
) -> None:
    listeners = [space.tcp() for _ in range(4)]
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "0")
    assert space.register(*(("web", one) for one in listeners)).status == 0
    hits = [reached(listeners, "127.1.0.1", port) for port in range(1, 101)]
    assert min(hits.count(index) for index in range(4)) >= 8, "each gets its share of 100"
    listeners.pop(1).close()
    assert None not in [reached(listeners, "127.1.0.1", port) for port in range(1, 101)]
    [row] = space.ok("status", "--json").json["destinations"]
    assert (row["lookups"], row["misses"], row["errors"]) == (200, 0, 0)


def test_dispatch_same_udp_flow_meets_the_same_socket(space: Space) -> None:
    sockets = [space.udp() for _ in range(4)]
    space.ok("bind", "dns", "udp", "127.1.0.0/16", "53")
    assert space.register(*(("dns", one) for one in sockets)).status == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for number in range(20):
            client.sendto(bytes([number]), ("127.1.0.1", 53))
    counts = []
    for sock in sockets:
        sock.setblocking(False)
        count = 0
        while True:
            try:
                sock.recv(10)
            except BlockingIOError:
                break
            count += 1
        counts.append(count)
    assert sorted(counts) == [0, 0, 0, 20]


def test_dispatch_counts_hits_per_binding(space: Space) -> None:
    listener = space.tcp()
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "0")
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "80")
    assert space.register(("web", listener)).status == 0
    for port in (80, 80, 81):
        assert reached([listener], "127.1.0.1", port) == 0
    hits = {row["port"]: row["hits"] for row in space.ok("bindings", "--json").json}
    assert hits == {80: 2, 0: 1}
