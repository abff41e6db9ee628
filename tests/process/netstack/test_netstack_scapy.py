"""Frames by scapy, which knows the formats by itself: fuzzed ones in, and ours taken apart."""

from __future__ import annotations

import logging
import random
import select

import pytest

from tests.process.netstack.net import OURS, OURS6, PORT, Net, metrics
from tests.process.netstack.test_netstack_hostile import (
    OUR_MAC,
    THEIR_MAC,
    THEIRS,
    THEIRS6,
    Link,
    arp_announcement,
)

logging.getLogger("scapy").setLevel(logging.ERROR)  # it looks for routes, which are not needed

from scapy.layers.inet import ICMP, IP, TCP, UDP  # noqa: E402
from scapy.layers.inet6 import (  # noqa: E402
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Ether  # noqa: E402
from scapy.packet import Packet, Raw, fuzz  # noqa: E402

ROUNDS = 700


@pytest.fixture
def link(net: Net) -> Link:
    return Link(net)


def text(address: bytes) -> str:
    return address.hex(":")


def fuzzed() -> list[Packet]:
    """Return one frame of each kind: what is not said here is anything, each time it is built.

    Checksums and lengths are right, but where they are fuzzed themselves.
    """
    four, six = IP(src=THEIRS, dst=OURS), IPv6(src=THEIRS6, dst=OURS6, hlim=255)
    six_inner = IPv6(src=OURS6, dst=THEIRS6)
    return [
        Ether() / packet
        for packet in (
            fuzz(ARP(hwtype=1, ptype=0x0800, hwlen=6, plen=4, pdst=OURS)),
            fuzz(IP(src=THEIRS, dst=OURS)) / TCP(dport=PORT, flags="S"),
            four / fuzz(TCP(dport=PORT, sport=40100)),
            four / fuzz(TCP(dport=PORT, sport=40100, chksum=None, dataofs=None)) / Raw(b"x" * 9),
            four / fuzz(TCP(dport=PORT, sport=40100, flags="S", chksum=None, dataofs=None)),
            four / fuzz(UDP(dport=PORT)) / Raw(b"x"),
            four / fuzz(ICMP()),
            four / fuzz(ICMP(type=3, chksum=None)) / fuzz(IP(src=OURS, dst=THEIRS)) / fuzz(TCP()),
            IP(src=THEIRS, dst=OURS, id=9, flags="MF") / fuzz(UDP(dport=PORT)) / Raw(b"x" * 16),
            fuzz(IPv6(src=THEIRS6, dst=OURS6)) / TCP(dport=PORT, flags="S"),
            six / fuzz(TCP(dport=PORT, sport=40100, chksum=None, dataofs=None)),
            six / fuzz(ICMPv6EchoRequest(cksum=None)),
            six / fuzz(ICMPv6ND_NS(cksum=None, tgt=OURS6)) / fuzz(ICMPv6NDOptSrcLLAddr()),
            six / fuzz(ICMPv6ND_NA(cksum=None)) / fuzz(ICMPv6NDOptDstLLAddr()),
            six / fuzz(ICMPv6PacketTooBig(cksum=None)) / six_inner / fuzz(TCP(sport=PORT)),
            six / fuzz(IPv6ExtHdrDestOpt()) / TCP(dport=PORT, flags="S"),
            six / fuzz(IPv6ExtHdrHopByHop()) / TCP(dport=PORT, flags="S"),
            six / fuzz(IPv6ExtHdrRouting()) / TCP(dport=PORT, flags="S"),
            six / fuzz(IPv6ExtHdrFragment(nh=17)) / Raw(b"x" * 64),
        )
    ]


@pytest.mark.timeout(300)
def test_fuzzed_frames_of_every_kind_harm_nothing(link: Link) -> None:
    random.seed(20480)
    kinds = fuzzed()
    for frame in kinds:
        frame.dst, frame.src = text(OUR_MAC), text(THEIR_MAC)
    before = 0
    for count in range(ROUNDS):
        for frame in kinds:
            link.send(bytes(frame))
        if count == ROUNDS // 4:
            before = link.server.rss
    link.send(arp_announcement())
    assert link.is_alive()
    assert link.server.rss - before < 8 << 20, "it grew"
    seen = metrics(link.page.getsockname())
    assert seen["received_frames_total"] >= ROUNDS * len(kinds)
    dropped = {name for name in seen if name.startswith("dropped_frames_total:")}
    assert len(dropped) > 12, dropped  # it was looked into


def exchanged(link: Link, frame: Packet) -> list[Packet]:
    """Return what the stack answers to a frame."""
    frame.dst, frame.src = text(OUR_MAC), text(THEIR_MAC)
    link.drain()
    link.socket.send(bytes(frame))
    out = []
    while select.select([link.socket], [], [], 0.2)[0]:
        out.append(Ether(link.socket.recv(65536)))
    return out


def test_answers_are_what_scapy_would_have_built(link: Link) -> None:
    """Taken apart, and built again with all that it works out by itself: the same octets."""
    ends, ends6 = {"src": THEIRS, "dst": OURS}, {"src": THEIRS6, "dst": OURS6}
    questions = [
        Ether() / ARP(op=1, hwsrc=text(THEIR_MAC), psrc=THEIRS, pdst=OURS),
        Ether() / IP(**ends) / ICMP(id=1, seq=2) / Raw(b"question"),
        Ether() / IP(**ends) / UDP(sport=4000, dport=4321) / Raw(b"closed"),
        Ether() / IP(**ends) / TCP(sport=4000, dport=PORT, flags="S", seq=7,
                                   options=[("MSS", 1460), ("SAckOK", b""), ("Timestamp", (7, 0)),
                                            ("NOP", None), ("WScale", 7)]),
        Ether() / IP(**ends) / TCP(sport=4000, dport=4321, flags="S"),
        Ether() / IPv6(**ends6, hlim=255) / ICMPv6ND_NS(tgt=OURS6)
        / ICMPv6NDOptSrcLLAddr(lladdr=text(THEIR_MAC)),
        Ether() / IPv6(**ends6) / ICMPv6EchoRequest(id=1, seq=2, data=b"question"),
        Ether() / IPv6(**ends6) / TCP(sport=4000, dport=PORT, flags="S"),
    ]  # fmt: skip
    for question in questions:
        answers = exchanged(link, question)
        assert answers, question.summary()
        for answer in answers:
            again = answer.copy()
            for layer in (IP, IPv6, TCP, UDP, ICMP):
                for name in ("chksum", "cksum", "len", "plen", "ihl", "dataofs"):
                    if layer in again and name in again[layer].fields:
                        delattr(again[layer], name)
            assert bytes(again) == bytes(answer), answer.show(dump=True)
