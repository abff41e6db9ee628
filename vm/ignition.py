"""From vm/echo.butane, by butane, to the Ignition config that a guest boots with.

What belongs to one run and not to the machine's description - a key to log in by, the disk with the
image - is merged in by Ignition itself, so that the file stays as a user would take it.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm.cache import DATA_LABEL, REPOSITORY, butane
from vm.errors import VmError

BUTANE = REPOSITORY / "vm" / "echo.butane"
LOCAL_FILES = REPOSITORY / "systemd"
SPEC = "3.3.0"  # the version that merges: as in echo.butane

# mount(8) finds the disk by its label without udev; .mount units wait for udev.
MOUNT_UNIT = f"""\
[Unit]
Description=The disk with the echo appliance's image
Before=systemd-logind.service echo-image.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/mkdir -p /var/lib/echo-appliance
ExecStart=/usr/bin/mount -o ro LABEL={DATA_LABEL} /var/lib/echo-appliance
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Login:
    """Who may log in by an ssh key."""

    public_key: str
    users: Sequence[str] = ("core",)


def transpile(source: Path = BUTANE) -> str:
    """Return butane's output, an Ignition config.  Raises VmError with its words and lines."""
    command = [*butane(), "--strict", "--files-dir", str(LOCAL_FILES)]
    done = subprocess.run(
        command, input=source.read_text(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise VmError(f"butane refuses {source.name}: {_in_one_line(done.stderr)}")
    return done.stdout


# butane's report of a fault shows the place, some lines of the source, and below a "^^^" the words.
_POINTED = re.compile(r"--> <stdin>:(\d+):\d+$.*?\^+ ([^\n]*)", re.DOTALL | re.MULTILINE)


def _in_one_line(said: str) -> str:
    """Return butane's report as "line N: words"; one without a picture says its line in words."""
    pointed = [f"line {line}: {words}" for line, words in _POINTED.findall(said)]
    return "; ".join(pointed) or " ".join(said.split()) or "it does not say why"


def merge(config: str, login: Login) -> str:
    """Return a config that is this one, the key, and the mount of the data disk."""
    encoded = base64.b64encode(config.encode()).decode()
    source = f"data:application/json;base64,{encoded}"
    users = [{"name": name, "sshAuthorizedKeys": [login.public_key]} for name in login.users]
    unit = {"name": "echo-data.service", "enabled": True, "contents": MOUNT_UNIT}
    whole: dict[str, Any] = {
        "ignition": {"version": SPEC, "config": {"merge": [{"source": source}]}},
        "passwd": {"users": users},
        "systemd": {"units": [unit]},
    }
    return json.dumps(whole)
