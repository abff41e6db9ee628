"""Whom a host believes about who is where: RFC 4861 section 7, RFC 5227, RFC 6980."""

from __future__ import annotations

import pytest

from echo_appliance.netstack import neighbours
from echo_appliance.netstack.neighbours import (
    ENTRIES_LIMIT,
    RETRY_SECONDS,
    TRIES,
    WAITING_IN_ALL,
    Neighbour,
    Neighbours,
    State,
)
from echo_appliance.netstack.wire import arp, ethernet, icmp, icmpv6, ipv4, ipv6
from tests.unit.netstack.hosts import (
    OUR_MAC,
    OURS,
    OURS6,
    THEIR_MAC,
    THEIRS,
    THEIRS6,
    Host,
    arp_reply,
    arp_request,
    icmp6,
    packet4,
    packet6,
    solicitation,
)

ANOTHER_MAC = b"\x02\0\0\0\0\x66"


@pytest.fixture
def host() -> Host:
    """A host whose neighbour has answered."""
    host = Host()
    host.meet()
    return host


def ping() -> bytes:
    return icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 1, b""))


def advertisement(hardware: bytes, *, solicited: bool = False, override: bool = False) -> bytes:
    """Return what somebody says of THEIRS6."""
    said = icmpv6.Neighbour(
        THEIRS6, hardware, is_solicitation=False, solicited=solicited, override=override
    )
    return icmp6(icmpv6.serialize_neighbour(said))


def hardware_of(host: Host, address: bytes, now: float = 0.0) -> bytes | None:
    return host.interface.link.neighbours.find(address, now).hardware


# -- who may change an entry -------------------------------------------------


@pytest.mark.parametrize("solicited", [True, False])
def test_advertisement_without_override_moves_nobody(host: Host, solicited: bool) -> None:
    """RFC 4861 section 7.2.5: it only makes us ask again."""
    host.receive(ethernet.IPV6, advertisement(ANOTHER_MAC, solicited=solicited))
    assert hardware_of(host, THEIRS6) == THEIR_MAC


def test_advertisement_with_override_moves_a_neighbour(host: Host) -> None:
    host.receive(ethernet.IPV6, advertisement(ANOTHER_MAC, override=True))
    assert hardware_of(host, THEIRS6) == ANOTHER_MAC


def test_advertisement_without_override_answers_a_question() -> None:
    host = Host()
    host.interface.link.neighbours.find(THEIRS6, 0.0)
    host.receive(ethernet.IPV6, advertisement(ANOTHER_MAC, solicited=True))
    assert hardware_of(host, THEIRS6) == ANOTHER_MAC


@pytest.mark.parametrize("family", [4, 6])
def test_word_that_nobody_asked_for_is_used_but_asked_about_soon(family: int) -> None:
    """It confirms nothing: who forged it does not answer, so it is gone after a few seconds."""
    host = Host()
    if family == 4:
        host.receive(ethernet.ARP, arp_request(), to=ethernet.BROADCAST)
        host.sent()
        host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    else:
        host.receive(ethernet.IPV6, solicitation())
        host.sent()
        host.receive(ethernet.IPV6, icmp6(icmp.Message(icmpv6.ECHO_REQUEST, 0, 1, b"")))
    assert len(host.sent()) == 1  # the answer, at once
    asked = 0
    while (deadline := host.interface.deadline()) is not None:
        host.interface.on_deadline(deadline)
        asked += len(host.sent())
    assert (asked, len(host.interface.link.neighbours)) == (TRIES, 0)


def test_word_that_nobody_asked_for_stays_once_it_is_confirmed() -> None:
    host = Host()
    host.receive(ethernet.ARP, arp_request(), to=ethernet.BROADCAST)
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    host.sent()
    deadline = host.interface.deadline()
    assert deadline is not None
    host.interface.on_deadline(deadline)
    [question] = host.sent(ethernet.ARP)
    assert arp.parse(memoryview(question)).operation == arp.REQUEST
    host.receive(ethernet.ARP, arp_reply(), deadline)
    assert host.interface.deadline() is None
    assert hardware_of(host, THEIRS, deadline) == THEIR_MAC


def test_answer_to_no_question_of_ours_confirms_nothing(host: Host) -> None:
    """A flag says that it is one, and anyone can set it."""
    host.receive(ethernet.ARP, arp_reply(hardware=ANOTHER_MAC))
    host.receive(ethernet.IPV6, advertisement(ANOTHER_MAC, solicited=True, override=True))
    assert {one.state for one in host.interface.link.neighbours} == {State.STALE}


# -- what a flood does to others ---------------------------------------------


