"""One writer for each output folder: a lock of the operating system, which a killed process gives back."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from umbra.errors import CheckpointError
from umbra.files.folder import settle
from umbra.options import speaks

LOCK = ".umbra-lock"  # in the folder, while it is held; its content says by whom


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold the lock of an output folder, which is made if need be; of launched ranks the first one holds it for all.

    What a killed writer has left half done in the folder is finished or taken away first.

    Raises:
        CheckpointError: another process holds it, which is named; or the folder cannot be written, or not be locked.
    """
    if not speaks():
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
            if file.stat().st_size == 0:  # of nobody who holds it
                file.unlink()
        _tidy(made)
        raise CheckpointError(
            f"{folder} cannot be locked against other writers ({error}): choose a folder that can be written, on a file "
            "system that has locks."
        ) from error
    try:
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        try:
            settle(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder} holds what a killed writer has left, which cannot be tidied: {error}"
            ) from error
        yield
    finally:
        file.unlink(missing_ok=True)  # by its holder alone; who waits for this file then looks for a new one
        lock.release()
        _tidy(made)


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; which ones there were not, the innermost first."""
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
    """Take away folders that were made for the lock and in which nothing was written."""
    with suppress(OSError):
        for place in made:
            place.rmdir()


def _holder(file: Path) -> str:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return f"process {int(values['process'])} on {str(values['host'])[:80]!r}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
