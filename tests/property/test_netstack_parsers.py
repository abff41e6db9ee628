"""Whatever a frame holds, it means something or is dropped for a reason; nothing else happens."""

import random
import string
import struct
from collections.abc import Callable
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from echo_appliance.errors import ParseError
from echo_appliance.netstack.addresses import format_ip, parse_ip, parse_network
from echo_appliance.netstack.checksum import checksum, is_valid, partial_sum, pseudo_header_sum
from echo_appliance.netstack.describe import describe
from echo_appliance.netstack.fragments import Reassembly
from echo_appliance.netstack.wire import arp, ethernet, icmp, icmpv6, ipv4, ipv6, udp
from tests.unit.netstack.hosts import Host

REASON = set(string.ascii_lowercase + string.digits + "- :,")

hardware = st.binary(min_size=6, max_size=6).map(
    lambda octets: bytes([octets[0] & 0xFE]) + octets[1:]
)
four = st.binary(min_size=4, max_size=4)
sixteen = st.binary(min_size=16, max_size=16)
payloads = st.binary(max_size=200)


def refusal(call: Callable[[], object]) -> str:
    """Return what a ParseError says; nothing when there is none."""
    try:
        call()
    except ParseError as error:
        return str(error)
    return ""


def rfc1071(octets: bytes) -> int:
    """Sum 16-bit words with end-around carry, as the RFC's section 4.1 writes it down in C."""
    octets += b"\0" * (len(octets) % 2)
    total = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(total)


# -- checksum ----------------------------------------------------------------


@given(payloads)
def test_checksum_of_any_octets_is_the_rfcs(octets: bytes) -> None:
    assert partial_sum(octets) == rfc1071(octets) % 0xFFFF
    if any(octets):  # all zero is the one case where the two zeros of the arithmetic differ
        assert checksum(octets) == rfc1071(octets) ^ 0xFFFF


@given(
    st.randoms(use_true_random=False),
    st.integers(0, 4000) | st.integers(8000, 65535),
    st.sampled_from([0, 1, 0xFF, None]),
)
def test_checksum_of_long_octets_is_the_rfcs(
    chance: random.Random, size: int, fill: int | None
) -> None:
    """What is long is summed another way: numbers of digits that are all ones carry the most."""
    octets = bytes((fill,)) * size if fill is not None else chance.randbytes(size)
    assert partial_sum(octets) == rfc1071(octets) % 0xFFFF


@given(st.binary(max_size=100).filter(lambda octets: len(octets) % 2 == 0), payloads)
def test_checksum_of_parts_is_that_of_the_whole(first: bytes, second: bytes) -> None:
    assert checksum(second, partial_sum(first)) == checksum(first + second)
    whole = first + checksum(first + second).to_bytes(2, "big") + second
    assert is_valid(whole)


def test_checksum_of_the_rfcs_example() -> None:
    assert partial_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


# -- any octets --------------------------------------------------------------


@given(st.binary(max_size=120))
def test_parsers_any_octets_parse_or_are_refused(octets: bytes) -> None:
    view = memoryview(octets)
    for parse in (
        ethernet.parse, arp.parse, ipv4.parse, ipv6.parse, icmp.parse,
        lambda view: udp.parse(view, bytes(8)), lambda view: udp.parse(view, bytes(32)),
        lambda view: icmpv6.parse_neighbour(icmp.Message(135, 0, 0, view)),
    ):  # fmt: skip
        assert set(refusal(partial(parse, view))) <= REASON


@given(st.binary(max_size=200), st.sampled_from([0x0800, 0x0806, 0x86DD, 0x88CC]))
def test_describe_any_frame_is_one_line(octets: bytes, ethertype: int) -> None:
    for frame in (octets, octets[:12] + ethertype.to_bytes(2, "big") + octets[12:]):
        assert "\n" not in describe(memoryview(frame))


