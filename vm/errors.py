"""What can go wrong on the way to a running VM."""


class VmError(Exception):
    """The VM cannot be had, or has ended; the text says why and what to do."""
