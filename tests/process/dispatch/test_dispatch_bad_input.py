"""Bad input: one line that says what is wrong, and nothing is changed."""

from __future__ import annotations

import pytest

from tests.process.dispatch.space import Space

LONG = "1" * 5000  # more digits than int() takes

BAD = [
    (["bind", "web", "tcp", "127.1.0.0/33", "80"], "the prefix length must be 0 to 32"),
    (["bind", "web", "tcp", "localhost", "80"], "'localhost' is not an IPv4 or IPv6 address"),
    (["bind", "web", "tcp", "127.1.0.0/16", "65536"], "is not a port"),
    (["bind", "web", "tcp", "127.1.0.0/16", "2000-1000"], "the first is above the last"),
    (["bind", "web", "sctp", "127.1.0.0/16", "80"], "'sctp' is not a protocol"),
    (["bind", "", "tcp", "127.1.0.0/16", "80"], "a label must not be empty"),
    (["bind", "x" * 64, "tcp", "127.1.0.0/16", "80"], "64 octets, at most 63 fit"),
    (["bind", "a b", "tcp", "127.1.0.0/16", "80"], "spaces"),
    (["bind", "web", "tcp", "::ffff:1.2.3.4", "80"], "IPv4-mapped"),
    (["bind", "web", "tcp", "127.1.0.0/16"], "3 arguments given, 4 wanted"),
    (["bind", "--on-miss", "deny", "web", "tcp", "::1", "80"], "not one of drop, pass"),
    (["unbind", "web", "tcp", "127.1.0.0/16", "80"], "is not bound"),
    (["unbind", "other", "tcp", "127.8.0.0/16", "80"], "is not bound"),
    (["bind", "other", "tcp", "127.8.0.0/16", "80"], "contradicts first#tcp:[127.8.0.0/16]:80"),
    (["unregister", "web", "ipv4", "tcp"], "web has no ipv4 tcp socket"),
    (["load"], "a dispatcher is loaded"),
    (["load-bindings", "/nowhere"], "/nowhere: No such file"),
    (["register-pid", "0", "web", "tcp", "127.0.0.1", "80"], "process 0"),
    (["register-pid", "9" * 20, "web", "tcp", "127.0.0.1", "80"], "is not a process id"),
    (["register-pid", "4294967296", "web", "tcp", "127.0.0.1", "80"], "is not a process id"),
    (["register-pid", LONG, "web", "tcp", "127.0.0.1", "80"], "is not a process id"),
    (["register-pid", "/dev/urandom", "web", "tcp", "127.0.0.1", "80"], "is not a process id"),
    (["bind", "web", "tcp", f"127.1.0.0/{LONG}", "80"], "the prefix length must be 0 to 32"),
    (["bind", "web", "tcp", "127.1.0.0/16", LONG], "is not a port"),
    (["bind", "web\udcff", "tcp", "127.1.0.0/16", "80"], "unprintable"),
    (["explain", "tcp", "127.1.0.1", "80-90"], "a packet has one"),
    (["explain", "--source", "127.0.0.1", "tcp", "127.1.0.1", "80"], "write ADDRESS,PORT"),
    (["load", "--capacity", "4294967296"], "4294967296 keys are too many"),
    (["load", "--group", "99999999999"], "there is no group '99999999999'"),
    (["register"], "a service with Sockets="),
    (["run"], "give --config FILE"),
    (["metrics", "127.0.0.1", "8080"], "pass the sidecar a socket named metrics"),
    (["frobnicate"], "'frobnicate' is not a dispatch command"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "complaint"), BAD, ids=lambda one: str(one)[:40])
def test_bad_input_is_one_line_and_changes_nothing(
    space: Space, words: list[str], complaint: str
) -> None:
    space.ok("bind", "first", "tcp", "127.8.0.0/16", "80")
    before = space.ok("status", "--json").json
    assert complaint in space.fails(*words)
    assert space.ok("status", "--json").json == before


BROKEN = [
    ('{"bindings": [\n {"label" 1}]}', "line 2, column 11"),
    ("[[bindings]]\nlabel = = 1", "line 2, column 9"),
    ('{"bindings": [{"label": "a"}]}', "bindings[0]: prefix is missing"),
    ('{"bindings": [{"prefix": "::/0"}]}', "bindings[0]: label is missing"),
    ('{"bindings": [{"label": "a", "prefix": "::/0", "prot": 1}]}', "unknown key 'prot'"),
    ('{"bindings": [{"label": "a", "prefix": "1.2.3.4/33"}]}', "prefix length must be 0 to 32"),
    ('{"bindings": [{"label": "a", "prefix": 7}]}', "prefix must be a string"),
    ('{"bindings": [{"label": "a", "prefix": "::/0", "port": true}]}', "port True"),
    ('{"bindings": [{"label": "a", "prefix": "::/0", "port": "9-8"}]}', "above the last"),
    ('{"bindings": [{"label": "a", "prefix": "::/0", "port": []}]}', "bindings[0]"),
    ('{"bindings": [{"label": "a", "prefix": "::/0", "on-miss": 1}]}', "use drop or pass"),
    ('{"bindings": [7]}', "bindings[0]: 7 is not a table"),
    ('{"bindings": {}}', "no list of bindings"),
    ('{"bindings": [], "extra": 1}', "unknown key 'extra'"),
    ('{"bindings": [{"label": "a", "prefix": "::/0", "port": ' + LONG + "}]}", "of digits"),
    ('[[bindings]]\nlabel = "a"\nprefix = "::/0"\nport = ' + LONG, "of digits"),
    ('{"bindings": [{"label": "a", "prefix": "::/' + LONG + '"}]}', "length must be 0 to 128"),
    (r'{"bindings": [{"label": "\ud800", "prefix": "::/0"}]}', "unprintable"),
    (r'{"bindings": [{"label": "a", "prefix": "1.2.3.4\u0000"}]}', "is not an IPv4 or IPv6"),
    ("", "no list of bindings"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "complaint"), BROKEN, ids=lambda one: str(one)[:40])
def test_a_broken_file_is_one_line_and_changes_nothing(
    space: Space, text: str, complaint: str
) -> None:
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "80")
    before = space.ok("bindings", "--json").json
    assert complaint in space.fails("load-bindings", "-", stdin=text)
    assert space.ok("bindings", "--json").json == before
