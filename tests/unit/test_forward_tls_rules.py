"""Which rule a server name and its protocols lead to."""

from __future__ import annotations

import pytest

from echo_appliance.errors import ParseError
from echo_appliance.forward import config
from echo_appliance.forward.destination import Backend, Balance, Destination
from echo_appliance.forward.target import parse as parse_target

RULES: list[dict[str, object]] = [
    {"server-name": "example.org", "to": "tcp:exact:1"},
    {"server-name": "example.org", "alpn": ["h2", "h3"], "to": "tcp:h2:1"},
    {"server-name": "*.example.org", "to": "tcp:suffix:1"},
    {"server-name": ["*.deep.example.org", "deep"], "to": "tcp:deep:1"},
    {"server-name": "strict.org", "alpn": "h2", "to": "tcp:strict:1"},
]
DEFAULT = {"server-name": "*", "to": "tcp:default:1"}


def find(name: str, *protocols: str, default: bool = True) -> str:
    rules = [*RULES, DEFAULT] if default else RULES
    route = config.parse({"route": {"web": {"tls": rules}}}, {})["web"]
    assert route.tls is not None
    return str(route.tls.find(name, protocols))


@pytest.mark.parametrize(
    ("name", "protocols", "where"),
    [
        ("example.org", (), "tcp:exact:1"),
        ("EXAMPLE.org.", (), "tcp:exact:1"),
        ("example.org", ("http/1.1",), "tcp:exact:1"),
        ("example.org", ("http/1.1", "h2"), "tcp:h2:1"),
        ("a.example.org", ("h2",), "tcp:suffix:1"),
        ("a.b.example.org", (), "tcp:suffix:1"),
        ("a.deep.example.org", (), "tcp:deep:1"),
        ("deep.example.org", (), "tcp:suffix:1"),
        ("deep", (), "tcp:deep:1"),
        ("badexample.org", (), "tcp:default:1"),
        ("", (), "tcp:default:1"),
        ("*", (), "tcp:default:1"),
        ("*.example.org", (), "tcp:suffix:1"),
        ("strict.org", ("h2",), "tcp:strict:1"),
        ("strict.org", (), "tls-no-protocol"),
    ],
)
def test_tls_rule_is_found(name: str, protocols: tuple[str, ...], where: str) -> None:
    assert find(name, *protocols) == where


def test_tls_without_a_default_unknown_names_are_refused() -> None:
    assert find("other.org", default=False) == "tls-name-unknown"
    assert find("", default=False) == "tls-name-unknown"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([DEFAULT, DEFAULT], "two of the kind: a default"),
        ([RULES[0], {**RULES[0], "to": "tcp:b:1"}], "a rule for 'example.org'"),
        ([{"to": "tcp:a:1"}], "server-name"),
        ([{"server-name": "a"}], "and to"),
        ([{"server-name": "a.*", "to": "tcp:a:1"}], "no server name"),
        ([{"server-name": "", "to": "tcp:a:1"}], "no server name"),
        ([{"server-name": "a", "alpn": 1, "to": "tcp:a:1"}], "neither a string"),
        ([], "write each rule"),
    ],
)
def test_tls_rules_that_make_no_sense_are_refused(rules: list[object], words: str) -> None:
    with pytest.raises(ParseError, match=words):
        config.parse({"route": {"web": {"tls": rules}}}, {})


def test_tls_default_besides_a_target_of_the_route_is_refused() -> None:
    with pytest.raises(ParseError, match="default"):
        config.parse({"route": {"web": {"to": "tcp:a:1", "tls": [DEFAULT]}}}, {})


def test_config_values_come_from_the_nearest_table() -> None:
    routes = config.parse(
        {
            "defaults": {"connect-retry": 2, "idle-timeout": 3},
            "route": {
                "a": {"to": "tcp:a:1"},
                "b": {
                    "connect-retry": 4,
                    "tls": [
                        {"server-name": "x", "to": "tcp:x:1"},
                        {"server-name": "y", "to": "tcp:y:1", "connect-retry": 5},
                    ],
                },
            },
        },
        {"connect-retry": 1.0, "connect-timeout": 9.0},
    )
    assert [one.connect_retry for one in routes["a"].destinations()] == [2]
    assert [one.connect_retry for one in routes["b"].destinations()] == [4, 5]
    assert routes["a"].idle_timeout == routes["b"].idle_timeout == 3
    assert routes["a"].destinations()[0].connect_timeout == 9


def order(destination: Destination, now: float) -> list[str]:
    return [backend.target.host for backend in destination.order(now)]


def backends(destination: Destination) -> dict[str, Backend]:
    return {backend.target.host: backend for backend in destination.backends}


def test_destination_first_alive_asks_those_last_that_failed_lately() -> None:
    destination = Destination([parse_target(f"tcp:{host}:1") for host in "abc"])
    backends(destination)["a"].failed(100.0)
    assert order(destination, 105.0) == ["b", "c", "a"]
    assert order(destination, 111.0) == ["a", "b", "c"]
    backends(destination)["b"].failed(111.0)
    backends(destination)["b"].answered(None)
    assert order(destination, 112.0) == ["a", "b", "c"]


def test_destination_round_robin_takes_turns() -> None:
    targets = [parse_target(f"tcp:{host}:1") for host in "abc"]
    destination = Destination(targets, balance=Balance.ROUND_ROBIN)
    assert [order(destination, 0.0)[0] for _ in range(4)] == ["a", "b", "c", "a"]
    backends(destination)["b"].failed(0.0)
    assert order(destination, 1.0) == ["c", "a", "b"]