@given(st.lists(st.binary(max_size=150), max_size=4), st.sampled_from([0x0800, 0x0806, 0x86DD]))
def test_interface_any_frame_for_us_raises_nothing(rests: list[bytes], ethertype: int) -> None:
    host = Host()
    for number, rest in enumerate(rests):
        frame = ethernet.serialize_header(host.hardware, b"\x02\0\0\0\0\x09", ethertype) + rest
        host.interface.receive(memoryview(frame), float(number))
        host.interface.flush(float(number))
    host.interface.on_deadline(100.0)


# -- round trips -------------------------------------------------------------


@given(hardware, hardware, st.integers(0, 0xFFFF), payloads)
def test_ethernet_any_frame_parses_back(to: bytes, of: bytes, kind: int, payload: bytes) -> None:
    frame = ethernet.parse(memoryview(ethernet.serialize_header(to, of, kind) + payload))
    assert (frame.destination, frame.source, frame.ethertype) == (to, of, kind)
    assert frame.payload == payload
    if any(to):
        assert ethernet.parse_address(ethernet.format_address(to)) == to


@given(st.sampled_from([arp.REQUEST, arp.REPLY]), hardware, four, hardware, four, payloads)
def test_arp_any_message_parses_back(
    operation: int, sender: bytes, own: bytes, target: bytes, address: bytes, padding: bytes
) -> None:
    octets = arp.serialize(arp.Message(operation, sender, own, target, address))
    message = arp.parse(memoryview(octets + padding))
    assert arp.serialize(message) == octets
    assert (message.operation, message.sender_protocol) == (operation, own)


@given(four, four, st.integers(0, 255), st.integers(0, 255), st.integers(0, 0x3FFF), payloads)
def test_ipv4_any_packet_parses_back_without_padding(
    source: bytes, destination: bytes, protocol: int, ttl: int, offset: int, payload: bytes
) -> None:
    packet = ipv4.Packet(
        source, destination, protocol, memoryview(payload), ttl=ttl, identification=7,
        flags_and_offset=offset,
    )  # fmt: skip
    head = ipv4.serialize_header(packet, len(payload))
    parsed = ipv4.parse(memoryview(head + payload + b"padding"))
    assert ipv4.serialize_header(parsed, len(parsed.payload)) == head
    assert parsed.payload == payload
    assert parsed.addresses == source + destination


@given(sixteen, sixteen, st.sampled_from([6, 17, 58, 59, 200]), payloads)
def test_ipv6_any_packet_parses_back(
    source: bytes, destination: bytes, protocol: int, payload: bytes
) -> None:
    packet = ipv6.Packet(source, destination, protocol, memoryview(payload), hop_limit=9)
    head = ipv6.serialize_header(packet, len(payload))
    parsed = ipv6.parse(memoryview(head + payload + b"padding"))
    assert ipv6.serialize_header(parsed, len(payload)) == head
    assert (bytes(parsed.payload), parsed.protocol, parsed.hop_limit) == (payload, protocol, 9)


@given(st.lists(st.sampled_from([0, 43, 60]), max_size=9), payloads)
def test_ipv6_extension_headers_are_skipped_or_refused(kinds: list[int], payload: bytes) -> None:
    chain = b""
    for position in range(len(kinds)):
        following = (*kinds[position + 1 :], 17)[0]
        chain += bytes((following, 0)) + bytes(6)
    packet = ipv6.Packet(bytes(16), bytes(16), (*kinds, 17)[0], memoryview(b""))
    octets = ipv6.serialize_header(packet, len(chain + payload)) + chain + payload
    try:
        parsed = ipv6.parse(memoryview(octets))
    except ParseError:
        assert 0 in kinds[1:] or len(kinds) >= 8
    else:
        assert (parsed.protocol, bytes(parsed.payload)) == (17, payload)


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**32 - 1), payloads)
def test_icmp_any_message_parses_back(kind: int, code: int, rest: int, payload: bytes) -> None:
    for so_far in (0, 12345):
        octets = icmp.serialize(icmp.Message(kind, code, rest, payload), so_far)
        message = icmp.parse(memoryview(octets), so_far)
        assert (message.type, message.code, message.rest) == (kind, code, rest)
        assert message.payload == payload


