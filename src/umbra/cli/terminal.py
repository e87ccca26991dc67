"""The process around a command: its import path, its standard streams, and one line for an error.

Standard streams are plain while a command runs: names in configurations, records and model output cannot send control
sequences to a terminal, and characters that the encoding of the stream lacks are escaped.
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from umbra.errors import CONTROLS, UmbraError, one_line, shown

BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it
TALKATIVE = ("torchao", "torch.utils._pytree")  # loggers that warn about their installation on import
PROGRESS = re.compile(rf"(\r|\x1b\[A)|{CONTROLS.pattern}")  # control sequences of progress bars
REMEDIES = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some space there, or choose another place",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ELOOP: "remove the symbolic link that leads back to itself",
    errno.ENAMETOOLONG: "shorten it: a name has at most 255 bytes, a path 4,096",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "check the name: a part of it is a file",
    errno.EISDIR: "name a file",
    errno.EEXIST: "remove it, or choose another name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "free some memory, or lower the batch size",
}


def isolate() -> None:
    """Keep this process, and those that it starts, from importing anything from the working folder.

    ``python -m`` and empty entries of PYTHONPATH put the working folder on the import path, ahead of installed packages.
    """
    here = _resolved("")
    if here != _resolved(str(Path(__file__).parents[1])):  # else Umbra itself is imported from there
        sys.path[:] = [entry for entry in sys.path if _resolved(entry) != here]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if any(paths):
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p and _resolved(p) != here)
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ.setdefault(
        "DISABLE_SAFETENSORS_CONVERSION", "1"
    )  # for which transformers would call a service on the hub
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also transformers' loading bars
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for descriptor in range(3):  # the next opened file would take a closed one
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _resolved(entry: str) -> str:
    with suppress(OSError, ValueError):
        return os.path.realpath(entry or os.curdir)
    return entry


class PlainStream:
    """A text stream that escapes control characters, and characters that its encoding lacks.

    Args:
        stream: the stream to write to.
        shows_progress: whether the sequences of progress bars pass unescaped.
    """

    def __init__(self, stream: TextIO, shows_progress: bool = False):
        self.stream = stream
        self.pattern = PROGRESS if shows_progress else CONTROLS
        self.is_raw = False
        self.failure: OSError | None = None  # argparse ignores a failed write, and the stream forgets it

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        if not self.is_raw:
            text = self.pattern.sub(_escape, text)
        encoding = self.stream.encoding or "utf-8"
        self._attempt(lambda: self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        """Flush the stream.

        Raises:
            OSError: the flush failed, or an earlier write.
        """
        if self.failure is not None:
            raise self.failure
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            self.failure = error
            raise

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _escape(match: re.Match) -> str:
    progress = match[1] if match.re is PROGRESS else None
    return progress or f"\\u{ord(match[0]):04x}"


@contextmanager
def plain_streams() -> Iterator[None]:
    """Make both standard streams plain; if standard output is closed, results go to standard error."""
    before = sys.stdout, sys.stderr
    nowhere = None if sys.stderr else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = cast(TextIO, PlainStream(sys.stderr or cast(TextIO, nowhere), shows_progress=True))
    sys.stdout = cast(TextIO, PlainStream(sys.stdout)) if sys.stdout else sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if nowhere is not None:
            nowhere.close()


@contextmanager
def raw_output() -> Iterator[None]:
    """Write to standard output unescaped, unless it is a terminal."""
    stream: object = sys.stdout
    if not isinstance(stream, PlainStream) or stream.isatty():
        yield
        return
    stream.is_raw = True
    try:
        yield
    finally:
        stream.is_raw = False


def say(text: str) -> None:
    """Print and flush a result; to standard error if standard output fails, since computing it may have taken hours.

    Raises:
        OSError: standard output failed.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        print(text, file=sys.stderr)
        raise


def abandon_output() -> None:
    """Redirect a failed standard output to the null device, since the interpreter flushes it once more on exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def message_of(error: BaseException) -> str | None:
    """Return the one-line message of an error that a user can correct; None for any other error."""
    if isinstance(error, UmbraError):
        remedy = REMEDIES.get(error.__cause__.errno or 0) if isinstance(error.__cause__, OSError) else None
        return one_line(f"{str(error).rstrip('.')}: {remedy}." if remedy else str(error))
    if isinstance(error, OSError):
        return one_line(_system_message(error))
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return one_line(
            f"Not enough memory ({text[:200] or 'MemoryError'}): lower the batch size, or use a smaller base."
        )
    if "PytorchStreamWriter" in text or "No space left" in text or "StorageFull" in text:
        return one_line(f"A file could not be written ({text[:200]}): free some space there, or choose another place.")
    if isinstance(error, ImportError):
        missing = (error.name or "").partition(".")[0]
        return one_line(f"{text[:300]}: install it, pip install {missing}." if missing else f"{text[:300]}.")
    if isinstance(error, UnicodeError):
        return one_line(f"A text cannot be read or written ({text[:200]}): save it as UTF-8.")
    return None


def _system_message(error: OSError) -> str:
    if "usable temporary directory" in str(error):
        return f"{error.strerror}: set TMPDIR to a folder that can be written."
    place = f"{shown(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
    remedy = REMEDIES.get(error.errno or 0)
    reason = error.strerror or str(error)[:300] or type(error).__name__
    return f"{place}{reason}{f': {remedy}' if remedy else ''}."


def place_of(error: BaseException) -> str:
    """Return the file and line that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "unknown place" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
