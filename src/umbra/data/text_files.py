"""Text files: opening, decompressing and decoding them within limits, and cutting them at line feeds only.

A line ends at U+000A, as in editors. Other line ends of Unicode (U+2028, a form feed, NEL) are text.
"""

import bz2
import codecs
import functools
import gzip
import io
import itertools
import lzma
import os
import re
import shlex
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from umbra.errors import DataError, shown

TEXT_FILES = (".txt", ".md")
LONGEST = 2**26  # bytes of one line, or characters of one record
EXPANDS = 2**26  # bytes that any compressed file may become,
RATIO = 120  # and how many times its size where that is more
PIECE = 2**20
KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe (FIFO)", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip


def _open_zstd(file: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


class Compression(NamedTuple):
    """A format by the end of a file's name and by its first bytes, and the program that decompresses it."""

    suffix: str
    program: str
    magic: bytes
    open: Callable[[Any], Any]


COMPRESSIONS = (
    Compression(".gz", "gzip", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    Compression(".bz2", "bzip2", b"BZh", bz2.BZ2File),
    Compression(".xz", "xz", b"\xfd7zXZ\0", lzma.LZMAFile),
    Compression(".zst", "zstd", b"\x28\xb5\x2f\xfd", _open_zstd),
)
NO_TEXT = {
    b"PK\x03\x04": "a zip archive (or an Excel file): unpack it (`unzip`), or save the sheet as CSV UTF-8",
    b"PK\x05\x06": "an empty zip archive",
    b"PAR1": "a Parquet file: end its name in .parquet",
    b"ARROW1": "an Arrow file: end its name in .arrow",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"SQLite": "an SQLite database: export the table as CSV",
}
BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF8, "UTF-8"),
        (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))  # fmt: skip

BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # in no text of an encoding that is a superset of ASCII
# Encodings that would decode one another's text, each with the letters that show it and their share of what is not ASCII.
SCRIPTS = (
    ("SHIFT_JIS", "\u3040", "\u30ff", 0.2),
    ("EUC-KR", "\uac00", "\ud7a3", 0.7),
    ("GB18030", "\u4e00", "\u9fff", 0.5),
)


def form_of(path: Path) -> str:
    """Return the suffix that determines a file's format, in lower case, such as ``.jsonl`` of ``a.JSONL.gz``."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression.suffix)
    return Path(name).suffix


def check_file(path: Path) -> None:
    """Check that a path is a regular file, without opening it.

    Raises:
        DataError: no such file, or a folder, pipe, socket or device.
    """
    with reading(path):
        mode = path.stat().st_mode
    kind = next((name for test, name in KINDS.items() if test(mode)), None)
    if kind:
        hint = "" if kind == "a folder" else ": write its content to a file, and name that"
        raise DataError(f"{path} cannot be read: it is {kind}, not a file{hint}.")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a DataError for errors in opening and decompressing ``path``."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} cannot be read: no such file.") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path!s:.300} cannot be read: {reason}.") from error


# -- bytes: decompressed, as UTF-8 without a byte-order mark -----------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a text file as UTF-8.

    Raises:
        DataError: no regular file, a damaged file, one that is too large when decompressed, no text, or an unsupported encoding.
    """
    check_file(path)
    with reading(path), path.open("rb", buffering=PIECE) as file:
        stream: Any = file
        compression = _compression(path, stream.peek(8))
        if compression:
            about = os.fstat(file.fileno())
            _check_expansion(path, compression, about.st_size, about.st_mtime_ns)
            stream = io.BufferedReader(_Expanding(compression.open(stream), path, about.st_size), PIECE)
        head = stream.peek(64)[:64]
        _check_text(path, head)
        encoding = _encoding(path, head)
        if encoding == "UTF-16":
            stream = io.BufferedReader(_Utf8(stream, path), PIECE)
        elif head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


def _compression(path: Path, head: bytes) -> Compression | None:
    by_content = next((c for c in COMPRESSIONS if head.startswith(c.magic)), None)
    by_name = next((c for c in COMPRESSIONS if path.name.lower().endswith(c.suffix)), None)
    if by_name and by_name is not by_content:
        raise DataError(
            f"{path} cannot be read: it is not a {by_name.suffix} file, though its name ends so: rename it."
        )
    return by_content


def _check_text(path: Path, head: bytes) -> None:
    for magic, kind in NO_TEXT.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {kind}.")
    if any(head.startswith(c.magic) for c in COMPRESSIONS):
        raise DataError(f"{path} is compressed twice: decompress it once.")