@given(sixteen, st.none() | hardware, st.booleans(), st.booleans(), st.booleans())
def test_neighbour_any_message_parses_back(
    target: bytes, address: bytes | None, asks: bool, solicited: bool, override: bool
) -> None:
    target = b"\x20" + target[1:]
    neighbour = icmpv6.Neighbour(
        target, address, is_solicitation=asks, solicited=solicited, override=override
    )
    parsed = icmpv6.parse_neighbour(icmpv6.serialize_neighbour(neighbour))
    for name in icmpv6.Neighbour.__slots__:
        assert getattr(parsed, name) == getattr(neighbour, name)


@given(st.integers(0, 65535), st.integers(0, 65535), payloads, st.one_of(four, sixteen))
def test_udp_any_datagram_parses_back(one: int, other: int, payload: bytes, address: bytes) -> None:
    octets = udp.serialize(udp.Datagram(one, other, payload), address + address)
    datagram = udp.parse(memoryview(octets + b"padding"), address + address)
    assert (datagram.source_port, datagram.destination_port) == (one, other)
    assert datagram.payload == payload
    assert octets[6:8] != b"\0\0"  # which would say that there is no checksum


@given(st.ip_addresses(), st.integers(1, 32))
def test_address_any_text_parses_back(address: object, length: int) -> None:
    octets = parse_ip(str(address))
    assert parse_ip(format_ip(octets)) == octets
    words = refusal(lambda: parse_network(f"{address}/{length}"))
    if not words:
        network = parse_network(f"{address}/{length}")
        assert octets in network
        assert network.length == length


@given(st.text())
def test_address_any_text_is_an_address_or_refused_in_a_line(text: str) -> None:
    assert "\n" not in refusal(lambda: parse_network(text))


def test_pseudo_header_sum_is_that_of_its_octets() -> None:
    addresses = bytes(range(1, 9))
    octets = addresses + bytes((0, 17)) + (300).to_bytes(2, "big")
    assert pseudo_header_sum(addresses, 17, 300) == rfc1071(octets) % 0xFFFF


# -- fragments ---------------------------------------------------------------


@given(st.binary(min_size=1, max_size=500), st.integers(1, 12), st.randoms(use_true_random=False))
def test_fragments_in_any_order_and_repeated_become_the_whole(
    payload: bytes, eighths: int, chance: object
) -> None:
    size = eighths * 8
    cuts = [(at, payload[at : at + size]) for at in range(0, len(payload), size)]
    pieces = [cuts[index % len(cuts)] for index in range(len(cuts) * 2)]
    chance.shuffle(pieces)  # type: ignore[attr-defined]
    room, found = Reassembly(), None
    for offset, part in pieces:
        more = offset + size < len(payload)
        whole = room.add("key", offset, memoryview(part), 0.0, more_follow=more)
        if whole is not None:
            found = whole
            break
    assert found == payload
    assert (len(room), room.octets) == (0, 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 8191), st.binary(max_size=64), st.booleans()),
        max_size=60,
    )
)
def test_fragments_of_any_kind_stay_within_bounds(
    pieces: list[tuple[int, int, bytes, bool]],
) -> None:
    room = Reassembly()
    for key, offset, part, more in pieces:
        add = partial(room.add, key, offset * 8, memoryview(part), 0.0, more_follow=more)
        words = refusal(add)
        assert not words or words.startswith("fragment-")
    assert room.octets <= sum(len(part) for _, _, part, _ in pieces)
    assert len(room) <= 4
    room.expire(1e9)
    assert (len(room), room.octets) == (0, 0)
