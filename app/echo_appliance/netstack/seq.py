"""Sequence numbers: 32 bits that wrap around, as RFC 9293 section 3.4 has them.

On the wire a number is taken modulo 2**32, and "less than" means "less than
half a circle behind".  Spread over a program, that arithmetic is where TCPs go
wrong.  Here it is done once, at the door: a number that arrives is *unwrapped*
into a Python integer that never wraps (the one nearest to a number we already
have), and from there on every `<` of the RFC is a plain `<`.  A number that
leaves is cut to 32 bits again.
"""

MASK = 0xFFFFFFFF
HALF = 0x80000000


def unwrap(wire: int, near: int) -> int:
    """Return the integer that is `wire` modulo 2**32 and nearest to `near`.

    May be negative when `near` is small; it still compares as it should.
    """
    return near + ((wire - near + HALF) & MASK) - HALF


def is_before(first: int, second: int) -> bool:
    """Tell whether the 32-bit number `first` comes before `second` (RFC 7323 section 5.2)."""
    return ((first - second) & MASK) >= HALF
