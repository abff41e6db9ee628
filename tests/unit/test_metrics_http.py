"""Responses to request heads, good and bad, without a socket."""

import pytest

from echo_appliance.metrics import Registry
from echo_appliance.metrics_http import respond


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /metrics HTTP/1.1\nHost: x", b"200 OK"),
        (b"GET /metrics HTTP/1.0", b"200 OK"),
        ("GET /metrics HTTP/1.1\nX-Place: Å".encode(), b"200 OK"),  # has 0x85, NEL in Latin-1
        (b"GET /metrics?a=b HTTP/1.1", b"200 OK"),
        (b"GET / HTTP/1.1", b"404 Not Found"),
        (b"GET /metricsx HTTP/1.1", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1", b"405 Method Not Allowed"),
        (b"", b"400 Bad Request"),
        (b"GET /metrics", b"400 Bad Request"),
        (b"GET /metrics HTTP/2", b"400 Bad Request"),
        (b"\x16\x03\x01\x02\x00", b"400 Bad Request"),
        (b"GET /metrics HTTP/1.1\nno colon here", b"400 Bad Request"),
    ],
)
def test_request_head_gets_this_status(head: bytes, status: bytes) -> None:
    assert respond(head, Registry()).startswith(b"HTTP/1.1 " + status + b"\r\n")


def test_response_length_is_that_of_its_body() -> None:
    registry = Registry()
    registry.counters("naïve").accepted = 1
    head, _, body = respond(b"GET /metrics HTTP/1.1", registry).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert 'name="naïve"' in body.decode()


def test_head_request_gets_the_same_head_and_no_body() -> None:
    registry = Registry()
    head, _, _ = respond(b"GET /metrics HTTP/1.1", registry).partition(b"\r\n\r\n")
    assert respond(b"HEAD /metrics HTTP/1.1", registry) == head + b"\r\n\r\n"
