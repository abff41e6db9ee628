"""What every tier starts from."""

from __future__ import annotations

import signal

# A run in a shell's background inherits an ignored SIGINT and would hand it on, so that no
# process under test could be interrupted; a handler of ours is reset to the default by exec.
signal.signal(signal.SIGINT, signal.default_int_handler)
