"""Any text or octets from outside either mean something or are refused in words."""

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from echo_appliance.errors import ParseError
from echo_appliance.metrics import Registry, render
from echo_appliance.metrics_http import respond
from echo_appliance.original import answer_from
from echo_appliance.target import SCHEMES, Target, parse_target


def parse_or_refuse(text: str) -> Target | str:
    try:
        return parse_target(text)
    except ParseError as error:
        return str(error)


@given(st.one_of(st.text(), st.builds("{}:{}".format, st.sampled_from(SCHEMES), st.text())))
def test_target_any_text_parses_or_is_refused_in_one_line(text: str) -> None:
    target = parse_or_refuse(text)
    if isinstance(target, Target):
        assert target.text == text
        assert target.path or target.host
    else:
        assert "target" in target
        assert "\n" not in target


@given(st.ip_addresses(v=4), st.integers(1, 65535), st.sampled_from(["tcp", "udp"]))
def test_target_any_ipv4_address_parses_back(address: object, port: int, scheme: str) -> None:
    target = parse_target(f"{scheme}:{address}:{port}")
    assert (target.family, target.host, target.port) == (socket.AF_INET, str(address), port)


@given(st.ip_addresses(v=6), st.integers(1, 65535), st.sampled_from(["tcp", "udp"]))
def test_target_any_ipv6_address_parses_back(address: object, port: int, scheme: str) -> None:
    target = parse_target(f"{scheme}:[{address}]:{port}")
    assert (target.family, target.host, target.port) == (socket.AF_INET6, str(address), port)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_target_any_vsock_address_parses_back(cid: int, port: int) -> None:
    target = parse_target(f"vsock:{cid}:{port}")
    assert (target.host, target.port) == (str(cid), port)


@given(st.ip_addresses(v=4), st.integers(0, 65535))
def test_original_any_unicast_inet_destination_is_the_answers_source(
    address: object, port: int
) -> None:
    octets = socket.inet_aton(str(address))
    data = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + octets + bytes(8)
    answer = answer_from([(socket.IPPROTO_IP, 20, data)])
    if 224 <= octets[0] < 240 or octets == b"\xff" * 4:
        assert answer is None
    else:
        assert answer is not None
        ((_, _, pktinfo),) = answer
        assert pktinfo[4:8] == octets


@given(st.binary(max_size=9000))
def test_request_head_of_any_octets_gets_a_complete_response(head: bytes) -> None:
    response = respond(head, Registry())
    status, _, rest = response.partition(b"\r\n")
    assert status.split(b" ")[1] in (b"200", b"400", b"404", b"405")
    fields, _, body = rest.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in fields or head.startswith(b"HEAD ")


@given(st.text(), st.text(min_size=1))
def test_metrics_of_any_name_and_reason_stay_on_one_line_each(name: str, reason: str) -> None:
    registry = Registry()
    registry.counters(name).drop(reason)
    lines = [line for line in render(registry.snapshot()).split("\n") if line]
    for line in lines:
        assert line.startswith(("# ", "echo_appliance_", "process_")), line
    (line,) = (line for line in lines if line.startswith("echo_appliance_dropped"))
    assert line.endswith(" 1")


@given(st.lists(st.tuples(st.sampled_from([0, 1, 41]), st.integers(0, 80), st.binary(max_size=40))))
def test_original_any_control_messages_give_an_answer_or_none(
    ancillary: list[tuple[int, int, bytes]],
) -> None:
    answer = answer_from(ancillary)
    assert answer is None or len(answer) <= 1
