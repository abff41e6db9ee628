"""Several forwarders on the same sockets: one to their clients, their manager and their metrics."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.process import pages
from tests.process.forwarding import Forwarding, target
from tests.process.launcher import (
    Launcher,
    Server,
    assert_sleeps,
    eventually,
    freeze,
    in_session,
    stat_fields,
)
from tests.process.peers import Sockets, receive, receive_to_end

TWO = ("--workers", "2")


@pytest.fixture
def forward(launch: Launcher, sockets: Sockets, short_path: Path) -> Forwarding:
    """Starts forwarders."""
    return Forwarding(launch, sockets, short_path)


def joined_by(
    forward: Forwarding, forwarder: Server, worker: int, front: socket.socket, to: socket.socket
) -> tuple[socket.socket, socket.socket]:
    """Return a client and what its backend accepted, joined by this worker: the others stand."""
    others = [pid for pid in forwarder.workers if pid != worker]
    for pid in others:
        freeze(pid)
    try:
        return forward.joined(front, to)
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def reload(forwarder: Server, answer: str, times: int = 1) -> None:
    """SIGHUP, and wait for what it says."""
    forwarder.signal(signal.SIGHUP)
    eventually(lambda: forwarder.stderr.count(answer) >= times, answer)


def pass_words(client: socket.socket, accepted: socket.socket) -> None:
    """One word each way."""
    for sender, receiver in ((client, accepted), (accepted, client)):
        sender.sendall(b"word")
        assert receive(receiver, 4) == b"word"


def test_forward_workers_share_the_sockets_and_their_counts(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    forwarder = forward.config(
        f'[route.web]\nto = "{target(backend)}"\n', *TWO, web=front, metrics=metrics
    )
    pairs = [joined_by(forward, forwarder, pid, front, backend) for pid in forwarder.workers]
    for pair in pairs:
        pass_words(*pair)
    # Also what open connections have moved since they were opened.
    pages.until(
        metrics,
        {
            ("connections_total", "web"): 2,
            ("connections", "web"): 2,
            ("received_octets_total", "web"): 8,
            ("sent_octets_total", "web"): 8,
        },
    )
    for client, accepted in pairs:
        client.close()
        assert receive_to_end(accepted) == b""
        accepted.close()
    pages.until(metrics, {("connections", "web"): 0})
    assert forwarder.notified.take().count("READY=1") == 1
    assert forwarder.stop() == 0


@pytest.mark.parametrize("whose", ["route", "process"])
def test_forward_workers_limit_holds_for_all_together(
    forward: Forwarding, sockets: Sockets, whose: str
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    limit = "max-connections = 3\n" if whose == "route" else ""
    options = ("--max-connections", "3") if whose == "process" else ()
    forwarder = forward.config(
        f'[route.web]\nto = "{target(backend)}"\n{limit}', *TWO, *options,
        web=front, metrics=metrics,
    )  # fmt: skip
    clients = [sockets.connect(front) for _ in range(8)]
    accepted = [sockets.keep(backend.accept()[0]) for _ in range(3)]
    pages.until(metrics, {("connections", "web"): 3})
    for pid in (forwarder.pid, *forwarder.workers):
        assert_sleeps(pid, 0.2)
    backend.settimeout(0)
    with pytest.raises(BlockingIOError):
        backend.accept()
    # Whoever has room again takes the next, whichever worker the kernel woke for it.
    for client in clients:
        client.sendall(b"x")
        client.shutdown(socket.SHUT_WR)
    backend.settimeout(10)
    served = 0
    while True:
        for one in accepted:
            assert receive(one, 1) == b"x"
            one.close()
            served += 1
        if served == len(clients):
            break
        accepted = [sockets.keep(backend.accept()[0])]


def test_forward_workers_limit_per_source_is_that_of_each_worker(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    forwarder = forward.config(
        f'[route.web]\nto = "{target(backend)}"\nmax-connections-per-source = 1\n', *TWO,
        web=front, metrics=metrics,
    )  # fmt: skip
    held = [joined_by(forward, forwarder, pid, front, backend) for pid in forwarder.workers]
    refused = sockets.connect(front)
    with contextlib.suppress(ConnectionResetError):
        assert refused.recv(1) == b""
    pages.until(metrics, {("connections_refused_total", "web", "source-limit"): 1})
    assert len(held) == 2


def test_forward_workers_all_follow_a_reload(forward: Forwarding, sockets: Sockets) -> None:
    front, one, other = sockets.listen(), sockets.listen(), sockets.listen()
    forwarder = forward.config(f'[route.web]\nto = "{target(one)}"\n', *TWO, web=front)
    before = [joined_by(forward, forwarder, pid, front, one) for pid in forwarder.workers]
    forward.write(f'[route.web]\nto = "{target(other)}"\n')
    reload(forwarder, "is in force")
    for pid in forwarder.workers:
        pass_words(*joined_by(forward, forwarder, pid, front, other))
    for pair in before:
        pass_words(*pair)
    victim = forwarder.workers[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(set(forwarder.workers) - {victim}) == 2, "another")
    [new] = [pid for pid in forwarder.workers if stat_fields(pid)[0] != "Z"][-1:]
    pass_words(*joined_by(forward, forwarder, new, front, other))


def test_forward_workers_all_keep_their_routes_when_the_file_is_bad(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.config(f'[route.web]\nto = "{target(backend)}"\n', *TWO, web=front)
    for number, text in enumerate(
        ("[[[", f'[route.web]\nto = "{target(backend)}"\nmax-connections = 1\n'), 1
    ):
        forward.write(text)
        reload(forwarder, "the old configuration stays", number)
    for pid in forwarder.workers:
        pass_words(*joined_by(forward, forwarder, pid, front, backend))
    assert len(forwarder.stderr.splitlines()) == 2


def test_forward_workers_file_that_changes_while_it_is_read_again_ends_none(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    route = f'[route.web]\nto = "{target(backend)}"\n'
    forwarder = forward.config(route, *TWO, web=front)
    workers = forwarder.workers
    forward.file.unlink()
    os.mkfifo(forward.file)  # who reads it next gets what is written next
    for pid in workers:
        freeze(pid)
    forwarder.signal(signal.SIGHUP)
    forward.write(route)
    eventually(lambda: "is in force" in forwarder.stderr, "the supervisor's word")
    for number, pid in enumerate(workers, 1):
        os.kill(pid, signal.SIGCONT)
        forward.write('[route.x]\nto = "tcp:h:1"\n')
        eventually(lambda: forwarder.stderr.count("keeps the old") >= number, "a worker's")  # noqa: B023
    for pid in workers:
        pass_words(*joined_by(forward, forwarder, pid, front, backend))
    assert forwarder.workers == workers


def test_forward_workers_signalled_with_their_supervisor_do_not_end(
    forward: Forwarding, sockets: Sockets
) -> None:
    # `systemctl kill --signal=HUP` reaches every process of the unit.
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.config(f'[route.web]\nto = "{target(backend)}"\n', *TWO, web=front)
    workers = forwarder.workers
    pair = forward.joined(front, backend)
    for pid in workers:
        os.kill(pid, signal.SIGHUP)
    reload(forwarder, "is in force")
    pass_words(*pair)
    assert forwarder.workers == workers


def test_forward_workers_drain_lets_open_connections_finish(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend, options=[*TWO, "--drain", "60"])
    pairs = [joined_by(forward, forwarder, pid, front, backend) for pid in forwarder.workers]
    forwarder.signal()
    forwarder.notified.wait("STOPPING=1")
    for client, accepted in pairs:
        pass_words(client, accepted)
        client.close()
        receive_to_end(accepted)
        accepted.close()
    assert forwarder.wait() == 0
    assert not in_session(forwarder.pid)


def test_forward_workers_keep_a_datagram_client_in_one_process(
    forward: Forwarding, sockets: Sockets
) -> None:
    fronts = {"a": sockets.bind(), "b": sockets.bind()}
    backend = sockets.bind()
    forward.config(f'[route."*"]\nto = "{target(backend)}"\n', *TWO, **fronts)
    for front in fronts.values():
        client = sockets.connect(front)
        seen = set()
        for _ in range(50):
            client.send(b"?")
            _, address = backend.recvfrom(10)
            seen.add(address)
            backend.sendto(b"!", address)
            assert client.recv(10) == b"!"
        assert len(seen) == 1, "the backend would take them for several clients"


def test_forward_workers_refuse_what_they_cannot_share(
    forward: Forwarding, sockets: Sockets
) -> None:
    to = 'to = "tcp:h:1"\n'
    ours, theirs = sockets.pair()
    for text, fronts, words in (
        (f"[route.web]\n{to}", {"web": theirs}, "one connection, which workers cannot share"),
        (f"[route.web]\n{to}max-connections = 1\n", {"web": sockets.listen()}, "less than --work"),
        ('[route.web]\nto = "udp:h:1"\n', {"web": sockets.bind()}, "no more than 1 workers busy"),
        ('[route.web]\nto = "fd:x"\n', {"web": sockets.listen(), "x": theirs}, "one connection"),
    ):
        assert words in forward.refuse(text, *TWO, **fronts)
    assert ours.fileno() >= 0
