"""Frames that mean harm: none crashes the stack, makes it grow, or harms the next client."""

from __future__ import annotations

import random
import re
import select
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from echo_appliance.netstack.checksum import checksum, pseudo_header_sum
from echo_appliance.netstack.wire import ethernet, icmp, ipv4, ipv6, tcp, udp
from tests.process.launcher import Server, eventually
from tests.process.netstack.net import OURS, OURS6, PORT, Net, connect, echo, metrics
from tests.process.programs import find, running

FRAMES = 1_000_000
# Reasons that only frames with right addresses and checksums get dropped for.
DEEP = (
    "tcp-option-runs-past-the-header", "tcp-data-offset-outside-of-the-segment", "udp-bad-length",
    "udp-closed-port", "nd-malformed", "fragment-overlap", "ipv6-bad-extension", "icmp-bad-quote",
    "icmp-unknown-type", "icmp-quote-not-ours", "tcp-no-such-connection", "tcp-reset-of-nothing",
)  # fmt: skip
THEIR_MAC, OUR_MAC = b"\x02\0\0\0\0\x63", b"\x02\0" + socket.inet_aton(OURS)
THEIRS, THEIRS6 = "192.0.2.99", "2001:db8::99"


def packet(
    payload: bytes,
    protocol: int,
    source: str = THEIRS,
    destination: str = OURS,
    offset: int = 0x4000,
) -> bytes:
    """Return a frame with an IPv4 packet."""
    head = ipv4.Packet(
        socket.inet_aton(source), socket.inet_aton(destination), protocol, memoryview(payload),
        flags_and_offset=offset, identification=7,
    )  # fmt: skip
    return (
        ethernet.serialize_header(OUR_MAC, THEIR_MAC, ethernet.IPV4)
        + ipv4.serialize_header(head, len(payload))
        + payload
    )


def segment(
    source: str = THEIRS, destination: str = OURS, *, data: bytes = b"", **fields: int
) -> bytes:
    """Return a frame with a TCP segment; a SYN unless told otherwise."""
    values = {"source_port": 40000, "port": PORT, "seq": 1, "ack": 0, "flags": tcp.SYN, **fields}
    made = tcp.Segment(values["source_port"], values["port"], values["seq"], values["ack"],
                       values["flags"], 65535)  # fmt: skip
    header = tcp.serialize(made)
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    octets = bytes(header) + data
    header[16:18] = checksum(octets, pseudo_header_sum(addresses, ipv4.TCP, len(octets))).to_bytes(
        2, "big"
    )
    return packet(bytes(header) + data, ipv4.TCP, source, destination)


def arp_announcement() -> bytes:
    """Return a request that tells the stack where THEIRS is."""
    addresses = THEIR_MAC + socket.inet_aton(THEIRS) + bytes(6) + socket.inet_aton(OURS)
    return (
        ethernet.serialize_header(b"\xff" * 6, THEIR_MAC, ethernet.ARP)
        + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
        + addresses
    )


class Link:
    """A station that speaks for itself, on a pair of message sockets."""

    def __init__(self, net: Net, *options: str) -> None:
        self.page = net.page()
        ours, self.socket = net.frames()
        self.server: Server = net.serve(
            ours, "--claim", "0", *options, passed=[("metrics", self.page)]
        )
        self.socket.setblocking(True)
        self.socket.settimeout(10)
        self.send(arp_announcement())
        self.receive(ethernet.ARP)

    def send(self, frame: bytes) -> None:
        """Send a frame; take in what the stack has to say meanwhile."""
        self.drain()
        self.socket.send(frame)

    def drain(self) -> None:
        """Take in all that came."""
        while select.select([self.socket], [], [], 0)[0]:
            self.socket.recv(65536)

    def receive(self, ethertype: int = ethernet.IPV4) -> bytes:
        """Return the payload of the next frame of this type."""
        while True:
            frame = self.socket.recv(65536)
            if frame[12:14] == ethertype.to_bytes(2, "big") and frame[:6] == THEIR_MAC:
                return frame[14:]

    def is_alive(self) -> bool:
        """Whether an echo request is answered."""
        self.drain()
        question = icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 0x12340001, b"alive?"))
        self.send(packet(question, ipv4.ICMP))
        while True:
            answer = self.receive()
            # Others may be on their way still: answers to what was sent before.
            if (
                answer[9] == ipv4.ICMP
                and answer[20] == icmp.ECHO_REPLY
                and answer[24:26] == b"\x124"
            ):
                return answer[28:] == b"alive?"

    def dropped(self, reason: str) -> int:
        """How many frames got no further for this reason."""
        return metrics(self.page.getsockname()).get(f"dropped_frames_total:{reason}", 0)

    def drops(self, reason: str, frame: bytes) -> None:
        """Assert that a frame is dropped, counted, and answered by nothing."""
        before = self.dropped(reason)
        self.drain()
        self.socket.send(frame)
        eventually(lambda: self.dropped(reason) == before + 1, f"{reason} to be counted")
        assert not select.select([self.socket], [], [], 0)[0], "it was answered"