def _encoding(path: Path, head: bytes) -> str:
    encoding = next((name for bom, name in BOMS if head.startswith(bom)), "UTF-8")
    pairs = head[: len(head) // 2 * 2]
    for name, zeros, others in (("UTF-16LE", pairs[1::2], pairs[::2]), ("UTF-16BE", pairs[::2], pairs[1::2])):
        if encoding == "UTF-8" and len(pairs) > 2 and not any(zeros) and all(others):
            encoding = name
    if encoding not in ("UTF-8", "UTF-16"):
        raise DataError(f"{path}:1 is not UTF-8 but seems to be {encoding}: {_convert(path, encoding)}")
    return encoding


def _convert(path: Path, encoding: str) -> str:
    file, result = shlex.quote(str(path)), shlex.quote(f"utf8-{path.name}")
    program = next((c.program for c in COMPRESSIONS if path.name.lower().endswith(c.suffix)), None)
    convert = f"iconv -f {encoding} -t UTF-8"
    command = f"{program} -dc {file} | {convert} | {program}" if program else f"{convert} {file}"
    return f"convert it (`{command} > {result}`)."


@functools.cache
def _check_expansion(path: Path, compression: Compression, size: int, modified: int) -> None:
    """Decompress a file once, without storing it, to detect a compression bomb before any row takes memory."""
    with path.open("rb", buffering=PIECE) as file:
        stream = _Expanding(compression.open(file), path, size)
        buffer = bytearray(PIECE)
        while stream.readinto(buffer):
            pass


class _Expanding(io.RawIOBase):
    """A decompressed stream that raises a DataError beyond `EXPANDS` bytes and `RATIO` times the size of the file."""

    def __init__(self, stream: IO[bytes], path: Path, size: int) -> None:
        self.stream, self.path, self.limit, self.read_bytes = stream, path, max(EXPANDS, RATIO * size), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview | bytearray) -> int:
        piece = self.stream.read(len(buffer))
        buffer[: len(piece)] = piece
        self.read_bytes += len(piece)
        if self.read_bytes > self.limit:
            raise DataError(
                f"{self.path} cannot be read: it expands to more than {RATIO} times its size, {self.limit:,} bytes, as a "
                "compression bomb does. If this is intended, decompress it and name the result."
            )
        return len(piece)


class _Utf8(io.RawIOBase):
    """A UTF-16 stream with a byte-order mark, as UTF-8."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.stream, self.path, self.pending, self.line = stream, path, b"", 1
        self.decoder = codecs.getincrementaldecoder("utf-16")()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview | bytearray) -> int:
        while not self.pending:
            piece = self.stream.read(2**16)
            try:
                self.pending = self.decoder.decode(piece, final=not piece).encode()
            except UnicodeDecodeError as error:
                line = self.line + bytes(error.object)[: error.start].decode("utf-16-le", "ignore").count("\n")
                raise DataError(f"{self.path}:{line} is not UTF-16, though the file begins as such: mend it.") from None
            self.line += self.pending.count(b"\n")
            if not piece:
                break
        size = min(len(buffer), len(self.pending))
        buffer[:size], self.pending = self.pending[:size], self.pending[size:]
        return size


# -- text --------------------------------------------------------------------------------------------------------------


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, each with its number and its line feed.

    Raises:
        DataError: see `opened`; or bytes that are not UTF-8, or a line of more than `LONGEST` bytes.
    """
    with opened(path) as stream:
        for number in itertools.count(1):
            line = stream.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                raise DataError(f"{path}:{number} is longer than {LONGEST:,} bytes: one record is one line.")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, line, error) from None
            yield number, text


def pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file, about a megabyte at a time.

    Raises:
        DataError: see `opened`; or bytes that are not UTF-8.
    """
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with opened(path) as stream:
        piece = b"?"
        while piece:
            piece = stream.read(PIECE)
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise _not_utf8(path, line, bytes(error.object), error) from None
            line += text.count("\n")
            yield text


def read_text(path: Path) -> str:
    """Return the whole text of a file, with lines ended by line feeds.

    Raises:
        DataError: see `pieces`.
    """
    return "".join(pieces(path)).replace("\r\n", "\n")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, each with its number, without surrounding spaces and tabs."""
    for number, line in numbered_lines(path):
        if text := line.strip(" \t\r\n"):
            yield number, text


def _not_utf8(path: Path, number: int, text: bytes, error: UnicodeDecodeError) -> DataError:
    first, last = text.rfind(b"\n", 0, error.start) + 1, text.find(b"\n", error.start)
    line = text[first : last if last >= 0 else len(text)]
    if BINARY.search(line):
        return DataError(
            f"{path}:{number} is not text but binary data (byte 0x{text[error.start]:02x}): name a text file."
        )
    encoding = _suspected(line)
    near = line[max(0, error.start - first - 20) : error.start - first + 20].decode(encoding or "utf-8", "replace")
    at = f"byte 0x{text[error.start]:02x}, as in {shown(near)}"
    if encoding is None:
        return DataError(f"{path}:{number} is damaged UTF-8 ({at}): mend this line, or leave it out.")
    return DataError(f"{path}:{number} is not UTF-8 but seems to be {encoding} ({at}): {_convert(path, encoding)}")


def _suspected(line: bytes) -> str | None:
    """Return the likeliest encoding of a line that is not UTF-8; None if most of it is.

    Single high bytes suggest a western encoding, runs of them another one.
    """
    decoded = line.decode("utf-8", "replace")
    if sum(character > "\x7f" for character in decoded) > 2 * decoded.count("�"):
        return None
    runs = re.findall(rb"[\x80-\xff][\x40-\xff]*", line)
    high = [byte for run in runs for byte in run if byte >= 0x80]
    if 3 * len(runs) > len(high):
        return "WINDOWS-1252"
    if all(byte >= 0xC0 or byte in b"\xa8\xb8" for byte in high):
        return "WINDOWS-1251"
    for encoding, first, last, share in SCRIPTS:
        foreign = [character for character in line.decode(encoding, "replace") if character > "\x7f"]
        if "�" not in foreign and sum(first <= character <= last for character in foreign) > share * len(foreign):
            return encoding
    return "WINDOWS-1252"
