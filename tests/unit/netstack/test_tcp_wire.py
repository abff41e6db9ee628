"""Segments as octets, against vectors that were written down by hand (RFC 9293 section 3.1)."""

import pytest

from echo_appliance.errors import ParseError
from echo_appliance.netstack.tcp.endpoint import Endpoint
from echo_appliance.netstack.wire.tcp import (
    ACK,
    FIN,
    PSH,
    SYN,
    URG,
    Segment,
    flag_letters,
    parse,
    serialize,
)

# 40000 -> 80, seq 1, ack 0, SYN, window 64240, MSS 1460, SACK, timestamps 1:0, NOP, scale 7
SYN_OCTETS = bytes.fromhex(
    "9c40 0050 00000001 00000000 a002 faf0 0000 0000 020405b4 0402 080a 00000001 00000000 01 030307"
)
DATA_OCTETS = bytes.fromhex(
    "0050 9c40 fffffffe 00000002 8018 01f6 1234 0000 0101 080a 00000007 00000003 68656c6c6f"
)


def view(text: str) -> memoryview:
    return memoryview(bytes.fromhex(text))


def with_options(options: str) -> Segment:
    octets = bytes.fromhex(options)
    assert len(octets) % 4 == 0
    offset = (20 + len(octets)) // 4 << 4
    header = bytes.fromhex("9c400050 00000001 00000000") + bytes((offset, SYN)) + bytes(6)
    return parse(memoryview(header + octets))


def test_parse_syn_of_linux() -> None:
    segment = parse(memoryview(SYN_OCTETS))
    assert (segment.source_port, segment.destination_port) == (40000, 80)
    assert (segment.seq, segment.ack, segment.flags, segment.window) == (1, 0, SYN, 64240)
    assert (segment.mss, segment.sack_permitted, segment.window_scale) == (1460, True, 7)
    assert segment.timestamp == (1, 0)
    assert segment.length == 1


def test_parse_data_is_a_view_without_a_copy() -> None:
    octets = memoryview(DATA_OCTETS)
    segment = parse(octets)
    assert (segment.seq, segment.flags, segment.timestamp) == (0xFFFFFFFE, ACK | PSH, (7, 3))
    assert isinstance(segment.payload, memoryview)
    assert segment.payload.obj is octets.obj
    assert bytes(segment.payload) == b"hello"


def test_serialize_data_is_what_was_parsed_but_for_the_checksum() -> None:
    header = serialize(parse(memoryview(DATA_OCTETS)))
    assert header == DATA_OCTETS[:16] + b"\0\0" + DATA_OCTETS[18:32]


def test_serialize_syn_every_option_has_its_length_and_place() -> None:
    syn = Segment(
        1, 2, 3, 0, SYN, 4, mss=1460, window_scale=5, sack_permitted=True, timestamp=(9, 0)
    )
    assert serialize(syn).hex(" ", 4) == (
        "00010002 00000003 00000000 b0020004 00000000 "
        "020405b4 01010402 0101080a 00000009 00000000 01030305"
    )


def test_serialize_sack_blocks_beside_timestamps() -> None:
    segment = Segment(1, 2, 3, 4, ACK, 5, timestamp=(6, 7), sack_blocks=[(8, 9), (10, 11)])
    assert serialize(segment).hex(" ", 4) == (
        "00010002 00000003 00000004 d0100005 00000000 0101080a 00000006 00000007 "
        "01010512 00000008 00000009 0000000a 0000000b"
    )


def test_serialize_options_beyond_forty_octets_are_our_mistake() -> None:
    segment = Segment(1, 2, 3, 4, ACK, 5, timestamp=(6, 7), sack_blocks=[(0, 1)] * 4)
    with pytest.raises(ValueError, match="48 octets of options"):
        serialize(segment)


def test_parse_window_is_unsigned() -> None:
    assert parse(view("0001 0002 00000003 00000004 5010 ffff 0000 0000")).window == 65535


def test_parse_urgent_pointer() -> None:
    segment = parse(view("0001 0002 00000003 00000004 5030 0001 0000 0009"))
    assert (segment.flags, segment.urgent) == (ACK | URG, 9)


def test_parse_reserved_bits_are_ignored() -> None:
    assert parse(view("0001 0002 00000003 00000004 5f10 0001 0000 0000")).flags == ACK
    timed = bytearray(DATA_OCTETS)
    timed[12] |= 0x0F
    assert parse(memoryview(timed)).timestamp == (7, 3)


def test_options_unknown_are_skipped_by_their_length() -> None:
    assert with_options("fd06 deadbeef 020405b4 1e02").mss == 1460


def test_options_unaligned_are_read() -> None:
    assert with_options("01 020405b4 01 0402").mss == 1460


def test_options_end_before_the_header_does() -> None:
    assert with_options("020405b4 00ffffff").mss == 1460


def test_options_are_read_in_any_segment() -> None:
    octets = bytearray(SYN_OCTETS)
    octets[13] = ACK | FIN
    assert parse(memoryview(octets)).mss == 1460


@pytest.mark.parametrize(
    "options",
    ["02000000", "02010000", "02030000", "02ff05b4", "010102ff", "01010102", "0800 0000",
     "0803 0000", "0506 00000000 0000", "0502 0000", "0403 0000"],
)  # fmt: skip
def test_options_that_lie_are_refused(options: str) -> None:
    with pytest.raises(ParseError):
        with_options(options)


@pytest.mark.parametrize("offset", [0x00, 0x40, 0x60, 0xF0])
def test_data_offset_outside_of_the_segment_is_refused(offset: int) -> None:
    octets = bytearray(20)
    octets[12] = offset
    with pytest.raises(ParseError, match="data offset"):
        parse(memoryview(octets))


def test_shorter_than_a_header_is_refused() -> None:
    for size in range(20):
        with pytest.raises(ParseError, match="shorter than a header"):
            parse(memoryview(DATA_OCTETS[:size]))


# The two packets that crash Gotcp.


def test_syn_without_a_timestamp_is_answered() -> None:
    octets = bytes.fromhex("9c40 0050 00000001 00000000 5002 faf0 0000 0000")
    endpoint = Endpoint(bytes(32), lambda *_: (1460, 0))
    endpoint.listen(80, lambda _: None)
    endpoint.receive(b"\x0a\0\0\x02", b"\x0a\0\0\x01", parse(memoryview(octets)), 0.0)
    ((_, (answer,)),) = endpoint.to_send(0.0)
    assert (answer.flags, answer.ack, answer.timestamp) == (SYN | ACK, 2, None)


def test_option_truncated_is_refused() -> None:
    octets = bytes.fromhex("9c40 0050 00000001 00000000 6002 faf0 0000 0000 0101 080a")
    with pytest.raises(ParseError, match="runs past the header"):
        parse(memoryview(octets))


def test_text_is_what_tcpdump_users_expect() -> None:
    assert str(parse(memoryview(SYN_OCTETS))) == (
        "Flags [S], seq 1, win 64240, options [mss 1460,sackOK,TS val 1 ecr 0,wscale 7], length 0"
    )
    assert str(parse(memoryview(DATA_OCTETS))) == (
        "Flags [P.], seq 4294967294:3, ack 2, win 502, options [TS val 7 ecr 3], length 5"
    )
    assert flag_letters(0) == "none"


def test_length_counts_syn_and_fin() -> None:
    assert Segment(1, 2, 0, 0, SYN | FIN, 0, b"abc").length == 5