@pytest.fixture
def link(net: Net) -> Link:
    return Link(net)


# -- by reason ---------------------------------------------------------------


def test_frame_of_each_bad_kind_is_dropped_and_counted(link: Link) -> None:
    good = segment()
    spoiled = bytearray(good)
    spoiled[-1] ^= 1
    header = bytearray(good)
    header[14 + 10] ^= 1
    fragment = packet(b"x" * 24, ipv4.UDP, offset=0x2000)
    overlap = packet(b"x" * 24, ipv4.UDP, offset=0x2000 | 1)
    for reason, frame in {
        "ethernet-truncated": good[:13],
        "ipv4-truncated": good[:30],
        "ipv4-bad-length": good[:50],
        "ipv4-bad-checksum": bytes(header),
        "tcp-bad-checksum": bytes(spoiled),
        "martian-source": segment("127.0.0.1"),
        "spoofed-source": segment(OURS, source_port=PORT),  # land: to itself, from itself
        "packet-for-others": segment(destination="192.0.2.77"),
        "group-destination": segment(destination="192.0.2.255"),
        "frame-for-others": b"\x02\0\0\0\0\x01" + good[6:],
        "one-address-in-group-frame": b"\xff" * 6 + good[6:],
        "unknown-ethertype": good[:12] + b"\x12\x34" + good[14:],
        "arp-truncated": arp_announcement()[:30],
    }.items():
        link.drops(reason, frame)
        link.drain()
    link.send(fragment)
    link.drops("fragment-overlap", overlap)
    assert link.is_alive()


def test_address_that_somebody_else_claims_is_defended(link: Link) -> None:
    claim = arp_announcement().replace(socket.inet_aton(THEIRS), socket.inet_aton(OURS))
    link.send(claim)
    while (frame := link.socket.recv(65536))[12:14] != b"\x08\x06":
        pass
    assert frame[22:32] == OUR_MAC + socket.inet_aton(OURS)
    assert link.dropped("address-conflict") == 1
    assert link.is_alive()


def test_option_that_lies_about_its_length_is_dropped(link: Link) -> None:
    """Two SYNs that crash others: no timestamp, and an option that runs past the end."""
    for options in (b"\x02\x04\x05\xb4", b"\x08\x0a\0\0", b"\x05\x00\0\0", b"\x02\xff\0\0"):
        head = struct.pack("!HHIIBBHHH", 40001, PORT, 9, 0, 6 << 4, tcp.SYN, 1000, 0, 0) + options
        addresses = socket.inet_aton(THEIRS) + socket.inet_aton(OURS)
        total = checksum(head, pseudo_header_sum(addresses, ipv4.TCP, len(head)))
        link.send(packet(head[:16] + total.to_bytes(2, "big") + head[18:], ipv4.TCP))
    assert link.is_alive()
    assert link.dropped("tcp-option-runs-past-the-header") >= 1


def test_icmp_errors_are_not_sent_without_end(link: Link) -> None:
    question = udp.Datagram(40000, 4321, b"?")
    addresses = socket.inet_aton(THEIRS) + socket.inet_aton(OURS)
    frame = packet(udp.serialize(question, addresses), ipv4.UDP)
    for _ in range(2_000):
        link.send(frame)
    assert link.is_alive()
    eventually(lambda: link.dropped("icmp-error-limit") > 1_500, "the limit")


def test_syn_flood_leaves_room_for_others(net: Net) -> None:
    """Half-open connections are bounded: beyond, cookies; and a real client still gets through."""
    page = net.page()
    server = net.serve(net.tap(), passed=[("metrics", page)])
    before = server.rss
    # 10,000 a second.  With --flood the tap's queue would overflow, and what is lost there is
    # whatever comes: that would test the kernel.
    flood = [find("hping3", "hping3"), "-i", "u100", "--rand-source", "-S", "-p", str(PORT), OURS]
    with running([*flood, "-q"], Path("/dev/null")):
        eventually(
            lambda: metrics(page.getsockname()).get("received_frames_total", 0) > 20_000,
            "the flood", 60,
        )  # fmt: skip
        with connect() as sock:
            sock.settimeout(30)
            assert echo(b"x" * 20_000, sock) == b"x" * 20_000
    assert server.rss - before < 48 << 20


# -- by the million ----------------------------------------------------------


