"""The exceptions of this package, and how people are told: say() on stderr, tell() on stdout."""

import errno
import os
import sys


class SetupError(Exception):
    """What we were started with cannot work.  One line: what is wrong, what to do."""


class ParseError(ValueError):
    """Octets or text from outside do not mean anything.  The peer (or user) is wrong, not us."""


def say(message: str) -> None:
    """Write one line to stderr, which is the journal under systemd and podman alike.

    A log that nobody takes any more (a closed or broken pipe) is no reason to stop serving.
    """
    try:
        sys.stderr.write(f"echo-appliance: {message}\n")
        sys.stderr.flush()
    except (OSError, AttributeError):  # AttributeError: started with descriptor 2 closed
        pass


def tell(text: str, *, flush: bool = True) -> None:
    """Write what was asked for to stdout; what its encoding lacks is written as an escape.

    Raises SetupError when it cannot be written (a full disk, or we were started with stdout
    closed), BrokenPipeError when nobody reads it.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.buffer.write(text.encode(sys.stdout.encoding, "backslashreplace"))
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the flush at exit would fail again
        raise SetupError(f"standard output cannot be written: {error.strerror}") from error
