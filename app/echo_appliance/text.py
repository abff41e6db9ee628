"""Reads numbers from text that came from outside."""


def whole_number(text: str) -> int | None:
    """Return the number that ASCII digits stand for; None for anything else.

    Eighteen digits are more than any limit of ours, and int() itself refuses
    thousands of them with an exception.
    """
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    return None