def test_flood_of_forged_sources_does_not_push_out_who_has_answered(host: Host) -> None:
    """Each forged source on the link makes us look for it; those who are there stay known."""
    for number in range(2 * ENTRIES_LIMIT):
        source = b"\xc0\0\2" + bytes((number % 200 + 10,))
        source6 = THEIRS6[:12] + (number + 100).to_bytes(4, "big")
        host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping(), source=source))
        echo6 = icmp.Message(icmpv6.ECHO_REQUEST, 0, 1, b"")
        host.receive(ethernet.IPV6, icmp6(echo6, source=source6))
    assert len(host.interface.link.neighbours) <= ENTRIES_LIMIT
    host.sent()
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    [answer] = host.sent()
    assert answer[:6] == THEIR_MAC


def test_flood_of_forged_sources_does_not_keep_us_from_asking_who_has_answered(
    host: Host,
) -> None:
    """Questions for strangers are limited; those for who is known have no part in that."""
    now = 31.0
    for number in range(1000):
        source6 = THEIRS6[:12] + (number + 100).to_bytes(4, "big")
        echo6 = icmp.Message(icmpv6.ECHO_REQUEST, 0, 1, b"")
        host.receive(ethernet.IPV6, icmp6(echo6, source=source6), now)
    host.sent()
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()), now)
    assert [frame[:6] for frame in host.sent() if frame[12:14] == b"\x08\x06"] == [THEIR_MAC]


def test_packets_for_whom_the_last_question_was_in_vain_leave_others_room_to_wait() -> None:
    """They come when its time is over and no timer has told us: what waited was never counted off.

    After 512 of them, no packet waited any more for anybody to be found.
    """
    host, now = Host(), 0.0
    stranger = b"\xc0\0\2\x63"
    for _ in range(2 * WAITING_IN_ALL + 1):
        host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping(), source=stranger), now)
        for _ in range(TRIES - 1):
            now += RETRY_SECONDS
            host.interface.on_deadline(now)
        now += RETRY_SECONDS
    host.sent()
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()), now)
    host.receive(ethernet.ARP, arp_reply(), now)
    assert len(host.sent(ethernet.IPV4)) == 1


def test_packet_for_whom_the_last_question_was_in_vain_begins_anew() -> None:
    host = Host()
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    for now in range(1, TRIES):
        host.interface.on_deadline(float(now))
    host.sent()
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()), float(TRIES))
    assert len(host.sent(ethernet.ARP)) == 1, "asked for"
    host.receive(ethernet.ARP, arp_reply(), float(TRIES))
    assert len(host.sent(ethernet.IPV4)) == 1, "the second one; the first is given up"


class Watched(Neighbour):
    """An entry that counts how often entries are looked at."""

    looks = 0

    def __getattribute__(self, name: str) -> object:
        Watched.looks += 1
        return super().__getattribute__(name)


