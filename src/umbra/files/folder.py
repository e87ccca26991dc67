"""Writing a few files into a folder so that a reader finds all the old ones or all the new ones.

The new files are staged in a hidden folder inside the target, which one rename then commits; moving them to their
places follows. A reader looks into the committed folder first, so a kill at any moment loses nothing.

`switch_together` does it for readers that know nothing of this, such as transformers: for a moment every file is a link through
one link, whose replacement makes all of them new at once.

Symbolic links to files are followed when reading (the hub's cache consists of them) and replaced, never written through,
when writing. A link in place of the committed folder is not ours: it is not looked into, and nothing is moved out of it.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from umbra.errors import CheckpointError

Read = TypeVar("Read")
ATTEMPTS = 3  # after which a file that cannot be read is not only being moved
PATIENCE = 30  # seconds for which a reader tries to find files of one generation while they are written again and again
HIDDEN = ".umbra-"  # what Umbra puts beside the files that it writes
COMMITTED = ".umbra-commit"
STAGED_PREFIX = ".umbra-staged-"
NEW, OLD, CURRENT = (
    ".umbra-new",
    ".umbra-old",
    ".umbra-current",
)  # of `switch_together`; the last is a link to one of them


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a killed writer of Umbra's has left, which the next one takes away."""
    return not folder.is_dir() or all(path.name.startswith(HIDDEN) for path in folder.iterdir())


def is_interrupted(folder: Path) -> bool:
    """Whether a killed writer has left files that it had committed already."""
    return (folder / COMMITTED).is_dir() or (folder / CURRENT).is_symlink()


def settle(folder: Path) -> None:
    """Finish or undo what a killed writer has left; nobody else may be writing."""
    if folder.is_dir():
        _finish(folder)
        _finish_switch(folder)
        for left in folder.glob(STAGED_PREFIX + "*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def write_together(folder: Path, write: Callable[[Path], None]) -> None:
    """Run ``write(staging)`` and put what it wrote into ``folder`` as one.

    Raises:
        CheckpointError: the disk refused; what was in ``folder`` before is still there.
    """
    _stage(folder, write, COMMITTED)
    try:
        _finish(folder)
    except OSError as error:
        raise CheckpointError(
            f"Saved to {folder}, but its files could not be put in their places: {error}. The folder can be loaded; "
            "the next save tidies it."
        ) from error


def switch_together(folder: Path, write: Callable[[Path], None], obsolete: Iterable[str] = ()) -> None:
    """As `write_together`, for readers that look at the files alone: at every moment they find the old ones or the new ones.

    Args:
        obsolete: names of old files that go, where ``write`` does not write them anew.

    Raises:
        CheckpointError: the disk refused; what was in ``folder`` before is still there.
    """
    _stage(folder, write, NEW)
    try:
        names = sorted({p.name for p in (folder / NEW).iterdir()} | {n for n in obsolete if (folder / n).is_file()})
        (folder / OLD).mkdir()
        for name in names:
            if (folder / name).exists():
                link_or_copy(folder / name, folder / OLD / name)
        _point(folder / CURRENT, OLD)
        for name in names:
            _point(folder / name, f"{CURRENT}/{name}")
        _point(folder / CURRENT, NEW)
        _finish_switch(folder)
    except OSError as error:
        raise CheckpointError(
            f"Saving to {folder} failed: {error}. It holds the old files or the new ones, and the next save tidies it."
        ) from error


def _stage(folder: Path, write: Callable[[Path], None], name: str) -> None:
    """Let ``write`` fill a folder inside ``folder``, which then has this name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        staging = Path(tempfile.mkdtemp(prefix=STAGED_PREFIX, dir=folder))
    except OSError as error:
        raise CheckpointError(f"Nothing can be written to {folder}: {error}") from error
    try:
        write(staging)
        make_readable(staging)
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        staging.chmod(0o755)
        staging.rename(folder / name)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"Saving to {folder} failed, its old content is intact: {error}") from error
        raise


def _point(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to ``target``, in place of whatever it was."""
    beside = link.with_name(f"{STAGED_PREFIX}link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def _finish_switch(folder: Path) -> None:
    """Put the files of the side that `CURRENT` names in the places of the links."""
    current = folder / CURRENT
    if current.is_symlink():
        side = folder / os.readlink(current)
        for link in folder.iterdir():
            if not link.is_symlink() or Path(os.readlink(link)).parts[0] != CURRENT:
                continue
            if (side / link.name).exists():
                beside = folder / f"{STAGED_PREFIX}file"
                beside.unlink(missing_ok=True)
                link_or_copy(side / link.name, beside)
                beside.replace(link)
            else:
                link.unlink()
        current.unlink()
    for side in (NEW, OLD):
        if (folder / side).is_dir() and not (folder / side).is_symlink():
            shutil.rmtree(folder / side)


def remove(path: Path) -> None:
    """Remove a folder, of which no half is ever found under its name."""
    gone = path.with_name(f"{STAGED_PREFIX}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def link_or_copy(file: Path, name: Path) -> None:
    """Give a file a second name, or its content where the file system has no hard links."""
    try:
        os.link(file.resolve(), name)
    except OSError:
        shutil.copyfile(file, name)


def make_readable(folder: Path) -> None:
    """Give the files of a folder the mode of new ones: safetensors makes files that nobody else can read."""
    readable = _mode_of_a_new_file(folder)
    for path in folder.iterdir():
        path.chmod(readable)


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


def read_whole(folder: Path, read: Callable[[], Read], names: tuple[str, ...]) -> Read:
    """What ``read`` returns for files of one generation: it reads again where a writer has replaced one of them meanwhile.

    Args:
        names: the files that must belong together.
    """
    until, failures = time.monotonic() + PATIENCE, 0
    while True:
        before = _generation(folder, names)
        try:
            value = read()
        except CheckpointError:
            failures += _generation(folder, names) == before
            if failures == ATTEMPTS or time.monotonic() > until:
                raise
            time.sleep(0.003)
            continue
        if _generation(folder, names) == before or time.monotonic() > until:
            return value


def _generation(folder: Path, names: tuple[str, ...]) -> list[tuple[int, int, int] | None]:
    return [_stamp(folder, name) for name in names]


def _stamp(folder: Path, name: str) -> tuple[int, int, int] | None:
    for _ in range(ATTEMPTS):  # a file may be put in its place between the two calls
        try:
            state = find(folder, name).stat()
            return state.st_ino, state.st_size, state.st_mtime_ns
        except OSError:
            continue
    return None


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
