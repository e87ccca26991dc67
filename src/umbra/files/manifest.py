"""What a command has written into its output folder, and for which request: a hidden file there.

So the same command again finishes what a kill has cut off, or reports what is there already, and `overwrite` knows which
files are Umbra's.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umbra.errors import CheckpointError, ConfigError
from umbra.files import folder
from umbra.files.locks import locked

MANIFEST = f"{folder.HIDDEN}files.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model")


@dataclass
class Manifest:
    """What a folder's manifest holds.

    Args:
        asked: the request.
        files: digests of the files that Umbra wrote, by name.
        is_complete: whether the request was finished.
        result: what the command reported, as plain JSON.
    """

    asked: Any
    files: dict[str, str]
    is_complete: bool
    result: Any = None

    def has_written(self, out: Path, name: str) -> bool:
        """Whether a file is there as Umbra wrote it."""
        return name in self.files and (out / name).is_file() and folder.digest_of([out / name]) == self.files[name]

    def is_intact(self, out: Path) -> bool:
        """Whether all files are there as they were written."""
        try:
            return bool(self.files) and all(folder.digest_of([out / n]) == digest for n, digest in self.files.items())
        except OSError:
            return False

    def write(self, out: Path) -> None:
        """Replace the manifest of a folder."""
        beside = out / f"{folder.STAGED_PREFIX}manifest"
        try:
            folder.write_text(beside, json.dumps(asdict(self), indent=1) + "\n")
            beside.replace(out / MANIFEST)
        except OSError as error:
            raise CheckpointError(f"Nothing can be written to {out}: {error}") from error


@contextmanager
def writing(out: Path | str, asked: dict[str, Any], overwrite: bool) -> Iterator[Manifest]:
    """Hold an output folder while a command writes it, and note down what it has written.

    Args:
        asked: all that the result depends on, as plain JSON.

    Yields:
        The folder's manifest; complete where the folder holds the result of this request already, whole and unchanged. The
        command may leave a ``result`` in it.

    Raises:
        CheckpointError: somebody else writes there, or the folder holds something else and ``overwrite`` is False.
    """
    out, asked = Path(out), json.loads(json.dumps(asked))
    with locked(out):
        held = read(out)
        if held is not None and held.asked == asked and not overwrite and held.is_complete and held.is_intact(out):
            yield held
            return
        goes_on = held is not None and held.asked == asked and not held.is_complete
        if not overwrite and not goes_on and not folder.is_empty(out):
            raise CheckpointError(f"{out} is not empty: choose another folder, or overwrite (--overwrite).")
        now, before = Manifest(asked, {} if held is None else held.files, False), _stamps(out)
        now.write(out)
        try:
            yield now
        except BaseException:
            with suppress(OSError, CheckpointError):
                (out / MANIFEST).unlink() if held is None else held.write(out)
            raise
        after = _stamps(out)
        written = {n: folder.digest_of([out / n]) for n, stamp in after.items() if before.get(n) != stamp}
        files = {n: digest for n, digest in now.files.items() if n in after} | written
        Manifest(asked, files, True, now.result).write(out)


def read(out: Path) -> Manifest | None:
    """The manifest of a folder, if it has one."""
    try:
        values = json.loads(folder.read_text(out / MANIFEST))
        return Manifest(values["asked"], dict(values["files"]), bool(values["is_complete"]), values.get("result"))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def of_model(name: str) -> str:
    """A model or adapter as a request notes it: the content of a local folder, or a name of the hub."""
    place = Path(name)
    if not place.is_dir():
        return name
    settled = [folder.find(place, n) for n in {p.name for kind in MODEL_FILES for p in place.glob(kind)}]
    return folder.digest_of(sorted(file for file in settled if file.is_file()))


def check_apart(out: Path | str, **inputs: str | None) -> None:
    """Refuse to write into a folder from which the command reads.

    Raises:
        ConfigError: one of ``inputs``, paths or hub ids by the names of their options, is the output folder.
    """
    for name, path in inputs.items():
        try:
            is_same = bool(path) and Path(path or "").exists() and Path(out).exists() and Path(out).samefile(path or "")
        except (OSError, ValueError):  # no path: whoever loads it says so
            continue
        if is_same:
            raise ConfigError(f"{name}={path} is the folder to write, {out}: choose another one.")


def _stamps(out: Path) -> dict[str, tuple[int, int, int]]:
    """What tells whether a file is written anew, by name."""
    states = {p.name: p.stat() for p in out.iterdir() if p.is_file() and not p.name.startswith(folder.HIDDEN)}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states.items()}
