"""Streams through the forwarder: whole, in both directions, with their ends as they were."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.forwarding import FAMILIES, Forwarding, in_thread
from tests.process.launcher import COMMAND, Launcher, eventually, frozen
from tests.process.peers import (
    Sockets,
    pattern,
    receive,
    receive_to_end,
    reset,
    stuff,
)

# What README promises that one stalled direction may cost, and room for the allocator.
PER_DIRECTION = 512 * 1024


@pytest.fixture
def forward(launch: Launcher, sockets: Sockets, short_path: Path) -> Forwarding:
    """Starts forwarders."""
    return Forwarding(launch, sockets, short_path)


@pytest.mark.parametrize(("here", "there"), list(itertools.product(FAMILIES, repeat=2)))
def test_forward_joins_any_two_families(
    forward: Forwarding, sockets: Sockets, here: str, there: str
) -> None:
    front, backend = sockets.listen(*FAMILIES[here]), sockets.listen(*FAMILIES[there])
    forwarder = forward.to(front, backend)
    client, accepted = forward.joined(front, backend)
    for sender, receiver in ((client, accepted), (accepted, client)):
        octets = pattern(100_000)
        sender.sendall(octets)
        assert receive(receiver, len(octets)) == octets
    client.close()
    assert receive_to_end(accepted) == b""
    accepted.close()
    assert forwarder.stop() == 0


def test_forward_bulk_in_both_directions_at_once_is_exact(
    forward: Forwarding, sockets: Sockets, payload: bytes
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forward.to(front, backend)
    client, accepted = forward.joined(front, backend)
    there, answers = payload[::-1], dict[str, bytes]()

    def send(sock: socket.socket, octets: bytes) -> None:
        sock.sendall(octets)
        sock.shutdown(socket.SHUT_WR)

    def receive_slowly(sock: socket.socket) -> None:
        parts = []
        while part := sock.recv(100_000):
            parts.append(part)
        answers["client"] = b"".join(parts)

    threads = [
        in_thread(lambda: send(client, payload)),
        in_thread(lambda: send(accepted, there)),
        in_thread(lambda: receive_slowly(client)),
    ]
    assert receive_to_end(accepted) == payload
    for thread in threads:
        thread.join()
    assert answers["client"] == there


@pytest.mark.parametrize("family", ["inet", "unix"])
@pytest.mark.parametrize("first", ["client", "backend"])
def test_forward_half_close_passes_and_the_other_direction_goes_on(
    forward: Forwarding, sockets: Sockets, family: str, first: str
) -> None:
    front, backend = sockets.listen(*FAMILIES[family]), sockets.listen(*FAMILIES[family])
    forwarder = forward.to(front, backend)
    pair = forward.joined(front, backend)
    early, late = pair if first == "client" else pair[::-1]
    early.sendall(b"that is all")
    early.shutdown(socket.SHUT_WR)
    assert receive_to_end(late) == b"that is all"
    # Two seconds: others drop the connection half a second after the first end.
    forwarder.assert_sleeps(2.0)
    late.sendall(b"late answer")
    late.close()
    assert receive_to_end(early) == b"late answer"


@pytest.mark.parametrize(("here", "there"), list(itertools.product(FAMILIES, repeat=2)))
@pytest.mark.parametrize("first", ["client", "backend"])
def test_forward_reset_is_passed_on_as_a_reset(
    forward: Forwarding, sockets: Sockets, here: str, there: str, first: str
) -> None:
    fronts = {"client": here, "backend": there}
    front, backend = sockets.listen(*FAMILIES[here]), sockets.listen(*FAMILIES[there])
    forward.to(front, backend)
    pair = forward.joined(front, backend)
    round_trip_through(*pair)
    one, other = pair if first == "client" else pair[::-1]
    family = fronts.pop(first)
    if family.startswith("inet"):
        reset(one)
    else:  # what a unix socket has of the kind: a close with something unread
        other.sendall(b"unread")
        assert one.recv(1, socket.MSG_PEEK)
        one.close()
    [family] = fronts.values()
    if family.startswith("inet"):
        with pytest.raises(ConnectionResetError):
            other.recv(1)
    else:  # nobody can send one to a unix socket that has read all
        assert other.recv(1) == b""


@pytest.mark.parametrize("first", ["client", "backend"])
def test_forward_octets_before_a_reset_are_delivered(
    forward: Forwarding, sockets: Sockets, first: str
) -> None:
    # An answer, and a close with something unread: a direct peer would still get the answer.
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend)
    pair = forward.joined(front, backend)
    round_trip_through(*pair)  # else it might not have seen yet that it is connected
    one, other = pair if first == "client" else pair[::-1]
    with frozen(forwarder.pid):
        one.sendall(b"answer")
        reset(one)
    assert receive(other, 6) == b"answer"
    with pytest.raises(ConnectionResetError):
        other.recv(1)


@pytest.mark.parametrize("families", [("inet", "inet"), ("inet", "unix"), ("unix", "inet")])
@pytest.mark.parametrize("first", ["client", "backend"])
def test_forward_answer_is_delivered_though_its_sender_takes_no_more(
    forward: Forwarding, sockets: Sockets, families: tuple[str, str], first: str
) -> None:
    # "413 Content Too Large", and a close with the rest of the request unread.
    front, backend = (sockets.listen(*FAMILIES[family]) for family in families)
    forwarder = forward.to(front, backend)
    pair = forward.joined(front, backend)
    round_trip_through(*pair)
    one, other = pair if first == "client" else pair[::-1]
    other.sendall(b"first part")
    receive(one, 5)  # the rest is left unread
    with frozen(forwarder.pid):
        other.sendall(b"second part")  # its event comes first, and what it wants to send fails
        one.sendall(b"answer")
        one.close()
    assert receive(other, 6) == b"answer"
    with contextlib.suppress(ConnectionResetError):
        assert other.recv(1) == b""


@pytest.mark.parametrize("first", ["client", "backend"])
def test_forward_reset_behind_a_stalled_direction_is_passed_on(
    forward: Forwarding, sockets: Sockets, payload: bytes, first: str
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend)
    pair = forward.joined(front, backend)
    one, other = pair if first == "client" else pair[::-1]
    stuff(one, memoryview(payload))
    reset(one)
    with pytest.raises(ConnectionResetError):
        other.sendall(payload)
    forwarder.assert_sleeps()


def test_forward_peer_that_never_reads_costs_bounded_memory_and_no_time(
    forward: Forwarding, sockets: Sockets, payload: bytes
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend)
    pairs = [forward.joined(front, backend) for _ in range(8)]
    before = forwarder.rss
    sent = [stuff(client, memoryview(payload)) for client, _ in pairs]
    assert all(octets < len(payload) for octets in sent), "the forwarder took in everything"
    assert forwarder.rss - before < len(pairs) * PER_DIRECTION
    forwarder.assert_sleeps()
    for (client, accepted), octets in zip(pairs, sent, strict=True):
        client.shutdown(socket.SHUT_WR)
        assert receive_to_end(accepted) == payload[:octets]


def test_forward_small_writes_into_a_blocked_peer_do_not_spin(
    forward: Forwarding, sockets: Sockets, payload: bytes
) -> None:
    # A pipe fills by slots: sixteen one-octet writes fill 64 KiB of it, which made others spin.
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend)
    client, accepted = forward.joined(front, backend)
    sent = stuff(client, memoryview(payload))
    reader = select.poll()
    reader.register(client, select.POLLOUT)
    receive(accepted, 1 << 20)  # some room, and what is sent now fills it octet by octet
    for octet in range(16):
        if reader.poll(200):
            client.send(payload[sent + octet : sent + octet + 1])
    stuff(client, memoryview(b""))
    forwarder.assert_sleeps(0.5)


def test_forward_client_that_closes_while_its_octets_wait_loses_none(
    forward: Forwarding, sockets: Sockets, payload: bytes
) -> None:
    for family in ("inet", "unix"):
        front, backend = sockets.listen(*FAMILIES[family]), sockets.listen(*FAMILIES[family])
        forwarder = forward.to(front, backend)
        client, accepted = forward.joined(front, backend)
        sent = stuff(client, memoryview(payload))
        client.close()
        forwarder.assert_sleeps()
        assert receive_to_end(accepted) == payload[:sent]


def test_forward_many_connections_leave_nothing_behind(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend)
    before = forwarder.descriptors
    for _ in range(20):
        pairs = [forward.joined(front, backend) for _ in range(20)]
        for number, (client, accepted) in enumerate(pairs):
            for sock in (client, accepted) if number % 2 else (accepted, client):
                if number % 3:
                    sock.close()
                else:
                    reset(sock)
    eventually(lambda: forwarder.descriptors == before, "all to be closed")


def test_forward_thousand_idle_connections_are_small(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend)
    before = forwarder.rss
    pairs = [forward.joined(front, backend) for _ in range(1000)]
    for client, accepted in pairs:
        client.send(b"x")
        receive(accepted, 1)
    # 10,000 are to fit in 60 MB, the interpreter included.
    assert (forwarder.rss - before) / len(pairs) < 4500


def test_forward_descriptor_that_is_a_connection_is_relayed(
    forward: Forwarding, sockets: Sockets
) -> None:
    backend = sockets.listen()
    ours, theirs = sockets.pair()
    forwarder = forward.to(theirs, backend)
    theirs.close()
    accepted = sockets.keep(backend.accept()[0])
    ours.sendall(b"hello")
    assert receive(accepted, 5) == b"hello"
    accepted.close()
    assert receive_to_end(ours) == b""
    ours.close()
    assert forwarder.wait() == 0


def test_forward_passed_connection_serves_one_client(
    launch: Launcher, forward: Forwarding, sockets: Sockets
) -> None:
    front = sockets.listen()
    ours, theirs = sockets.pair()
    forward.config('[route.web]\nto = "fd:back"\n', web=front, back=theirs)
    theirs.close()
    client = sockets.connect(front)
    client.sendall(b"hello")
    assert receive(ours, 5) == b"hello"
    with pytest.raises(ConnectionResetError):
        sockets.connect(front).recv(1)
    ours.sendall(b"answer")
    assert receive(client, 6) == b"answer"


def test_forward_passed_connection_that_somebody_has_a_copy_of_is_let_go(
    forward: Forwarding, sockets: Sockets
) -> None:
    # epoll would report its end for ever, of a descriptor that is closed here.
    front = sockets.listen()
    ours, theirs = sockets.pair()
    forwarder = forward.config('[route.web]\nto = "fd:back"\n', web=front, back=theirs)
    client = sockets.connect(front)
    client.sendall(b"hello")
    assert receive(ours, 5) == b"hello"
    client.close()
    assert receive_to_end(ours) == b""
    ours.close()
    forwarder.assert_sleeps()


def test_forward_path_descriptor_is_connected_for_each_client(
    launch: Launcher, sockets: Sockets, short_path: Path
) -> None:
    # Where no path leads to the backend, as in a container: its socket's place is a descriptor.
    front, folder = sockets.listen(), short_path / "backends"
    folder.mkdir()
    backend = sockets.listen(socket.AF_UNIX, str(folder / "backend"))
    with opened_path(folder / "backend") as descriptor:
        forwarder = launch.start(
            [front, descriptor], "--to", "fd:back", "--workers", "2",
            names=["web", "back"], command=(*COMMAND, "forward"),
        )  # fmt: skip
    folder.rename(short_path / "elsewhere")
    for _ in range(3):
        client = sockets.connect(front)
        round_trip_through(client, sockets.keep(backend.accept()[0]))
    backend.close()
    with pytest.raises(ConnectionResetError):
        sockets.connect(front).recv(1)
    assert forwarder.stop() == 0


@contextlib.contextmanager
def opened_path(path: Path) -> Iterator[int]:
    """Give a descriptor of the path itself."""
    descriptor = os.open(path, os.O_PATH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("what", "to", "words"),
    [
        ("socket", "tcp:h:1", 'write to = "fd:back"'),
        ("file", "fd:back", "not an open socket"),
        ("directory", "fd:back", "not an open socket"),
    ],
)
def test_forward_path_descriptor_that_is_no_target_is_refused(
    launch: Launcher, sockets: Sockets, short_path: Path, what: str, to: str, words: str
) -> None:
    path = short_path / "file"
    path.touch()
    if what == "directory":
        path = short_path
    elif what == "socket":
        path = Path(sockets.listen(socket.AF_UNIX).getsockname())
    with opened_path(path) as descriptor:
        line = launch.fail(
            [sockets.listen(), descriptor], "--to", to,
            names=["web", "back"], command=(*COMMAND, "forward"),
        )  # fmt: skip
    assert words in line


def test_forward_drain_lets_open_connections_finish(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend)
    client, accepted = forward.joined(front, backend)
    forwarder.signal()
    forwarder.notified.wait("STOPPING=1")
    round_trip_through(client, accepted)
    client.close()
    receive_to_end(accepted)
    accepted.close()
    assert forwarder.wait() == 0


def test_forward_drain_ends_what_takes_too_long(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend, options=["--drain", "0.3"])
    client, accepted = forward.joined(front, backend)
    began = time.monotonic()
    assert forwarder.stop() == 0
    assert 0.2 < time.monotonic() - began < 3
    for sock in (client, accepted):
        assert sock.recv(1) == b""


def round_trip_through(client: socket.socket, accepted: socket.socket) -> None:
    """One word each way."""
    for sender, receiver in ((client, accepted), (accepted, client)):
        sender.sendall(b"word")
        assert receive(receiver, 4) == b"word"


def test_forward_exit_idle_waits_for_the_last_connection(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend, options=["--exit-idle", "0.3"])
    client, accepted = forward.joined(front, backend)
    forwarder.assert_sleeps(0.8)
    assert not forwarder.exited
    client.close()
    accepted.close()
    assert forwarder.wait() == 0


def test_forward_small_words_are_not_held_back(forward: Forwarding, sockets: Sockets) -> None:
    # With Nagle's algorithm the second word of each answer waits for a delayed ACK, 40 ms.
    front, backend = sockets.listen(), sockets.listen()
    forward.to(front, backend)
    pair = forward.joined(front, backend)
    pair[1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for asker, answerer in (pair, pair[::-1]):
        began = time.monotonic()
        for _ in range(50):
            asker.sendall(b"?")
            receive(answerer, 1)
            for word in (b"one", b"two"):
                answerer.sendall(word)
                time.sleep(0.001)  # so that the forwarder reads them apart
            receive(asker, 6)
        assert time.monotonic() - began < 1.0
