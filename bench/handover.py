"""Hands sockets over as systemd does: handover.py CORE,... [FD...] -- COMMAND...

The command runs on the cores that are named.  LISTEN_PID must name the process
that serves, so it is set here, between fork and exec.  Run by core.py, with
descriptors that were inherited on purpose.
"""

import os
import resource
import sys

FIRST = 3  # SD_LISTEN_FDS_START


def hand_over(cores: set[int], descriptors: list[int], command: list[str]) -> None:
    """Become `command`, pinned to `cores`, with `descriptors` as 3, 4, ..."""
    os.sched_setaffinity(0, cores)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Out of the way first: one of them may sit where another belongs.
    high = [os.dup2(descriptor, 100 + n) for n, descriptor in enumerate(descriptors)]
    for n, descriptor in enumerate(high):
        os.dup2(descriptor, FIRST + n)
    os.closerange(FIRST + len(descriptors), 200)
    if descriptors:
        os.environ["LISTEN_FDS"] = str(len(descriptors))
        os.environ["LISTEN_PID"] = str(os.getpid())
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    end = sys.argv.index("--")
    pinned = {int(core) for core in sys.argv[1].split(",")}
    hand_over(pinned, [int(n) for n in sys.argv[2:end]], sys.argv[end + 1 :])
