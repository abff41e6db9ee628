"""Who may connect: a limit on all connections and one per source address.

Knows no I/O.  At the limit for all, accepting pauses: the kernel's backlog
holds the others, and they lose nothing but time.  At the limit for one source
that would let this source hold up everybody, so it is refused instead.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Admission:
    """Counts connections against their limits.  A limit of 0 means none."""

    __slots__ = ("_limit", "_on_pause", "_per_source", "_sources", "_waiting", "open")

    def __init__(
        self, limit: int, per_source: int, on_pause: "Callable[[], None] | None" = None
    ) -> None:
        """on_pause() is called when an acceptor leaves the backlog to others."""
        self._on_pause = on_pause
        self._limit = limit
        self._per_source = per_source
        self._sources: dict[str, int] = {}
        self._waiting: list[Callable[[], None]] = []
        self.open = 0

    def change(self, limit: int, per_source: int, sources: "Iterable[str | None]" = ()) -> None:
        """Put other limits in force; `sources` are those of the connections that are open."""
        self._limit = limit
        self._per_source = per_source
        self._sources = {}
        for source in sources:
            if per_source and source is not None:
                self._sources[source] = self._sources.get(source, 0) + 1

    @property
    def full(self) -> bool:
        """Whether no connection at all may be accepted now."""
        return 0 < self._limit <= self.open

    def admit(self, source: str | None) -> bool:
        """Count a connection in, or refuse it because its source has its share.

        `source` is None where peers have no address (unix): only the total counts.
        """
        if self._per_source and source is not None:
            held = self._sources.get(source, 0)
            if held >= self._per_source:
                return False
            self._sources[source] = held + 1
        self.open += 1
        return True

    def release(self, source: str | None) -> None:
        """Count an admitted connection out, and let those who wait for room go on."""
        self.open -= 1
        if self._per_source and source is not None:
            held = self._sources[source] - 1
            if held:
                self._sources[source] = held
            else:
                del self._sources[source]
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for resume in waiting:
                resume()

    def pause(self) -> None:
        """Note that an acceptor takes no more for now, while more may wait."""
        if self._on_pause is not None:
            self._on_pause()

    def wait_for_room(self, resume: "Callable[[], None]") -> None:
        """Call resume() once, at the next release()."""
        self._waiting.append(resume)
