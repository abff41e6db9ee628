"""How many connections the process's descriptors allow."""

import resource

DEFAULT_MAX_CONNECTIONS = 16384

# Descriptors that are not connections: standard ones, epoll, wakeup, notify, sockets passed.
_RESERVED_DESCRIPTORS = 64


def connection_limit(asked: int | None, descriptors_each: int = 1) -> int:
    """Raise the soft descriptor limit as far as we may, and return how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # What a low soft limit protects is select(); we have epoll.
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            hard = soft  # a system call filter may forbid it
    if asked is not None:
        return asked
    fit = (hard - _RESERVED_DESCRIPTORS) // descriptors_each
    return max(1, min(DEFAULT_MAX_CONNECTIONS, fit))


def share(limit: int, number: int, workers: int) -> int:
    """Return what of a limit belongs to worker `number`, from 0; together they have all of it."""
    return limit * (number + 1) // workers - limit * number // workers
