"""Run Python in a separate process that the working folder cannot influence."""

import subprocess
import sys
from tempfile import TemporaryDirectory


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty working folder.

    Neither the working folder nor the script's folder is on the import path, and libraries that look for plug-ins in the
    working folder, as GGML does, find none.

    Args:
        arguments: of the interpreter; paths must be absolute.
    """
    command = [sys.executable, "-P", *arguments]
    with TemporaryDirectory() as empty:
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", cwd=empty)