def test_flood_of_forged_sources_costs_other_frames_no_look_at_each_of_them(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When to ask again is asked after each batch of frames: 45 us with 1,024 who never answer."""
    monkeypatch.setattr(neighbours, "Neighbour", Watched)
    for number in range(ENTRIES_LIMIT - 2):
        host.interface.link.neighbours.find(number.to_bytes(4, "big"), 0.0)
    host.interface.on_deadline(0.0)
    Watched.looks = 0
    for number in range(100):
        stranger = THEIRS6[:12] + (number + 100).to_bytes(4, "big")
        echo6 = icmp.Message(icmpv6.ECHO_REQUEST, 0, 1, b"")
        host.receive(ethernet.IPV6, icmp6(echo6, source=stranger), 0.5)
        assert host.interface.deadline() is not None
        host.interface.on_deadline(0.5)  # a connection's time has come, say
    assert Watched.looks < 100 * 50


def test_neighbour_is_asked_again_in_time_though_another_is_to_be_asked_later() -> None:
    entries = Neighbours()
    entries.is_to_be_asked(entries.find(THEIRS, 0.0), 0.0)
    entries.heard(OURS, THEIR_MAC, 0.0, solicited=False, create=True)
    entries.find(OURS, 0.0)
    assert entries.deadline() == RETRY_SECONDS


def test_neighbour_that_answers_the_last_question_is_not_given_up_later() -> None:
    entries = Neighbours()
    entry = entries.find(THEIRS, 0.0)
    for now in range(TRIES):
        assert entries.is_to_be_asked(entry, float(now))
    entries.heard(THEIRS, THEIR_MAC, float(TRIES), solicited=True)
    assert entries.find(THEIRS, 2.0 * TRIES) is entry
    assert entry.hardware == THEIR_MAC


def test_neighbour_under_suspicion_is_asked_and_used_meanwhile(host: Host) -> None:
    """A peer that does not acknowledge makes us doubt its gateway, which others use, too."""
    link = host.interface.link
    link.suspect(THEIRS)
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    frames = host.sent()
    assert sorted(frame[12:14] for frame in frames) == [b"\x08\x00", b"\x08\x06"]
    assert {frame[:6] for frame in frames} == {THEIR_MAC}
    host.receive(ethernet.ARP, arp_reply())
    assert host.interface.deadline() is None


def test_neighbour_under_suspicion_that_does_not_answer_is_forgotten(host: Host) -> None:
    host.interface.link.suspect(THEIRS)
    while (deadline := host.interface.deadline()) is not None:
        host.interface.on_deadline(deadline)
    assert THEIRS not in [one.address for one in host.interface.link.neighbours]


def test_neighbour_nobody_knows_under_suspicion_is_nothing() -> None:
    neighbours = Neighbours()
    neighbours.suspect(THEIRS)
    assert len(neighbours) == 0
    assert neighbours.find(THEIRS, 0.0).state is State.INCOMPLETE


# -- duplicate addresses -----------------------------------------------------


def conflicts(host: Host) -> list[tuple[bytes, bytes]]:
    seen: list[tuple[bytes, bytes]] = []
    host.interface.link.on_conflict = lambda address, who, _now: seen.append((address, who))
    return seen


def test_address_that_another_asks_for_at_the_same_time_is_a_conflict() -> None:
    """RFC 5227 section 2.1.1, RFC 4862 section 5.4.3: else both would take it."""
    host = Host()
    host.interface.link.tentative = True
    seen = conflicts(host)
    host.receive(ethernet.ARP, arp_request(arp.UNKNOWN_PROTOCOL), to=ethernet.BROADCAST)
    host.receive(ethernet.IPV6, solicitation(ipv6.UNSPECIFIED, None))
    assert seen == [(OURS, THEIR_MAC), (OURS6, THEIR_MAC)]


def test_address_that_we_ask_for_ourselves_is_none_where_a_link_gives_frames_back() -> None:
    host = Host()
    seen = conflicts(host)
    link = host.interface.link
    link.tentative = True
    link.probe()
    for frame in host.sent():
        host.interface.receive(memoryview(frame), 0.0)
    assert seen == []


def test_twin_with_our_hardware_address_is_told_by_a_broadcast() -> None:
    """Two of ours with one --address have one hardware address, too, if nobody sets it."""
    host = Host()
    twin = arp.Message(arp.REQUEST, OUR_MAC, arp.UNKNOWN_PROTOCOL, bytes(6), OURS)
    host.receive(ethernet.ARP, arp.serialize(twin), to=ethernet.BROADCAST)
    frames = [frame for frame in host.sent() if frame[12:14] == b"\x08\x06"]
    assert [frame[:6] for frame in frames] == [ethernet.BROADCAST]  # a switch sends no other there
    other = Host()
    other.interface.link.tentative = True
    seen = conflicts(other)
    other.interface.receive(memoryview(frames[0]), 0.0)
    assert seen == [(OURS, OUR_MAC)]


# -- messages that RFC 4861 section 7.1 has us drop --------------------------


def test_solicitation_from_nobody_goes_to_its_group_and_names_no_hardware() -> None:
    host = Host()
    asked = icmpv6.Neighbour(OURS6, None, is_solicitation=True)
    message = icmpv6.serialize_neighbour(asked)
    host.receive(ethernet.IPV6, icmp6(message, source=ipv6.UNSPECIFIED, destination=OURS6))
    host.receive(ethernet.IPV6, solicitation(ipv6.UNSPECIFIED, THEIR_MAC))
    assert (host.sent(), host.drops) == ([], {"nd-malformed": 2})


def test_advertisement_to_a_group_answers_nobody() -> None:
    host = Host()
    said = icmpv6.Neighbour(THEIRS6, THEIR_MAC, is_solicitation=False, solicited=True)
    message = icmpv6.serialize_neighbour(said)
    host.receive(ethernet.IPV6, icmp6(message, destination=ipv6.ALL_NODES))
    assert host.drops == {"nd-malformed": 1}


def test_neighbour_discovery_in_a_fragment_is_dropped() -> None:
    """RFC 6980: whoever filters it on a switch cannot see it there."""
    host = Host()
    plain = solicitation()
    atomic = ipv6.serialize_fragment(ipv6.ICMPV6, 0, 7, False) + plain[40:]
    group = ipv6.solicited_node(OURS6)
    host.receive(ethernet.IPV6, packet6(ipv6.FRAGMENT, atomic, destination=group))
    assert (host.sent(), host.drops) == ([], {"nd-in-fragment": 1})
