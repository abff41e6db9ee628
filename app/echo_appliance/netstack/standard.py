"""Standard input, output and error, for commands: what may be closed, full or gone."""

import errno
import os
import sys

from ..errors import SetupError


def occupy() -> None:
    """Open those that are closed, before a device or a socket gets the number of one.

    Else what is meant for standard output would go to the link.  Input is empty then; output
    refuses to be written.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free, which is this


def write(text: str, *, flush: bool = True) -> None:
    """Write to standard output.  Raises SetupError where it takes no more, BrokenPipeError."""
    try:
        if sys.stdout is None:  # it was closed as we started
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the flush at exit would fail again
        raise SetupError(f"cannot write to standard output: {error.strerror}") from None
