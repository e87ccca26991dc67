"""Commands that are killed at random points and run again end as uninterrupted ones: a few kills of bench/kills.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHOSEN = "max_steps,teacher,detach --overwrite,convert,export hf"


def test_rerun_after_kill_equals_uninterrupted_run(tmp_path):
    """By SIGKILL, at operations that change the disk and at random times; the same seed every time."""
    command = [
        sys.executable,
        "-m",
        "bench.kills",
        "--kills",
        "3",
        "--only",
        CHOSEN,
        "--out",
        str(tmp_path / "kills.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    total = json.loads((tmp_path / "kills.json").read_text())["total"]
    assert total["kills"] >= 18
    assert (total["unequal"], total["refused"], total["mixtures"]) == (0, 0, 0), done.stdout