@pytest.mark.timeout(400)
def test_million_random_and_mutated_frames_harm_nothing(link: Link) -> None:
    chance = random.Random(20480)  # noqa: S311 - chance that can be repeated
    seeds = _seeds()
    link.socket.setblocking(False)
    for frame in seeds:
        link.socket.send(frame)
    size = before = 0
    for count in range(FRAMES):
        frame = _mutated(chance, seeds)
        size += len(frame)
        while True:
            try:
                link.socket.send(frame)
                break
            except BlockingIOError:
                link.drain()
                select.select([], [link.socket], [], 10)
        if count % 16 == 0:
            link.drain()
        if count == FRAMES // 5:
            before = link.server.rss
    link.socket.setblocking(True)
    link.socket.settimeout(20)
    link.send(arp_announcement())  # others have claimed our address meanwhile
    assert link.is_alive()
    assert link.server.rss - before < 8 << 20, "it grew"
    assert not link.server.exited
    page = metrics(link.page.getsockname())
    assert page["dropped_frames_total:tcp-bad-checksum"] < FRAMES // 10, "few get to what matters"
    for reason in DEEP:
        assert page.get(f"dropped_frames_total:{reason}"), f"no frame got as far as {reason}"


def _seeds() -> list[bytes]:
    """Frames of all the kinds that we take in, right in every respect."""
    addresses = socket.inet_aton(THEIRS) + socket.inet_aton(OURS)
    echo_request = icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 1, b"abcdefgh" * 4))
    datagram = udp.serialize(udp.Datagram(40000, PORT, b"abcdefgh" * 4), addresses)
    quoted = segment(OURS, THEIRS)[14:]
    error = icmp.serialize(icmp.Message(icmp.DESTINATION_UNREACHABLE, 4, 600, quoted))
    options = b"\x02\x04\x05\xb4\x04\x02\x08\x0a" + bytes(8) + b"\x01\x03\x03\x07"
    syn = struct.pack("!HHIIBBHHH", 40002, PORT, 1, 0, 10 << 4, tcp.SYN, 65535, 0, 0) + options
    return [
        *_seeds6(syn),
        packet(syn, ipv4.TCP),
        arp_announcement(),
        segment(),
        segment(flags=tcp.ACK, seq=2, ack=1, data=b"data" * 10),
        segment(flags=tcp.RST, seq=2),
        segment(flags=tcp.FIN | tcp.ACK, seq=2, ack=77),
        packet(echo_request, ipv4.ICMP),
        packet(datagram, ipv4.UDP),
        packet(error, ipv4.ICMP),
        packet(b"f" * 64, ipv4.UDP, offset=0x2000),
        packet(b"f" * 64, ipv4.UDP, offset=8),
    ]


def _seeds6(syn: bytes) -> list[bytes]:
    """The same over IPv6: what is looked for, what is asked, headers before headers, fragments."""
    ours, theirs = (socket.inet_pton(socket.AF_INET6, one) for one in (OURS6, THEIRS6))
    hardware = b"\x01\x01" + THEIR_MAC
    option = b"\x06\x00\x01\x04" + bytes(4)
    return [
        packet6(ipv6.ICMPV6, b"\x80\0\0\0\0\x01\0\x01" + b"abcdefgh" * 4),
        packet6(ipv6.ICMPV6, b"\x87\0\0\0" + bytes(4) + ours + hardware),
        packet6(ipv6.ICMPV6, b"\x88\0\0\0\x60\0\0\0" + theirs + b"\x02" + hardware[1:]),
        packet6(ipv6.ICMPV6, b"\x02\0\0\0\0\0\x05\0" + packet6(ipv6.TCP, syn)[14:]),
        packet6(ipv6.TCP, syn),
        packet6(ipv6.UDP, struct.pack("!HHHH", 40000, PORT, 16, 0) + b"datagram"),
        packet6(ipv6.DESTINATION_OPTIONS, option + syn),
        packet6(ipv6.HOP_BY_HOP, b"\x3c" + option[1:] + option + syn),
        packet6(ipv6.FRAGMENT, b"\x06\0\0\x01\0\0\0\x07" + syn),
        packet6(ipv6.FRAGMENT, b"\x06\0\0\x28\0\0\0\x07" + b"f" * 64),
        packet6(ipv6.FRAGMENT, b"\x3c\0\0\x01\0\0\0\x08" + option + b"f" * 8),
    ]


def packet6(protocol: int, payload: bytes) -> bytes:
    """Return a frame with an IPv6 packet from THEIRS6."""
    source, destination = (socket.inet_pton(socket.AF_INET6, one) for one in (THEIRS6, OURS6))
    head = ipv6.Packet(source, destination, protocol, memoryview(payload), hop_limit=255)
    return (
        ethernet.serialize_header(OUR_MAC, THEIR_MAC, ethernet.IPV6)
        + ipv6.serialize_header(head, len(payload))
        + payload
    )


