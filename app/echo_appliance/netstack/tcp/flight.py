"""What was sent and is not acknowledged: the retransmission queue and SACK scoreboard.

One record per segment sent (a super-segment counts as one and is split when
the peer acknowledges part of it).  What is under way is `pipe` (RFC 6675): all
that was sent, less what arrived, less what is believed lost.

What is lost is decided by time, as in RACK (RFC 8985): a segment is lost when
one that was *sent* later has *arrived*, and a quarter of a round trip has passed
since.  Counting three duplicate ACKs, as RFC 5681 does, takes every reordering
for a loss, and finds no loss at all in the last three segments of a reply.
Without SACK there is nothing to see but duplicate ACKs, so they are counted then.

A peer chooses how many records there are, and each of its ACKs may ask which of them are
lost.  So that question never looks at all of them: what was sent once lies in the order
of sending anyway, what was sent again is kept in it beside, and the first that may still
be under way ends the search.  Nor do blocks that say the same again: what has arrived side by
side becomes one record.
"""

from bisect import bisect_left, bisect_right, insort
from operator import attrgetter, itemgetter

from .settings import DUPLICATE_THRESHOLD, NEVER

_start = attrgetter("start")
_end = attrgetter("end")
_when = itemgetter(0, 1)

_STALE_ENTRIES = 64  # of what was sent again, that may be beside one for each record


class Sent:
    """Octets [start, end) of sequence space that left in one segment at `at`."""

    __slots__ = ("again", "at", "end", "lost", "sacked", "start")

    def __init__(self, start: int, end: int, at: float) -> None:
        self.start = start
        self.end = end
        self.at = at
        self.again = False  # sent more than once: its round trip is ambiguous (Karn)
        self.sacked = 0  # segments in it that are known to have arrived: all or none
        self.lost = False  # believed lost, and not sent again since


