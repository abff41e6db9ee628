"""What pyproject.toml cannot say: compile the BPF program where clang is there.

Without it everything but `dispatch` works, and dispatch says what is missing.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SCRIPT = Path(__file__).parent / "scripts" / "bpf"


class BuildWithBpf(build_py):
    """build_py, with dispatch.bpf.o made first, so that it is copied like any package data."""

    def run(self) -> None:
        """Compile, then do as always."""
        if shutil.which("clang") and SCRIPT.exists():
            done = subprocess.run([SCRIPT], check=False)
            if done.returncode:
                self.warn("the BPF program was not compiled: dispatch will not work")
        super().run()


setup(cmdclass={"build_py": BuildWithBpf})
