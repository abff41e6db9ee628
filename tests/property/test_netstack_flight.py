"""The scoreboard finds what looking at every record would find, whatever happened to them."""

from __future__ import annotations

import random

import pytest

from echo_appliance.netstack.tcp.flight import Flight, Sent
from echo_appliance.netstack.tcp.settings import NEVER

MSS = 10
FIRST = 1000
SEEDS, SEEDS_PER_TEST = 1200, 200


def expected(flight: Flight, now: float, window: float) -> tuple[set[int], float]:
    """What is lost by now (where it begins), and when to look again: RFC 8985 section 6.2."""
    newest = (flight._delivered_at, flight._delivered_end)
    lost, again_at = set[int](), NEVER
    for record in flight.records:
        if record.sacked or record.lost or (record.at, record.end) >= newest:
            continue
        due = record.at + flight._delivered_in + window
        if due <= now:
            lost.add(record.start)
        else:
            again_at = min(again_at, due)
    return lost, again_at


class Conversation:
    """One flight, and whatever can happen to it; times are multiples of 2**-10, and so exact."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311
        self.flight = Flight(MSS)
        self.flight.shortest = self.chance.choice([0, 1 / 64, 1 / 8])
        self.now = 1.0
        self.una = self.end = FIRST

    def step(self) -> None:
        """Let time pass, and one thing happen; then look for losses."""
        self.now += self.chance.choice([0, 0, 1 / 1024, 1 / 128, 1 / 16])
        self.chance.choice([
            self.send, self.send, self.acknowledge, self.select, self.repeat, self.repeat,
            self.probe, self.flight.lose_first, self.time_out, self.forgive,
        ])()  # fmt: skip
        self.look()
        self.check()

    def send(self) -> None:
        for _ in range(self.chance.choice([1, 5])):
            size = self.chance.choice([1, 5, 10, 10, 30, 95])
            self.flight.add(self.end, self.end + size, self.now)
            self.end += size

    def acknowledge(self) -> None:
        self.una = self.chance.choice([self.una, self.chance.randint(self.una, self.end)])
        self.flight.acknowledge(self.una, self.now)

    def select(self) -> None:
        start = self.chance.randint(self.una - 5, self.end + 5)
        blocks = [(start, start + self.chance.choice([5, 10, 50]))]
        if self.flight.records:
            record: Sent = self.chance.choice(self.flight.records)
            blocks.append((record.start, record.end))
        self.flight.select(blocks, self.now)

    def repeat(self) -> None:
        for _ in range(self.chance.choice([1, 4])):
            all_lost = [record for record in self.flight.records if record.lost]
            record = self.flight.next_lost(self.chance.choice([5, MSS, 50]))
            assert record is (all_lost[0] if all_lost else None)
            if record is not None:
                self.flight.repeat(record, self.now)

    def probe(self) -> None:
        if self.flight.records:
            self.flight.repeat(self.flight.last(self.end), self.now)

    def time_out(self) -> None:
        if self.chance.random() < 0.2:
            self.flight.lose_all()

    def forgive(self) -> None:
        if self.chance.random() < 0.3:
            self.flight.forgive()

    def look(self) -> None:
        """Find the losses, all of them and no others."""
        round_trip, recovering = self.chance.choice([0, 1 / 16]), self.chance.random() < 0.5
        window = self.flight._reordering_window(round_trip, recovering)
        lost, again_at = expected(self.flight, self.now, window)
        before = {record.start for record in self.flight.records if record.lost}
        assert self.flight.find_lost(self.now, round_trip, recovering) == again_at
        found = {record.start for record in self.flight.records if record.lost}
        assert found - before == lost

    def check(self) -> None:
        """The counters are what the records say, which lie side by side."""
        flight, at = self.flight, self.una
        for record in flight.records:
            assert (record.start, record.end > record.start) == (at, True)
            at = record.end
        assert at == self.end
        for count, kind in ((flight.lost, "lost"), (flight.sacked, "sacked")):
            counted = [one for one in flight.records if getattr(one, kind)]
            assert count == sum(one.end - one.start for one in counted)


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_losses_are_found_as_if_each_record_was_looked_at(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        conversation = Conversation(seed)
        try:
            for _ in range(conversation.chance.choice([20, 200])):
                conversation.step()
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
