"""Manifest of an output folder: a hidden file with the request of the command that wrote it, and the files written.

With it, the same command finishes an interrupted run or reports the present result, and `overwrite` knows Umbra's files.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
    """Content of a folder's manifest.

    Args:
        asked: the request.
        files: digests of the files that Umbra wrote, by name.
        is_complete: whether the request was finished.
        result: the command's report, as plain JSON.
    """

    asked: object
    files: dict[str, str]
    is_complete: bool
    result: list[dict[str, Any]] | None = None

    def has_written(self, out: Path, name: str) -> bool:
        """Return whether a file exists as Umbra wrote it."""
        return name in self.files and (out / name).is_file() and folder.digest_of([out / name]) == self.files[name]

    def is_intact(self, out: Path) -> bool:
        """Return whether all files exist as they were written."""
        try:
            return bool(self.files) and all(folder.digest_of([out / n]) == digest for n, digest in self.files.items())
        except OSError:
            return False

    def write(self, out: Path) -> None:
        """Replace the manifest of the folder ``out``."""
        beside = out / f"{folder.STAGED_PREFIX}manifest"
        try:
            folder.write_text(beside, json.dumps(asdict(self), indent=1) + "\n")
            beside.replace(out / MANIFEST)
        except OSError as error:
            raise CheckpointError(f"Nothing can be written to {out}: {error}") from error


@contextmanager
def writing(out: Path | str, asked: dict[str, Any], overwrite: bool) -> Iterator[Manifest]:
    """Lock an output folder while a command writes it, and record the files that it wrote.

    Args:
        out: the folder.
        asked: everything that the result depends on, as plain JSON.
        overwrite: whether to write into a folder with other content.

    Yields:
        The folder's manifest. It is complete if the folder already holds the unchanged result of this request; otherwise the
        command may set its ``result``.

    Raises:
        CheckpointError: another process writes the folder, or it has other content and ``overwrite`` is False.
    """
    out, asked = Path(out), json.loads(json.dumps(asked))
    with locked(out):
        present = read(out)
        same = present is not None and present.asked == asked
        if present is not None and same and not overwrite and present.is_complete and present.is_intact(out):
            yield present
            return
        resumes = present is not None and same and not present.is_complete
        if not overwrite and not resumes and not folder.is_empty(out):
            raise CheckpointError(f"{out} is not empty: choose another folder, or overwrite (--overwrite).")
        now, before = Manifest(asked, {} if present is None else present.files, False), _stamps(out)
        now.write(out)
        with ExitStack() as undo:
            undo.callback(_restore, out, present)
            yield now
            undo.pop_all()
        after = _stamps(out)
        written = {n: folder.digest_of([out / n]) for n, stamp in after.items() if before.get(n) != stamp}
        files = {n: digest for n, digest in now.files.items() if n in after} | written
        Manifest(asked, files, True, now.result).write(out)


def _restore(out: Path, manifest: Manifest | None) -> None:
    """Put an earlier manifest back, or remove the present one."""
    with suppress(OSError, CheckpointError):
        (out / MANIFEST).unlink() if manifest is None else manifest.write(out)


def read(out: Path) -> Manifest | None:
    """Return the manifest of a folder, or None if it has none."""
    try:
        values = json.loads(folder.read_text(out / MANIFEST))
        return Manifest(values["asked"], dict(values["files"]), bool(values["is_complete"]), values.get("result"))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def of_model(name: str) -> str:
    """Return how a request records a model or adapter: a digest of a local folder, or the hub id."""
    place = Path(name)
    if not place.is_dir():
        return name
    settled = [folder.find(place, n) for n in {p.name for kind in MODEL_FILES for p in place.glob(kind)}]
    return folder.digest_of(sorted(file for file in settled if file.is_file()))


def check_apart(out: Path | str, **inputs: str | None) -> None:
    """Check that a command does not write into a folder from which it reads.

    Args:
        out: the output folder.
        inputs: paths or hub ids by the names of their options.

    Raises:
        ConfigError: one of ``inputs`` is the output folder.
    """
    for name, path in inputs.items():
        try:
            is_same = bool(path) and Path(path or "").exists() and Path(out).exists() and Path(out).samefile(path or "")
        except (OSError, ValueError):  # no path: loading it raises the error
            continue
        if is_same:
            raise ConfigError(f"{name}={path} is the folder to write, {out}: choose another one.")


def _stamps(out: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of each file by name, which change when it is written again."""
    states = {p.name: p.stat() for p in out.iterdir() if p.is_file() and not p.name.startswith(folder.HIDDEN)}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states.items()}
