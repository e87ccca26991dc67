"""Python in a process of its own, which nothing in the working folder has a part in."""

import subprocess
import sys
from tempfile import TemporaryDirectory


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in an empty working folder.

    Neither the working folder nor the script's own is on the import path, and libraries that look for plug-ins in the
    working folder, as GGML does, find none. Paths must be absolute.
    """
    command = [sys.executable, "-P", *arguments]
    with TemporaryDirectory() as empty:
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", cwd=empty)
