"""Answers from a wildcard UDP port by a server with no network: the sidecar lends the sockets."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from echo_appliance.dispatch.lender import FLOWS, PER_SECOND
from echo_appliance.dispatch.sidecar import CHECK_SECONDS
from echo_appliance.lending import (
    ASK,
    FLOW_OCTETS,
    HELLO,
    MESSAGE_LIMIT,
    RETURN,
    pack_flow,
)
from tests.process.dispatch.clients import QUIET, ask, connected, is_empty
from tests.process.dispatch.sidecars import eventually, sidecar, write
from tests.process.dispatch.space import DEADLINE, STUB, Space

if TYPE_CHECKING:
    from echo_appliance.lending import Address

PREFIX = "127.1.0.0/16"
LOCAL, PEER = ("127.1.0.1", 5000), ("127.0.0.1", 777)


class Stage:
    """A rendezvous as systemd keeps it, whoever comes and goes at its ends."""

    def __init__(self, space: Space, folder: Path) -> None:
        self.space = space
        self.folder = folder
        self.path = str(folder / "replies")
        self.bound = space.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.bound.bind(self.path)
        self.config = folder / "b.json"

    def connected(self) -> socket.socket:
        """What OpenFile= makes of the path."""
        sock = self.space.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sock.connect(self.path)
        return sock

    @contextmanager
    def sidecar(
        self, *passed: tuple[str, socket.socket], stub: str = STUB
    ) -> Iterator[subprocess.Popen[str]]:
        with sidecar(
            self.space, self.folder, self.config, *passed, ("replies", self.bound), stub=stub
        ) as process:
            yield process

    @contextmanager
    def echo(self, sock: socket.socket, *options: str) -> Iterator[subprocess.Popen[str]]:
        """An echo server with this socket, and with no network at all."""
        process = self.space.start(
            list(options), (("echo", sock), ("replies", self.connected())), {}, mode="echo",
            without_network=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE)
        assert process.returncode == 0


@pytest.fixture
def stage(empty: Space, tmp_path: Path) -> Stage:
    return Stage(empty, tmp_path)


@pytest.mark.parametrize("options", ["", "--workers 2"])
@pytest.mark.parametrize("server", ["127.0.0.1", "::", "::1"])
def test_server_without_network_answers_from_any_port(
    stage: Stage, server: str, options: str
) -> None:
    sock = stage.space.udp(server)
    stage.space.run_tool("ip", "-6", "route", "add", "local", "2001:db8::/64", "dev", "lo")
    write(stage.config, ("echo", PREFIX, 0), ("echo", "2001:db8::/64", "1000-2000"))
    places = [("127.1.0.1", 7777), ("127.1.0.1", 8888), ("127.1.9.9", 1)]
    if server == "::1":
        places = [("2001:db8::77", 1234), ("2001:db8::78", 1999)]
    with stage.sidecar(("echo", sock)), stage.echo(sock, *options.split()):
        for address, port in places:
            with connected(address, port) as one, connected(address, port) as other:
                for number in range(5):  # the later ones by the flow's own socket
                    assert ask(one, b"one %d" % number) == b"one %d" % number
                    assert ask(other, b"other %d" % number) == b"other %d" % number


def test_datagrams_that_come_before_their_socket_are_answered_when_it_comes(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    one = stage.space.keep(connected("127.1.0.1", 5000))
    with stage.sidecar(("echo", sock)) as process, stage.echo(sock):
        process.send_signal(signal.SIGSTOP)
        sent = {b"%d" % number for number in range(20)}
        for octets in sorted(sent):
            one.send(octets)
        eventually(lambda: is_empty(sock))  # the server has taken them all
        process.send_signal(signal.SIGCONT)
        assert {one.recv(100) for _ in sent} == sent


def test_flows_outlive_a_sidecar_that_is_killed_and_the_next_one_is_found(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.echo(sock), connected("127.1.0.1", 5000) as old, connected("127.1.0.1", 5000) as new:
        with stage.sidecar(("echo", sock)) as process:
            assert ask(old, b"before") == b"before"
            process.kill()
            process.wait()
        assert ask(old, b"while it is gone") == b"while it is gone"
        new.send(b"kept")
        with stage.sidecar(("echo", sock)):
            while (answer := resend(new, b"asked again")) is None:
                pass
            assert answer in (b"kept", b"asked again")
            assert ask(old, b"after") == b"after"


def resend(sock: socket.socket, octets: bytes) -> bytes | None:
    """As clients of UDP do: ask, and if nothing comes for a while, None."""
    sock.settimeout(QUIET)
    sock.send(octets)
    try:
        return sock.recv(2000)
    except TimeoutError:
        return None
    finally:
        sock.settimeout(5)


def test_flows_are_bounded_at_both_ends(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)) as process, stage.echo(sock) as server:
        clients = [connected("127.1.0.1", 5000) for _ in range(1100)]
        for turn in range(2):
            for number, one in enumerate(clients):
                octets = b"%d %d" % (turn, number)
                while resend(one, octets) != octets:
                    pass  # "too-often" for the moment, or a late answer to what was sent twice
        for pid in (server.pid, process.pid):
            assert len(stage.space.descriptors(pid)) < 1024 + 40
        for one in clients:
            one.close()


def test_flow_goes_to_the_new_label_when_its_binding_changes(stage: Stage) -> None:
    space, sock = stage.space, stage.space.udp()
    other = space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    one = space.keep(connected("127.1.0.1", 5000))
    other.settimeout(QUIET)

    def arrived() -> bool:
        one.send(b"for other")
        try:
            return other.recv(100) == b"for other"
        except TimeoutError:
            return False

    with stage.sidecar(("echo", sock), ("other", other)), stage.echo(sock):
        assert ask(one, b"first") == b"first"
        write(stage.config, ("other", PREFIX, 0))
        space.ok("load-bindings", str(stage.config))
        eventually(arrived)


# -- hostile clients -----------------------------------------------------------------


class Guest:
    """Somebody who can write to the rendezvous, and knows the protocol."""

    def __init__(self, stage: Stage, shown: socket.socket | int) -> None:
        self._keep = stage.space.keep
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = self._keep(ours)
        self.channel.settimeout(5)
        number = shown if isinstance(shown, int) else shown.fileno()
        with theirs:
            socket.send_fds(stage.connected(), [HELLO], [theirs.fileno(), number])

    def ask(self, local: Address, peer: Address) -> socket.socket | str:
        """Return what is lent, or the reason why not."""
        flow = pack_flow(local, peer)
        self.channel.send(ASK + flow)
        words, descriptors, _, _ = socket.recv_fds(self.channel, MESSAGE_LIMIT, 1)
        assert words[:FLOW_OCTETS] == flow
        if descriptors:
            assert len(words) == FLOW_OCTETS
            return self._keep(socket.socket(fileno=descriptors[0]))
        return words[FLOW_OCTETS:].decode()

    @property
    def ended(self) -> bool:
        """Whether the lender wants nothing more of us."""
        try:
            return self.channel.recv(MESSAGE_LIMIT) == b""
        except ConnectionError:
            return True


def test_lender_lends_only_what_is_steered_to_the_socket_that_is_shown(stage: Stage) -> None:
    space = stage.space
    ours, others, stranger = space.udp(), space.udp(), space.udp()
    write(stage.config, ("ours", PREFIX, "4000-6000"), ("others", "127.1.7.0/24", 0))
    with stage.sidecar(("ours", ours), ("others", others)):
        guest = Guest(stage, ours)
        lent = guest.ask(LOCAL, PEER)
        assert isinstance(lent, socket.socket)
        assert (lent.getsockname(), lent.getpeername()) == (LOCAL, PEER)
        lent.close()
        for local in (
            ("127.1.7.1", 5000),  # another label's, though our own prefix is around it
            ("127.1.0.1", 53),  # a port beside ours
            ("127.2.0.1", 5000),  # nobody's
            ("192.0.2.1", 5000),
        ):
            assert guest.ask(local, PEER) == "not-yours"
        for shown in (stranger, space.tcp(), stage.bound):
            assert Guest(stage, shown).ask(LOCAL, PEER) == "not-yours"
        assert guest.ask(("127.1.0.1", 33000), PEER) == "not-yours", "a port of local clients"


def test_lender_lends_no_flow_that_another_socket_of_the_label_gets(stage: Stage) -> None:
    one, two = stage.space.udp(), stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", one), ("echo", two)):
        guests = [Guest(stage, sock) for sock in (one, two)]
        for port in range(1000, 1040):
            answers = [guest.ask(LOCAL, ("127.0.0.1", port)) for guest in guests]
            lent = [answer for answer in answers if isinstance(answer, socket.socket)]
            assert [answer for answer in answers if answer not in lent] == ["not-yours"]
            lent[0].close()


def test_lender_lends_no_flow_between_two_servers(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, "1-6000"))
    with stage.sidecar(("echo", sock)):
        assert Guest(stage, sock).ask(LOCAL, ("127.1.0.2", 4000)) == "would-loop"


def test_lent_socket_takes_no_other_flow(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)):
        lent = Guest(stage, sock).ask(LOCAL, PEER)
        assert isinstance(lent, socket.socket)
        with connected(*LOCAL) as stranger:
            stranger.send(b"mine")
            sock.settimeout(DEADLINE)
            assert sock.recv(100) == b"mine"
        with pytest.raises(BlockingIOError):
            lent.recv(100, socket.MSG_DONTWAIT)
        lent.close()


def test_lender_takes_back_everything_from_a_client_that_goes(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)), stage.space.udp(*PEER) as peer:
        guest = Guest(stage, sock)
        kept = guest.ask(LOCAL, PEER)  # held on to after its channel has ended
        assert isinstance(kept, socket.socket)
        peer.sendto(b"to the flow", LOCAL)
        kept.settimeout(DEADLINE)
        assert kept.recv(100) == b"to the flow"
        guest.channel.close()

        def steered_again() -> bool:
            peer.sendto(b"to the label", LOCAL)
            sock.settimeout(QUIET)
            try:
                return sock.recv(100) == b"to the label"
            except TimeoutError:
                return False

        eventually(steered_again)
        kept.close()


def test_lender_takes_back_a_socket_that_is_connected_to_somebody_else(stage: Stage) -> None:
    sock, victim = stage.space.udp(), stage.space.udp("127.0.0.1", 778)
    write(stage.config, ("echo", PREFIX, 0))
    sock.settimeout(QUIET)

    def steered_again() -> bool:
        victim.sendto(b"to the label", LOCAL)
        try:
            return sock.recv(100) == b"to the label"
        except TimeoutError:
            return False

    with stage.sidecar(("echo", sock)):
        lent = Guest(stage, sock).ask(LOCAL, PEER)
        assert isinstance(lent, socket.socket)
        lent.connect(victim.getsockname())
        eventually(steered_again)


@pytest.mark.parametrize(
    "message",
    [b"?", b"", b"?" + bytes(FLOW_OCTETS), b"!" + pack_flow(LOCAL, PEER), b"x" * 5000],
    ids=["short", "empty", "zeros", "verb", "long"],
)
def test_lender_ends_a_client_that_makes_no_sense_and_serves_the_others(
    stage: Stage, message: bytes
) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)):
        good, bad = Guest(stage, sock), Guest(stage, sock)
        bad.channel.send(message)
        assert bad.ended
        assert isinstance(good.ask(LOCAL, PEER), socket.socket)


def test_lender_refuses_greetings_that_are_none(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)) as process, open("/dev/null") as null:
        assert isinstance(Guest(stage, sock).ask(LOCAL, PEER), socket.socket)
        before = len(stage.space.descriptors(process.pid))
        rendezvous = stage.connected()
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with left, right:
            for words, passed in (
                (b"", []),
                (HELLO, []),
                (HELLO, [null.fileno(), null.fileno()]),
                (HELLO, [right.fileno(), sock.fileno()]),  # a stream
                (HELLO, [sock.fileno()] * 20),
                (b"x" * 60000, [right.fileno()]),
            ):
                socket.send_fds(rendezvous, [words], passed)
        assert isinstance(Guest(stage, sock).ask(LOCAL, PEER), socket.socket)
        # One more channel, and what is lent on it.
        assert len(stage.space.descriptors(process.pid)) == before + 2


def test_lender_serves_others_while_one_floods_it_and_one_reads_nothing(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)), ExitStack() as guests:
        deaf, greedy = Guest(stage, sock), Guest(stage, sock)
        for one in (deaf, greedy):
            guests.callback(one.channel.close)
        lent, start = 0, time.monotonic()
        for number in range(4000):
            port = 1 + number
            try:
                deaf.channel.send(ASK + pack_flow(LOCAL, ("127.0.0.1", port)), socket.MSG_DONTWAIT)
            except OSError:
                pass
            answer = greedy.ask(LOCAL, ("127.0.0.2", port))
            if isinstance(answer, socket.socket):
                lent += 1
                answer.close()
            else:
                assert answer == "too-often"
        assert lent <= FLOWS + PER_SECOND * (time.monotonic() - start)
        assert isinstance(Guest(stage, sock).ask(LOCAL, PEER), socket.socket)


def test_lender_keeps_descriptors_for_the_sidecar_itself(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n" + STUB
    with stage.sidecar(("echo", sock), stub=few) as process:
        guest = Guest(stage, sock)
        answers = [guest.ask(LOCAL, ("127.0.0.1", port)) for port in range(1, 60)]
        lent = [one for one in answers if isinstance(one, socket.socket)]
        assert len(lent) == 100 - 64
        assert set(answers) - set(lent) == {"full"}
        write(stage.config, ("echo", PREFIX, 0), ("echo", "127.2.0.0/16", 0))
        process.send_signal(signal.SIGHUP)
        eventually(lambda: len(stage.space.ok("bindings", "--json").json) == 4)


def test_lender_goes_on_while_somebody_holds_the_lock(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)), stage.echo(sock):
        lock = os.open(stage.space.bpffs / "echo-appliance" / "lock", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            start = time.monotonic()
            while time.monotonic() < start + 2 * CHECK_SECONDS:
                with connected("127.1.0.1", 5000) as one:
                    assert ask(one, b"at once") == b"at once"
                time.sleep(0.02)  # or it would be "too-often"
        finally:
            os.close(lock)


def test_lender_takes_so_many_clients_and_again_when_some_go(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)):
        crowd = [Guest(stage, sock) for _ in range(64)]
        assert isinstance(crowd[-1].ask(LOCAL, PEER), socket.socket)
        assert Guest(stage, sock).ended
        for one in crowd:
            one.channel.close()

        def welcome() -> bool:
            try:
                return isinstance(Guest(stage, sock).ask(LOCAL, PEER), socket.socket)
            except (OSError, AssertionError):
                return False

        eventually(welcome)


def test_lender_forgets_a_socket_that_is_returned(stage: Stage) -> None:
    sock = stage.space.udp()
    write(stage.config, ("echo", PREFIX, 0))
    with stage.sidecar(("echo", sock)) as process:
        guest = Guest(stage, sock)
        before = None
        for _ in range(50):
            lent = guest.ask(LOCAL, PEER)
            assert isinstance(lent, socket.socket)
            before = before or len(stage.space.descriptors(process.pid))
            lent.close()
            guest.channel.send(RETURN + pack_flow(LOCAL, PEER))
        assert guest.ask(("127.9.0.1", 1), PEER) == "not-yours"  # all before that is done
        assert len(stage.space.descriptors(process.pid)) == (before or 0) - 1


@pytest.mark.parametrize(
    ("name", "words"), [("echo", "cannot ask for reply"), ("dispatch", "cannot lend reply")]
)
def test_wrong_socket_by_the_name_of_replies_is_told(stage: Stage, name: str, words: str) -> None:
    wrong = stage.space.udp()
    arguments = ["run"] if name == "dispatch" else []
    process = stage.space.start(
        arguments, (("echo", stage.space.udp()), ("replies", wrong)), {}, mode=name
    )
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert words in said
    assert said.count("\n") == 1
