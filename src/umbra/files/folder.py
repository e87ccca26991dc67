"""Write a few files into a folder atomically: a reader gets all the old ones or all the new ones.

The new files are staged in a hidden folder inside the target, which one rename commits; they are moved to their places
afterwards. Readers look into the committed folder first, so a kill at any moment loses nothing.

`switch_together` serves readers that do not do so, such as transformers: for a moment every file is a link through one link,
whose replacement switches all of them at once.

Symbolic links to files are followed when reading (the hub's cache consists of them), and replaced, never written through,
when writing. Umbra never makes a link in place of the committed folder: such a link is not followed.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from umbra.errors import CheckpointError

Read = TypeVar("Read")
ATTEMPTS = 3  # failures after which an unreadable file is damaged, not just being moved
PATIENCE = 30  # seconds for which a reader retries while the files are being replaced
HIDDEN = ".umbra-"  # prefix of Umbra's own files in an output folder
COMMITTED = ".umbra-commit"
STAGED_PREFIX = ".umbra-staged-"
NEW, OLD, CURRENT = (
    ".umbra-new",
    ".umbra-old",
    ".umbra-current",
)  # of `switch_together`; the last is a link to one of the others


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing but leftovers of a killed writer, which the next one removes."""
    return not folder.is_dir() or all(path.name.startswith(HIDDEN) for path in folder.iterdir())


def is_interrupted(folder: Path) -> bool:
    """Return whether a killed writer left files that it had already committed."""
    return (folder / COMMITTED).is_dir() or (folder / CURRENT).is_symlink()


def recover(folder: Path) -> None:
    """Finish or undo the work of a killed writer; no other process may be writing."""
    if folder.is_dir():
        _finish(folder)
        _finish_switch(folder)
        for staged in folder.glob(STAGED_PREFIX + "*"):
            if staged.is_dir() and not staged.is_symlink():
                shutil.rmtree(staged, ignore_errors=True)
            else:
                staged.unlink(missing_ok=True)


def write_together(folder: Path, write: Callable[[Path], None]) -> None:
    """Run ``write(staging)`` and move the files that it wrote into ``folder`` as one.

    Args:
        folder: the target, which is made if it does not exist.
        write: writes files into the folder that it is given.

    Raises:
        CheckpointError: the disk refused; the old content of ``folder`` is intact.
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
    """Do as `write_together`, for readers that do not look into the committed folder.

    Args:
        folder: the target, which is made if it does not exist.
        write: writes files into the folder that it is given.
        obsolete: names of old files to remove, unless ``write`` writes them again.

    Raises:
        CheckpointError: the disk refused; the old content of ``folder`` is intact.
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
    """Let ``write`` fill a folder inside ``folder``, which is then renamed to ``name``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        staging = Path(tempfile.mkdtemp(prefix=STAGED_PREFIX, dir=folder))
    except OSError as error:
        raise CheckpointError(f"Nothing can be written to {folder}: {error}") from error
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, staging, ignore_errors=True)
        try:
            write(staging)
            make_readable(staging)
            for path in staging.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            staging.chmod(0o755)
            staging.rename(folder / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Saving to {folder} failed, its old content is intact: {error}") from error
        undo.pop_all()


def _point(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to ``target``, in place of whatever it was."""
    beside = link.with_name(f"{STAGED_PREFIX}link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def _finish_switch(folder: Path) -> None:
    """Replace the links by the files of the side to which `CURRENT` points."""
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
    """Remove a folder at once: it never exists half removed under its name."""
    gone = path.with_name(f"{STAGED_PREFIX}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def link_or_copy(file: Path, name: Path) -> None:
    """Make a hard link to a file, or a copy where the file system has no hard links."""
    try:
        os.link(file.resolve(), name)
    except OSError:
        shutil.copyfile(file, name)


def make_readable(folder: Path) -> None:
    """Give the files of a folder the mode of new files: safetensors makes files that only their owner can read."""
    readable = _mode_of_a_new_file(folder)
    for path in folder.iterdir():
        path.chmod(readable)


def _mode_of_a_new_file(folder: Path) -> int:
    """The mode that the user's umask gives new files."""
    probe = folder / ".probe"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _finish(folder: Path) -> None:
    """Move the committed files to their places."""
    committed = folder / COMMITTED
    if committed.is_symlink():
        raise OSError(f"{committed} is a symbolic link, which Umbra does not make: remove it")
    if committed.is_dir():
        for path in committed.iterdir():
            path.replace(folder / path.name)
        committed.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    path.write_text(text, encoding="utf-8")


def find(folder: Path, name: str) -> Path:
    """Return the present place of a file that `write_together` wrote, also after a kill."""
    committed = folder / COMMITTED
    inside = not committed.is_symlink() and (committed / name).exists()
    return committed / name if inside else folder / name


def read_whole(folder: Path, read: Callable[[], Read], names: tuple[str, ...]) -> Read:
    """Read files that were written together; retry if a writer replaced one of them meanwhile.

    Args:
        folder: where the files are.
        read: reads them.
        names: of the files that must belong together.

    Returns:
        The result of ``read``.
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
    """The stamps of several files."""
    return [_stamp(folder, name) for name in names]


def _stamp(folder: Path, name: str) -> tuple[int, int, int] | None:
    """Inode, size and time of a file, which change when it is replaced; None if there is none."""
    for _ in range(ATTEMPTS):  # a file may be moved to its place between the two calls
        try:
            state = find(folder, name).stat()
            return state.st_ino, state.st_size, state.st_mtime_ns
        except OSError:
            continue
    return None


def check_regular(file: Path) -> None:
    """Raise an OSError unless ``file`` is a regular file, or a link to one: opening a pipe would block forever."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{file.name} is no regular file")


def read_text(file: Path, limit: int = 2**26) -> str:
    """Read a UTF-8 file.

    Args:
        file: the file.
        limit: its maximum size in bytes.

    Raises:
        OSError: it is no regular file, or too large.
        ValueError: it is not UTF-8.
    """
    check_regular(file)
    if file.stat().st_size > limit:
        raise OSError(f"{file.name} is larger than {limit:,} bytes")
    return file.read_text(encoding="utf-8")


def digest_of(files: list[Path]) -> str:
    """Return a digest of the contents of files, in their order."""
    states = ((file.absolute(), file.stat()) for file in files)
    each = "".join(_digest(file, state.st_size, state.st_mtime_ns) for file, state in states)
    return hashlib.sha256(each.encode()).hexdigest()[:16]


@cache
def _digest(file: Path, size: int, modified: int) -> str:
    """The digest of a file's content, cached by the file's size and modification time."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
