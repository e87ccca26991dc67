"""Writing a few files into a folder so that a reader finds all the old ones or all the new ones.

The new files are staged in a hidden folder inside the target, which one rename then commits; moving them to their
places follows. A reader looks into the committed folder first, so a kill at any moment loses nothing.

Symbolic links to files are followed when reading (the hub's cache consists of them) and replaced, never written through,
when writing. A link in place of the committed folder is not ours: it is not looked into, and nothing is moved out of it.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

COMMITTED = ".umbra-commit"
STAGED_PREFIX = ".umbra-staged-"


def is_staged(path: Path) -> bool:
    """Whether this is what a killed save has left, which the next one takes away."""
    return path.name.startswith(STAGED_PREFIX)


def write_together(folder: Path, write: Callable[[Path], None]) -> None:
    """Run ``write(staging)`` and put what it wrote into ``folder`` as one.

    Raises:
        CheckpointError: the disk refused; what was in ``folder`` before is still there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _finish(folder)
        for left in folder.glob(STAGED_PREFIX + "*"):
            shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGED_PREFIX, dir=folder))
    except OSError as error:
        raise CheckpointError(f"Nothing can be written to {folder}: {error}") from error
    try:
        write(staging)
        readable = _mode_of_a_new_file(staging)
        for path in staging.iterdir():
            path.chmod(readable)  # safetensors makes files that nobody else can read
            with path.open("rb") as file:
                os.fsync(file.fileno())
        staging.chmod(0o755)
        staging.rename(folder / COMMITTED)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"Saving to {folder} failed, its old content is intact: {error}") from error
        raise
    try:
        _finish(folder)
    except OSError as error:
        raise CheckpointError(
            f"Saved to {folder}, but its files could not be put in their places: {error}. The folder can be loaded; "
            "the next save tidies it."
        ) from error


def _mode_of_a_new_file(folder: Path) -> int:
    """What the user's umask leaves."""
    probe = folder / ".probe"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _finish(folder: Path) -> None:
    committed = folder / COMMITTED
    if committed.is_symlink():
        raise OSError(f"{committed} is a symbolic link, which Umbra does not make: remove it")
    if committed.is_dir():
        for path in committed.iterdir():
            path.replace(folder / path.name)
        committed.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8."""
    path.write_text(text, encoding="utf-8")


def find(folder: Path, name: str) -> Path:
    """Where a file written by `write_together` is, also after a kill in the middle of it."""
    committed = folder / COMMITTED
    inside = not committed.is_symlink() and (committed / name).exists()
    return committed / name if inside else folder / name


def check_regular(file: Path) -> None:
    """Raise an OSError unless ``file`` is a regular file, or a link to one: opening a pipe would wait for ever."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{file.name} is no regular file")


def read_text(file: Path, limit: int = 2**26) -> str:
    """The UTF-8 text of a regular file of at most ``limit`` bytes; an OSError or ValueError otherwise."""
    check_regular(file)
    if file.stat().st_size > limit:
        raise OSError(f"{file.name} is larger than {limit:,} bytes")
    return file.read_text(encoding="utf-8")


def digest_of(files: list[Path]) -> str:
    """Of the contents of files, in their order."""
    found = ((f.absolute(), f.stat()) for f in files)
    each = "".join(_digest(f, about.st_size, about.st_mtime_ns) for f, about in found)
    return hashlib.sha256(each.encode()).hexdigest()[:16]


@cache
def _digest(file: Path, size: int, modified: int) -> str:
    """Of a file's contents, which are read once for every size and time of it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