def _mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    kind = chance.random()
    if kind < 0.1:  # not even the right addresses
        return chance.randbytes(1 + int(chance.random() * 200))
    frame = bytearray(seeds[int(chance.random() * len(seeds))])
    if kind < 0.3:
        del frame[int(chance.random() * len(frame)) + 1 :]
    else:
        for _ in range(1 + int(chance.random() * 4)):
            frame[12 + int(chance.random() * (len(frame) - 12))] = int(chance.random() * 256)
    if kind > 0.4:
        _sum_up(frame)
    return bytes(frame)


def _sum_up(frame: bytearray) -> None:
    """Make the checksums right where they are, or all that is deeper would never be looked at."""
    if frame[12:14] == b"\x08\0" and len(frame) > 34:
        frame[24:26] = b"\0\0"
        frame[24:26] = checksum(bytes(frame[14:34])).to_bytes(2, "big")
        start, protocol, addresses = 34, frame[23], bytes(frame[26:34])
    elif frame[12:14] == b"\x86\xdd" and len(frame) > 54:
        start, protocol, addresses = 54, frame[20], bytes(frame[22:54])
        if protocol in (ipv6.DESTINATION_OPTIONS, ipv6.FRAGMENT):
            start, protocol = 62, frame[54]
    else:
        return
    at = start + _CHECKSUM_AT.get(protocol, len(frame))
    if at + 2 > len(frame):
        return
    frame[at : at + 2] = b"\0\0"
    octets = bytes(frame[start:])
    so_far = 0 if protocol == ipv4.ICMP else pseudo_header_sum(addresses, protocol, len(octets))
    frame[at : at + 2] = checksum(octets, so_far).to_bytes(2, "big")


_CHECKSUM_AT = {ipv4.TCP: 16, ipv4.UDP: 6, ipv4.ICMP: 2, ipv6.ICMPV6: 2}


# -- by others' tools --------------------------------------------------------


def test_nmap_finds_what_is_open_and_nothing_else(net: Net) -> None:
    nmap = find("nmap", "nmap")
    net.serve(net.tap())
    command = [nmap, "-n", "-Pn", "-sS", "-p", "1-1000", "--max-retries", "3", OURS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    open_ports = [line.split("/")[0] for line in done.stdout.splitlines() if "/tcp" in line]
    assert open_ports == ["7", "9"], done.stdout
    assert "998 closed tcp ports (reset)" in done.stdout, done.stdout
    with connect() as sock:
        assert echo(b"after", sock) == b"after"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("-sU -p 7,8,9", {"7/udp open ", "8/udp closed ", "9/udp open|filtered "}),
        # What is neither SYN, ACK nor RST: dropped by a listener, refused elsewhere.
        ("-sX -p 7,8", {"7/tcp open|filtered ", "8/tcp closed "}),
        ("-sN -p 7,8", {"7/tcp open|filtered ", "8/tcp closed "}),
        ("-sF -p 7,8", {"7/tcp open|filtered ", "8/tcp closed "}),
        ("-sA -p 7,8", {"7/tcp unfiltered ", "8/tcp unfiltered "}),
        ("-sM -p 7,8", {"7/tcp closed ", "8/tcp closed "}),
        ("-sO -p 1,6,17,132", {"1 open icmp", "6 open tcp", "17 open udp", "132 closed sctp"}),
        ("-6 -sS -p 7,8", {"7/tcp open ", "8/tcp closed "}),
    ],
)
def test_nmap_sees_what_the_rfcs_say(net: Net, how: str, expected: set[str]) -> None:
    net.serve(net.tap())
    address = OURS6 if "-6" in how else OURS
    command = [find("nmap", "nmap"), "-n", "-Pn", *how.split(), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    lines = {" ".join(line.split()) + " " for line in done.stdout.splitlines()}
    for words in expected:
        assert any(line.startswith(words) for line in lines), done.stdout + done.stderr
    with connect() as sock:
        assert echo(b"after", sock) == b"after"


def test_nmap_guesses_an_os_and_no_number(net: Net) -> None:
    """Sequence numbers cannot be predicted, and IP identifications tell nothing (idle scan)."""
    net.serve(net.tap())
    command = [find("nmap", "nmap"), "-n", "-Pn", "-O", "-v", "-p", "7,8", OURS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "IP ID Sequence Generation: All zeros" in done.stdout, done.stdout
    difficulty = re.search(r"TCP Sequence Prediction: Difficulty=(\d+)", done.stdout)
    assert difficulty, done.stdout
    assert int(difficulty[1]) > 200  # what nmap calls "Good luck!"
    with connect() as sock:
        assert echo(b"after", sock) == b"after"
