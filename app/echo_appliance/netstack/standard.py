"""Standard input, output and error, which may be closed when we are started."""

import os


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
