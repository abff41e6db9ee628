"""Reads the metrics page as a scraper would: HTTP by hand, and a strict parser of its text."""

from __future__ import annotations

import re
import socket

from tests.process.launcher import DEADLINE, eventually
from tests.process.peers import receive_to_end

# Metric, its labels in order -> value
Page = dict[tuple[str, ...], float]

_LABEL = r'[a-z]+="(?:[^"\\\n]|\\["\\n])*"'
_SAMPLE = re.compile(rf"([a-z_]+)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (-?[0-9.]+)")
_COMMENT = re.compile(r"# (HELP|TYPE) ([a-z_]+) (.+)")
_PREFIX = "echo_appliance_"


def ask(server: socket.socket, request: bytes) -> bytes:
    """Send a request as it is; return the whole response."""
    with socket.socket(server.family, socket.SOCK_STREAM) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(server.getsockname())
        sock.sendall(request)
        return receive_to_end(sock)


def split(response: bytes) -> tuple[str, dict[str, str], bytes]:
    """Return status line, header fields by lower-case name, and body."""
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.decode("ascii").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    return status, fields, body


def scrape(server: socket.socket) -> Page:
    """Return the page of this moment.  Fails at anything that is not Prometheus text."""
    status, fields, body = split(ask(server, b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"))
    assert status == "HTTP/1.1 200 OK"
    assert int(fields["content-length"]) == len(body)
    assert fields["content-type"].startswith("text/plain; version=0.0.4")
    return parse(body.decode())


def parse(text: str) -> Page:
    """Return the samples; each must have been declared by a TYPE line."""
    assert text.endswith("\n")
    page: Page = {}
    types: dict[str, str] = {}
    for line in text.splitlines():
        if comment := _COMMENT.fullmatch(line):
            if comment[1] == "TYPE":
                assert comment[2] not in types, f"{comment[2]} is declared twice"
                types[comment[2]] = comment[3]
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample, f"not a sample: {line!r}"
        metric, labels, value = sample.groups()
        assert types[metric] in ("counter", "gauge")
        assert (types[metric] == "counter") == metric.endswith("_total")
        values = re.findall(r'="((?:[^"\\]|\\.)*)"', labels or "")
        key = (metric.removeprefix(_PREFIX), *values)
        assert key not in page, f"{key} occurs twice"
        page[key] = float(value)
    return page


def until(server: socket.socket, wanted: Page) -> Page:
    """Scrape until the page holds all these values; return it."""
    last: Page = {}

    def holds() -> bool:
        last.clear()
        last.update(scrape(server))
        return all(last.get(key) == value for key, value in wanted.items())

    eventually(holds, lambda: f"{wanted} in { {key: last.get(key) for key in wanted} }")
    return last
