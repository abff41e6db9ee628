"""The metrics page: right numbers for scrapers, right words for everybody else."""

from __future__ import annotations

import socket
import time

import pytest

from tests.process import pages
from tests.process.launcher import Launcher
from tests.process.peers import (
    Sockets,
    assert_silent,
    pattern,
    receive_to_end,
    round_trip,
)


@pytest.fixture
def page_and_echo(launch: Launcher, sockets: Sockets) -> tuple[socket.socket, socket.socket]:
    """The listening sockets of an appliance that has a page: for metrics, and for echo."""
    metrics, server = sockets.listen(), sockets.listen()
    launch.start([metrics, server], names=["metrics", "echo"])
    return metrics, server


def test_metrics_count_right_per_name(launch: Launcher, sockets: Sockets) -> None:
    first, second, metrics = sockets.listen(), sockets.listen(), sockets.listen()
    started = time.time()
    # Names are the user's: anything but a colon.
    launch.start([first, second, metrics], names=["first", 'the "2nd"', "metrics"])
    clients = [sockets.connect(first) for _ in range(3)]
    for client in clients:
        round_trip(client, pattern(100))
    clients[0].close()
    round_trip(sockets.connect(second), pattern(7))
    page = pages.until(metrics, {("connections", "first"): 2})
    of_first = {key[0]: value for key, value in page.items() if key[1:] == ("first",)}
    assert of_first == {
        "connections_total": 3,
        "connections": 2,
        "received_octets_total": 300,
        "sent_octets_total": 300,
        "received_datagrams_total": 0,
        "sent_datagrams_total": 0,
    }
    other = r"the \"2nd\""
    assert page[("connections_total", other)] == 1
    assert page[("sent_octets_total", other)] == 7
    assert abs(page[("process_start_time_seconds",)] - started) < 5
    assert {key[1] for key in page if len(key) > 1} == {"first", other}, "not of itself"


def test_metrics_on_a_unix_socket_are_served(launch: Launcher, sockets: Sockets) -> None:
    metrics, server = sockets.listen(socket.AF_UNIX), sockets.listen()
    launch.start([metrics, server], names=["metrics", "echo"])
    assert pages.scrape(metrics)[("connections_total", "echo")] == 0


def test_metrics_on_several_sockets_are_the_same(launch: Launcher, sockets: Sockets) -> None:
    first, second, server = (sockets.listen() for _ in range(3))
    launch.start([first, second, server], names=["metrics", "metrics", "echo"])
    assert pages.scrape(first) == pages.scrape(second)


def test_metrics_request_in_single_octets_is_understood(
    page_and_echo: tuple[socket.socket, socket.socket], sockets: Sockets
) -> None:
    client = sockets.connect(page_and_echo[0])
    for octet in b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n":
        client.send(bytes([octet]))
    assert receive_to_end(client).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.0\n\n", 200),
        (b"GET /metrics?name=echo HTTP/1.1\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nX-Place: \xc3\x85s, na\xc3\xafve\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/more HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"BREW /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics SPDY/3\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", 400),
        (bytes(range(11, 256)) + b"\r\n\r\n", 400),
    ],
)
def test_metrics_request_gets_its_status(
    page_and_echo: tuple[socket.socket, socket.socket], request_head: bytes, status: int
) -> None:
    line, fields, body = pages.split(pages.ask(page_and_echo[0], request_head))
    assert line.split(" ")[:2] == ["HTTP/1.1", str(status)]
    assert len(body) == int(fields["content-length"]) > 0
    assert fields["connection"] == "close"
    assert (status == 405) == ("allow" in fields)


def test_metrics_head_gives_the_fields_only(
    page_and_echo: tuple[socket.socket, socket.socket],
) -> None:
    line, fields, body = pages.split(pages.ask(page_and_echo[0], b"HEAD /metrics HTTP/1.1\r\n\r\n"))
    assert line == "HTTP/1.1 200 OK"
    assert int(fields["content-length"]) > 100
    assert body == b""


@pytest.mark.parametrize("whole", [True, False], ids=["ends", "never-ends"])
def test_metrics_1_mb_header_is_told_so_and_not_reset(
    page_and_echo: tuple[socket.socket, socket.socket], sockets: Sockets, whole: bool
) -> None:
    client = sockets.connect(page_and_echo[0])
    client.sendall(b"GET /metrics HTTP/1.1\r\nX-Long: " + b"x" * (1 << 20))
    if whole:
        client.sendall(b"\r\n\r\n")
    line, _, body = pages.split(receive_to_end(client))
    assert line == "HTTP/1.1 431 Request Header Fields Too Large"
    assert b"longer than" in body
    round_trip(sockets.connect(page_and_echo[1]))


def test_metrics_client_that_closes_or_half_closes_disturbs_nobody(
    page_and_echo: tuple[socket.socket, socket.socket], sockets: Sockets
) -> None:
    metrics, server = page_and_echo
    for octets in (b"", b"GET", b"GET /metrics HTTP/1.1\r\n\r\n"):
        client = sockets.connect(metrics)
        client.sendall(octets)
        client.close()
    half = sockets.connect(metrics)
    half.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    half.shutdown(socket.SHUT_WR)
    assert receive_to_end(half).startswith(b"HTTP/1.1 200 OK")
    assert pages.scrape(metrics)[("connections_total", "echo")] == 0
    round_trip(sockets.connect(server))


def test_metrics_slow_clients_are_told_so_and_disturb_nobody(
    launch: Launcher, sockets: Sockets
) -> None:
    metrics, server = sockets.listen(), sockets.listen()
    appliance = launch.start([metrics, server], names=["metrics", "echo"])
    # More than the page has places for; half of them say nothing, half say half of it.
    slow = [sockets.connect(metrics) for _ in range(20)]
    for client in slow[::2]:
        client.sendall(b"GET /metrics HTT")
    patient = sockets.connect(metrics)
    patient.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    for _ in range(50):
        round_trip(sockets.connect(server))
    appliance.assert_sleeps()
    assert_silent(patient)
    for client in slow[:16]:
        assert receive_to_end(client).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert receive_to_end(patient).startswith(b"HTTP/1.1 200 OK\r\n")
    round_trip(sockets.connect(server))


def test_metrics_requests_after_the_first_are_dropped(
    page_and_echo: tuple[socket.socket, socket.socket], sockets: Sockets
) -> None:
    client = sockets.connect(page_and_echo[0])
    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" * 100)
    assert receive_to_end(client).count(b"HTTP/1.1 ") == 1
