"""Segments on their way out: cut by us where the device does not, one frame where it does."""

from __future__ import annotations

import pytest

from echo_appliance.netstack.checksum import is_valid, pseudo_header_sum
from echo_appliance.netstack.neighbours import WAITING_LIMIT
from echo_appliance.netstack.wire import ethernet, icmp, ipv4, tcp
from echo_appliance.netstack.wire.tcp import ACK, FIN, PSH, URG, Segment
from tests.unit.netstack.framed import THEIRS_FIRST, Peer
from tests.unit.netstack.hosts import THEIRS, arp_reply, packet4

DATA = bytes(range(251)) * 40  # no piece is like another
ROOM = {4: 1500 - 20 - 32, 6: 1500 - 40 - 32}


def sent(peer: Peer) -> list[Segment]:
    """Return the segments that left, of frames whose sums are right."""
    segments = []
    for frame in peer.host.sent():
        octets = memoryview(frame)[peer.start :]
        if peer.version == 4:
            assert is_valid(frame[14:34])
            assert int.from_bytes(frame[16:18], "big") == len(frame) - 14
        else:
            assert int.from_bytes(frame[18:20], "big") == len(frame) - 54
        addresses = frame[26:34] if peer.version == 4 else frame[22:54]
        assert is_valid(octets, pseudo_header_sum(addresses, 6, len(octets)))
        segments.append(tcp.parse(octets))
    return segments


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [None, 10_000, 1449])
def test_large_segment_is_cut_into_what_the_link_bears(
    size: int | None, version: int, close: bool
) -> None:
    peer = Peer(version)
    data = DATA[: size or 5 * ROOM[version]]
    peer.connection.write(data)
    if close:
        peer.connection.close()
    peer.receive(peer.frame(peer.segment(b"go")))
    segments = sent(peer)
    assert [len(one.payload) for one in segments[:-1]] == [ROOM[version]] * (len(segments) - 1)
    assert len(segments) == -(-len(data) // ROOM[version])
    at = peer.next
    for one in segments:
        assert (one.seq, one.ack, one.timestamp) == (at, THEIRS_FIRST + 2, segments[0].timestamp)
        at += len(one.payload)
    assert b"".join(bytes(one.payload) for one in segments) == data
    assert {one.flags for one in segments[:-1]} == {ACK}
    assert segments[-1].flags == ACK | PSH | (FIN if close else 0)


def test_number_of_a_piece_wraps_around() -> None:
    peer = Peer()
    sender = peer.connection.sender
    wrap = -sender.una % (1 << 32) + (1 << 32)
    for name in ("iss", "una", "nxt", "urgent"):  # as after so many octets
        setattr(sender, name, getattr(sender, name) + wrap - 2000)
    sender.queue.discard_before(sender.una)
    peer.next = sender.una % (1 << 32)
    peer.connection.write(DATA)
    peer.receive(peer.frame(peer.segment(b"go")))
    segments = sent(peer)
    assert [one.seq for one in segments][:3] == [(1 << 32) - 2000, (1 << 32) - 552, 896]
    assert b"".join(bytes(one.payload) for one in segments) == DATA


@pytest.mark.parametrize("quoted", [0, 3, 6], ids=["first", "middle", "last"])
def test_path_that_narrows_gets_smaller_pieces_of_what_is_under_way(quoted: int) -> None:
    peer = Peer()
    peer.connection.write(DATA)
    peer.receive(peer.frame(peer.segment(b"go")))
    packet = peer.host.sent()[quoted][14:]
    message = icmp.Message(icmp.DESTINATION_UNREACHABLE, icmp.FRAGMENTATION_NEEDED, 1000, packet)
    peer.host.receive(ethernet.IPV4, packet4(ipv4.ICMP, icmp.serialize(message)), 1.0)
    segments = sent(peer)
    assert {len(one.payload) for one in segments[:-1]} == {1000 - 20 - 32}
    assert b"".join(bytes(one.payload) for one in segments) == DATA
    assert [one.seq for one in segments] == list(range(peer.next, peer.next + len(DATA), 948))


def test_piece_that_is_lost_is_sent_again_alone() -> None:
    peer = Peer()
    peer.connection.write(DATA)
    peer.receive(peer.frame(peer.segment(b"go")))
    first = sent(peer)
    una, lost = first[2].seq, first[2]
    for last in first[3:6]:
        answer = peer.segment(seq=THEIRS_FIRST + 2, ack=una)
        answer.sack_blocks = [(first[3].seq, last.seq + len(last.payload))]
        peer.receive(peer.frame(answer), now=1.01)
    [again] = sent(peer)
    assert (again.seq, bytes(again.payload)) == (lost.seq, bytes(lost.payload))


def test_pieces_wait_for_a_neighbour_that_is_not_known() -> None:
    peer = Peer()
    neighbours = peer.host.interface.link.neighbours
    neighbours._drop(neighbours.find(THEIRS, 1.0))
    peer.connection.write(DATA)
    peer.receive(peer.frame(peer.segment(b"go")))
    assert peer.host.sent(ethernet.IPV4) == []
    peer.host.receive(ethernet.ARP, arp_reply(), 1.0)
    segments = sent(peer)
    assert len(segments) == min(WAITING_LIMIT, 7)
    last = segments[-1]
    assert last.seq + len(last.payload) == peer.next + len(DATA)


def offloaded(version: int = 4) -> Peer:
    """Return the peer of a host whose device cuts segments of up to three, and does checksums."""
    peer = Peer(version)
    port = peer.host.port
    port.prefix, port.checksums, port.segment_limit = bytes(10), True, 3 * ROOM[version]
    peer.host.interface.streams._we_cut = False
    peer.connection.sender.set_mss(ROOM[version], port.segment_limit)
    return peer


def handed_over(peer: Peer) -> list[Segment]:
    """Return the segments that left, of frames that tell the device what to do with them."""
    room, segments = ROOM[peer.version], []
    for octets in peer.host.sent():
        prefix, frame = octets[:10], octets[10:]
        size = len(frame) - peer.start - 32
        is_cut = size > room
        assert prefix[0] == 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM
        assert prefix[1] == is_cut * (1 if peer.version == 4 else 4)  # gso_type
        assert int.from_bytes(prefix[4:6], "little") == is_cut * room  # gso_size
        at, before = (16, 14) if peer.version == 4 else (18, 54)
        assert int.from_bytes(frame[at : at + 2], "big") == len(frame) - before
        addresses = frame[26:34] if peer.version == 4 else frame[22:54]
        at = peer.start + tcp.CHECKSUM_OFFSET
        so_far = pseudo_header_sum(addresses, 6, size + 32)
        assert int.from_bytes(frame[at : at + 2], "big") == so_far
        segments.append(tcp.parse(memoryview(frame)[peer.start :]))
    return segments


@pytest.mark.parametrize("version", [4, 6])
def test_device_that_cuts_gets_it_whole(version: int) -> None:
    peer = offloaded(version)
    peer.connection.write(DATA)
    peer.receive(peer.frame(peer.segment(b"go")))
    segments = handed_over(peer)
    assert b"".join(bytes(one.payload) for one in segments) == DATA
    at = peer.next
    for one in segments:
        assert one.seq == at
        at += len(one.payload)


@pytest.mark.parametrize(
    ("octets", "window", "sizes"),
    [
        (9 * ROOM[4], 50000, [3, 3, 3]),  # the last is as large, but ends the data
        (10 * ROOM[4], 5 * ROOM[4], [3, 2]),  # and here the second is smaller, and does not
    ],
)
def test_headers_are_used_again_only_where_they_are_right(
    octets: int, window: int, sizes: list[int]
) -> None:
    peer = offloaded()
    peer.connection.write(bytes(octets))
    peer.receive(peer.frame(peer.segment(b"go", window=window)))
    segments = handed_over(peer)
    assert [len(one.payload) // ROOM[4] for one in segments] == sizes
    ends = sum(sizes) * ROOM[4] == octets
    assert [one.flags for one in segments] == [*[ACK] * (len(sizes) - 1), ACK | PSH * ends]
    assert {one.timestamp for one in segments} == {segments[0].timestamp}


def test_urgent_pointer_of_each_segment_counts_from_its_own_number() -> None:
    peer = Peer()
    peer.connection.write(DATA[:5000], urgent=True)
    peer.connection.write(DATA[5000:])
    peer.receive(peer.frame(peer.segment(b"go")))
    segments = sent(peer)
    urgent = [one for one in segments if one.flags & URG]
    assert [one.seq + one.urgent - peer.next for one in urgent] == [5000] * 4
    assert b"".join(bytes(one.payload) for one in segments) == DATA
