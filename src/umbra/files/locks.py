"""Lock output folders for one writer at a time; the operating system releases the lock of a killed process."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from umbra.errors import CheckpointError
from umbra.files.folder import recover
from umbra.options import is_main_process

LOCK = ".umbra-lock"  # in the folder while the lock is held; it names the holder


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold the lock of an output folder; of several launched ranks, the first one holds it for all.

    The unfinished work of a killed writer is completed or removed first.

    Args:
        folder: the folder, which is made if it does not exist.

    Raises:
        CheckpointError: another process holds the lock, or the folder cannot be written or locked.
    """
    if not is_main_process():
        yield
        return
    folder = Path(folder)
    file, made = folder / LOCK, _make(folder)
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CheckpointError(
            f"{folder} is being written by {_holder(file)}: wait for it to finish, or choose another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        with suppress(OSError):
            if file.stat().st_size == 0:  # nobody holds it
                file.unlink()
        _tidy(made)
        raise CheckpointError(
            f"{folder} cannot be locked against other writers ({error}): choose a folder that can be written, on a file "
            "system with locks."
        ) from error
    try:
        with suppress(OSError):  # a full disk: the lock holds nevertheless
            file.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        try:
            recover(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder} holds unfinished files of a killed writer, which cannot be removed: {error}"
            ) from error
        yield
    finally:
        file.unlink(missing_ok=True)  # removed by its holder alone; a waiting process then makes a new one
        lock.release()
        _tidy(made)


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents; return the new ones, the innermost first."""
    made = []
    try:
        for place in (folder, *folder.parents):
            if place.is_dir():
                break
            made.append(place)
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        kind = "a symbolic link to nothing" if folder.is_symlink() else "no folder"
        place = folder if folder.is_symlink() or folder.exists() else error.filename
        raise CheckpointError(f"{place} is {kind}: choose another output folder.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be used as an output folder: {error}. Choose another one.") from error
    return made


def _tidy(made: list[Path]) -> None:
    """Remove folders that were made for the lock and are still empty."""
    with suppress(OSError):
        for place in made:
            place.rmdir()


def _holder(file: Path) -> str:
    """The process that holds a lock, for a message."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return f"process {int(values['process'])} on {str(values['host'])[:80]!r}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
