"""Files that are replaced as one: whoever looks at them at any moment finds the old ones or the new ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from umbra.files import folder

OLD = {"config.json": "old", "model.safetensors": "old weights", "vocab.txt": "old words"}
NEW = {"config.json": "new", "model.safetensors": "new weights", "chat_template.jinja": "new template"}


def write_new(staging: Path) -> None:
    for name, text in NEW.items():
        (staging / name).write_text(text)


def visible(place: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in place.glob("[!.]*") if p.is_file() and p.name != "notes.txt"}


def start(place: Path, old: dict[str, str]) -> None:
    place.mkdir()
    for name, text in {**old, "notes.txt": "mine"}.items():
        (place / name).write_text(text)


# A small process, which forks fast: a child kills itself at every operation on the disk, of the switch and of the tidying.
SWITCHES = """
import os, shutil, signal, sys
from pathlib import Path
from umbra.files import folder

old, new, root = eval(sys.argv[1]), eval(sys.argv[2]), Path(sys.argv[3])
if sys.argv[4] == "copies":
    def fail(*_, **__):
        raise OSError(1, "no hard links")
    os.link = fail

def killed(function, call):
    pid = os.fork()
    if pid == 0:
        left = [call]
        def counted(operation):
            def run(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **options)
            return run
        for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "link", "symlink", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0

def write_new(staging):
    for name, text in new.items():
        (staging / name).write_text(text)

def visible(place):
    return {p.name: p.read_text() for p in place.glob("[!.]*") if p.is_file() and p.name != "notes.txt"}

seen = []
for call in range(1, 200):
    place = root / str(call)
    place.mkdir()
    for name, text in {**old, "notes.txt": "mine"}.items():
        (place / name).write_text(text)
    if not killed(lambda: folder.switch_together(place, write_new, ["vocab.txt"]), call):
        break
    seen.append(visible(place) == new)
    assert visible(place) in (old, new), call
    for second in range(1 + call % 3, 60, 3):
        again = shutil.copytree(place, root / "again", symlinks=True)
        was_killed = killed(lambda: folder.recover(again), second)
        assert visible(again) in (old, new), (call, second)
        shutil.rmtree(again)
        if not was_killed:
            break
    folder.recover(place)
    assert visible(place) in (old, new)
    assert {p.name for p in place.iterdir()} == {*visible(place), "notes.txt"}, "nothing is left"
    assert not any(p.is_symlink() for p in place.iterdir())
assert len(seen) > 20 and seen == sorted(seen) and set(seen) == {True, False}, seen
"""


@pytest.mark.parametrize("old", [OLD, {}], ids=["a model", "nothing"])
@pytest.mark.parametrize("links", ["links", "copies"])
def test_kill_leaves_old_files_or_new_files(tmp_path, old, links):
    """And so does a kill while the next writer tidies; a file system without hard links copies."""
    command = [sys.executable, "-c", SWITCHES, repr(old), repr(NEW), str(tmp_path), links]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_full_disk_leaves_old_model(tmp_path):
    start(tmp_path / "out", OLD)

    def full(staging: Path) -> None:
        (staging / "config.json").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(folder.CheckpointError, match="No space left"):
        folder.switch_together(tmp_path / "out", full, ["vocab.txt"])
    assert visible(tmp_path / "out") == OLD


def test_links_are_followed_but_not_written_through(tmp_path):
    start(tmp_path / "out", OLD)
    (tmp_path / "elsewhere").write_text("elsewhere")
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "elsewhere")
    folder.switch_together(tmp_path / "out", write_new, ["vocab.txt"])
    assert visible(tmp_path / "out") == NEW
    assert (tmp_path / "elsewhere").read_text() == "elsewhere"