class Flight:
    """Records in order of position.  Counters are octets."""

    __slots__ = (
        "_delivered_at", "_delivered_end", "_delivered_in", "_highest", "_lost_from",
        "_open_from", "_resent", "assumed", "lost", "mss", "octets", "patience", "records",
        "reordered", "sacked", "shortest",
    )  # fmt: skip

    def __init__(self, mss: int) -> None:
        self.records: list[Sent] = []
        self.mss = mss  # octets of payload per segment on the wire
        self.octets = 0
        self.sacked = 0
        self.lost = 0
        self.assumed = 0  # what duplicate ACKs without SACK say has arrived
        self.reordered = False  # the path was seen to change the order
        self.patience = 1  # quarters of a round trip to wait for what may only be late
        self.shortest = 0.0  # shortest round trip known, seconds; the sender tells it
        # RACK: when the latest-sent of the arrived segments left, where it ends, its round trip.
        self._delivered_at = 0.0
        self._delivered_end = 0
        self._delivered_in = 0.0
        self._highest = 0  # the end of what was selectively acknowledged
        self._open_from = 0  # all before was sent again, has arrived, or is lost
        self._lost_from = 0  # nothing before is lost
        # What was sent again, in the order of that: when, where it began, the record.  An entry
        # may be out of date: _is_over().
        self._resent: list[tuple[float, int, Sent]] = []

    @property
    def pipe(self) -> int:
        """Octets that are believed to be under way."""
        return self.octets - self.sacked - self.lost - self.assumed

    def add(self, start: int, end: int, now: float) -> None:
        """Note that [start, end), which follows all before, was sent."""
        self.records.append(Sent(start, end, now))
        self.octets += end - start

    def acknowledge(self, una: int, now: float) -> None:
        """Forget what is before `una`."""
        records = self.records
        quiet = not (self.sacked or self.lost)  # nothing to learn for the scoreboard
        gone = 0
        for record in records:
            if record.end > una:
                break
            gone += 1
            if not quiet:
                self._arrived(record, now)
                self._uncount(record)
            self.octets -= record.end - record.start
        del records[:gone]
        if not records:
            if self._resent:
                self._resent.clear()
            return
        if records[0].start >= una:
            return
        if quiet:
            self.octets -= una - records[0].start
            records[0].start = una
        else:
            self._split(0, una)
            self.acknowledge(una, now)

    def _segments_of(self, record: Sent) -> int:
        return -((record.start - record.end) // self.mss)

    def _uncount(self, record: Sent) -> None:
        if record.sacked:
            self.sacked -= record.end - record.start
        elif record.lost:
            self.lost -= record.end - record.start

    def _arrived(self, record: Sent, now: float) -> None:
        """Learn from a record that is acknowledged for the first time (RFC 8985 section 6.2)."""
        if record.sacked:
            return
        if not record.again and record.end < self._highest:
            self.reordered = True
        took = now - record.at
        if record.again and took < self.shortest:
            return  # too soon to be the answer to what was sent again: it is to the first
        if (record.at, record.end) > (self._delivered_at, self._delivered_end):
            self._delivered_at, self._delivered_end = record.at, record.end
            self._delivered_in = took

    def select(self, blocks: list[tuple[int, int]], now: float) -> bool:
        """Mark what SACK blocks say has arrived; return whether that is news.

        Blocks outside of the flight are ignored.
        """
        before, highest = self.sacked, self._highest
        for start, end in blocks:
            records = self.records
            if not records or not records[0].start <= start < end <= records[-1].end:
                continue  # old, a duplicate's (RFC 2883), or made up
            self._cut_at(start, up=True)
            self._cut_at(end, up=False)
            low = bisect_left(records, start, key=_start)
            high = bisect_right(records, end, key=_end)
            if low < high:
                self._select(low, high, now)
            highest = max(highest, end)
        self._highest = highest  # only now: what one ACK tells of has no order
        return self.sacked > before

    def _select(self, low: int, high: int, now: float) -> None:
        """Mark these records, and make one of them and of what has arrived beside them."""
        records = self.records
        for record in records[low:high]:
            if not record.sacked:
                self._arrived(record, now)
                self._uncount(record)
                record.lost = False
                record.sacked = self._segments_of(record)
                self.sacked += record.end - record.start
        if low and records[low - 1].sacked:
            low -= 1
        if high < len(records) and records[high].sacked:
            high += 1
        if high - low > 1:
            records[low].end = records[high - 1].end
            records[low].sacked = sum(record.sacked for record in records[low:high])
            del records[low + 1 : high]

    def _cut_at(self, position: int, *, up: bool) -> None:
        """Make a border between records at the position, or where a segment begins nearby.

        A device cuts a super-segment into whole segments, and so arrive they: blocks that begin
        or end within one are made up, to have us keep a record per octet.
        """
        at = bisect_right(self.records, position, key=_start) - 1
        record = self.records[at]
        into = position - record.start
        border = record.start + (-(-into // self.mss) if up else into // self.mss) * self.mss
        if record.start < border < record.end:
            self._split(at, border)

    def _split(self, at: int, position: int) -> None:
        record = self.records[at]
        rest = Sent(position, record.end, record.at)
        rest.again, rest.lost = record.again, record.lost
        record.end = position
        if record.sacked:
            rest.sacked = self._segments_of(rest)
            record.sacked = max(1, record.sacked - rest.sacked)
        self.records.insert(at + 1, rest)
        if rest.again:
            self._note_resent(rest)

    def find_lost(self, now: float, round_trip: float, recovering: bool) -> float:
        """Mark what must be lost by now; return when to look again (RFC 8985 section 6.2).

        `round_trip` is the smoothed one, 0 where it is not known yet.
        """
        wait = self._delivered_in + self._reordering_window(round_trip, recovering)
        soonest = self._find_lost_once(now, wait)
        return min(soonest, self._find_lost_again(now, wait))

    def _find_lost_once(self, now: float, wait: float) -> float:
        """The same for what was sent once."""
        records = self.records
        newest = (self._delivered_at, self._delivered_end)
        for at in range(bisect_left(records, self._open_from, key=_start), len(records)):
            record = records[at]
            if record.again or record.sacked or record.lost:
                continue
            self._open_from = record.start
            if (record.at, record.end) >= newest:
                return NEVER
            if record.at + wait > now:
                return record.at + wait
            self._lose(record)
        if records:
            self._open_from = records[-1].end
        return NEVER

    def _find_lost_again(self, now: float, wait: float) -> float:
        """The same for what was sent again."""
        resent = self._resent
        newest = (self._delivered_at, self._delivered_end)
        while resent:
            at, _, record = resent[0]
            if not self._is_over(at, record):
                if (at, record.end) >= newest:
                    return NEVER
                if at + wait > now:
                    return at + wait
                self._lose(record)
            del resent[0]
        return NEVER

    def _is_over(self, at: float, record: Sent) -> bool:
        """Whether what was sent again at that time has arrived, is lost, or was sent once more."""
        return (
            record.at != at
            or record.sacked > 0
            or record.lost
            or not self.records
            or record.end <= self.records[0].start
        )

    def _reordering_window(self, round_trip: float, recovering: bool) -> float:
        if not self.reordered and (recovering or self._has_gap_of(DUPLICATE_THRESHOLD)):
            return 0.0
        return (round_trip or self._delivered_in) * min(self.patience, 4) / 4

    def _has_gap_of(self, segments: int) -> bool:
        """Whether so many segments have arrived past one that has not."""
        for record in self.records:
            segments -= record.sacked
            if segments <= 0:
                return True
        return False

    def _lose(self, record: Sent) -> None:
        record.lost = True
        self.lost += record.end - record.start
        self._lost_from = min(self._lost_from, record.start)

    def lose_first(self) -> None:
        """Mark the first segment: three duplicate ACKs, or a partial one, say so (RFC 6582).

        Not all of a super-segment: what has arrived and is sent again is answered by duplicates,
        which would look like the next loss, and so on for as long as anything is sent.
        """
        if not self.records or self.records[0].lost or self.records[0].sacked:
            return
        if self.records[0].end - self.records[0].start > self.mss + 1:  # a FIN may ride on it
            self._split(0, self.records[0].start + self.mss)
        self._lose(self.records[0])

    def lose_all(self) -> None:
        """Mark all that is not known to have arrived: the time-out passed, or the window was zero.

        If the very first record was selectively acknowledged, the peer has thrown away what it
        had acknowledged (RFC 2018 section 8 lets it), and none of its word counts.
        """
        self.assumed = 0
        if self.records and self.records[0].sacked:
            for record in self.records:
                record.sacked = 0
            self.sacked = 0
        for record in self.records:
            if not record.lost and not record.sacked:
                self._lose(record)

    def lose_larger_than(self, size: int) -> None:
        """Mark what a router will not have let through (path MTU discovery)."""
        for record in self.records:
            if record.end - record.start > size and not record.lost and not record.sacked:
                self._lose(record)

    def forgive(self) -> None:
        """Nothing was lost after all: it was late, so be more patient with this path."""
        self.patience += 1
        for record in self.records:
            record.lost = False
        self.lost = 0
        self._open_from = 0
        self._list_resent()

    def next_lost(self, most: int) -> Sent | None:
        """Return the first record to send again, cut to `most` octets; None if there is none."""
        records = self.records
        for at in range(bisect_left(records, self._lost_from, key=_start), len(records)):
            record = records[at]
            if record.lost:
                self._lost_from = record.start
                if record.end - record.start > most:
                    self._split(at, record.start + most)
                return record
        return None

    def last(self, data_end: int) -> Sent:
        """Return the last segment as it left; a FIN, after `data_end`, may ride on it.

        Cut elsewhere, it would have octets of two segments, of which the peer may have one: its
        SACK blocks would fit neither.
        """
        record = self.records[-1]
        size = min(record.end, data_end) - record.start
        if size > self.mss:
            self._split(len(self.records) - 1, record.start + (size - 1) // self.mss * self.mss)
        return self.records[-1]

    def repeat(self, record: Sent, now: float) -> None:
        """Note that the record is under way again."""
        if record.lost:
            record.lost = False
            self.lost -= record.end - record.start
        record.again = True
        record.at = now
        self._note_resent(record)

    def _note_resent(self, record: Sent) -> None:
        insort(self._resent, (record.at, record.start, record), key=_when)
        if len(self._resent) > 2 * len(self.records) + _STALE_ENTRIES:
            self._list_resent()  # most is out of date, and a peer could have it grow for ever

    def _list_resent(self) -> None:
        again = [one for one in self.records if one.again and not (one.sacked or one.lost)]
        self._resent = sorted(((one.at, one.start, one) for one in again), key=_when)
