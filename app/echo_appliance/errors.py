"""The exceptions of this package, and how one is told to a person."""

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
