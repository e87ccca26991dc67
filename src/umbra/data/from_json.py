"""JSON files: one object per line, or one array of objects; read strictly, so that no value is changed or lost silently."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umbra.data.rows import LINE, RECORD, Row, Rows
from umbra.data.text_files import LONGEST, numbered_lines, pieces
from umbra.errors import DataError, shown

DEEPEST = 100  # levels of lists and objects in one another
COLUMNS = {"prompt", "completion", "messages", "text"}  # one of which each record has
WRAPPERS = ("data", "rows", "records", "examples", "instances", "items", "train", "validation", "test")


class _Refused(ValueError):
    """A value that JSON allows but that readers interpret differently."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"has the key {shown(twice)} twice in one object")
    return members


def _constant(name: str) -> float:
    raise _Refused(f"holds {name}, which is not a number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused(f"holds the number {shown(text)}, which is too large")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def read_json(path: Path) -> Rows:
    """Return the objects of a file of JSON lines or of one JSON array. Blank lines are skipped.

    Integers keep all their digits.

    Raises:
        DataError: a line or an element that is not an object with columns, a key that occurs twice in an object, NaN,
            Infinity, half of a character (a lone surrogate), or more than `DEEPEST` levels; with the line.
    """
    first = next((piece.lstrip() for piece in pieces(path) if piece.strip()), "")
    if first.startswith("["):
        return Rows.of(str(path), RECORD, _elements(path))
    rows = Rows.of(str(path), LINE, _lines(path))
    if len(rows) == 1:
        _check_wrapped(rows[0], rows.where(0), path)
    return rows


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, read as strictly as a file's.

    Raises:
        ValueError: the text is refused.
    """
    value = DECODER.decode(text)
    _check_value(value, text)
    return value


def _check_value(value: object, text: str) -> None:
    if "\\u" in text and "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Refused("holds half of a character (a lone surrogate)") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value, DEEPEST):
        raise _Refused(f"is nested more than {DEEPEST} levels deep")


def _is_deeper(value: object, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        lists = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [inner for one in lists for inner in one]
    return bool(level)


def _check_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a JSON {type(value).__name__}, {shown(value)}"
        raise DataError(f"{where} is {kind}, not an object with columns.")
    if not value:
        raise DataError(f"{where} is an empty object, which has no columns: leave it out.")
    return value


# -- lines -------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[Row, int, int]]:
    count = 0
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        count += 1
        try:
            value = parse_json(line)
        except (ValueError, RecursionError) as error:
            hint = _hint_over_lines(path) if count == 1 and isinstance(error, json.JSONDecodeError) else None
            if hint:
                raise DataError(f"{path}:{number} {hint}") from None
            raise _not_json(f"{path}:{number}", error, line) from None
        yield _check_row(value, f"{path}:{number}"), count, number


def _not_json(where: str, error: Exception, line: str) -> DataError:
    if isinstance(error, _Refused):
        return DataError(f"{where} {error}: mend it, or leave it out.")
    if isinstance(error, RecursionError):
        return DataError(f"{where} is not JSON that can be read: it is nested more than {DEEPEST} levels deep.")
    if not isinstance(error, json.JSONDecodeError):  # an integer of thousands of digits
        return DataError(f"{where} is not JSON: {error!s:.80}.")
    near = shown(line[max(0, error.pos - 20) : error.pos + 20].strip())
    return DataError(
        f"{where} is not JSON: {error.msg} at column {error.colno}, near {near}. Each line must be one JSON object."
    )


def _hint_over_lines(path: Path) -> str | None:
    """Return how to fix a file whose first object extends over several lines; None if it does not."""
    window = _Window(path)
    try:
        window.next_character()
        line, value = window.line, window.value()
        is_whole = not window.next_character()
    except DataError:
        return None
    if not isinstance(value, dict) or window.line == line:
        return None
    hint = _hint_of_lists(value, path) if is_whole else None
    return hint or f"begins an object over several lines; write each on one: jq -c . {path} > {path.stem}.jsonl"


def _hint_of_lists(value: Row, path: Path) -> str | None:
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if not lists or COLUMNS & lists.keys():
        return None
    counts = ", ".join(f"{shown(key)} has {len(rows)} objects" for key, rows in lists.items())
    key = next(iter(lists))
    return (
        f"is one object around the records ({counts}): write the list alone, "
        f"such as by jq -c '.{key}[]' {path} > {path.stem}.jsonl"
    )


def _check_wrapped(row: Row, where: str, path: Path) -> None:
    """Raise a DataError if the only object of a file is a wrapper around the records."""
    lists = {} if COLUMNS & row.keys() else {k: v for k, v in row.items() if k in WRAPPERS}
    if hint := _hint_of_lists(lists, path):
        raise DataError(f"{where} {hint}")


# -- an array ----------------------------------------------------------------------------------------------------------


class _Window:
    """A window that moves forward over a JSON text: ``text`` from ``at`` on is unread, and begins on ``line``."""

    def __init__(self, path: Path) -> None:
        self.path, self.pieces, self.text, self.at, self.line = path, pieces(path), "", 0, 1

    def more(self) -> bool:
        """Double the unread text, and return whether there was more."""
        unread = self.text[self.at :]
        added, size = [], 0
        while size <= len(unread) and (piece := next(self.pieces, None)) is not None:
            added.append(piece)
            size += len(piece)
        self.text, self.at = unread + "".join(added), 0
        return size > 0

    def move(self, end: int) -> None:
        """Move to ``end``."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next_character(self) -> str:
        """Move to the next character that is not white space and return it; an empty string at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.move(end)
            if end < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """Return the value that begins here, and move past it."""
        where = f"{self.path}:{self.line}"
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                _check_value(value, self.text[self.at : end])
                self.move(end)
                return value
            except json.JSONDecodeError as error:
                wrong = error
            except (ValueError, RecursionError) as error:
                raise _not_json(where, error, "") from None
            if len(self.text) - self.at > LONGEST:
                raise DataError(f"{where}: the record that begins here is longer than {LONGEST:,} characters.")
            begin = self.at
            if not self.more():
                line = self.line + self.text.count("\n", 0, wrong.pos - begin)
                near = shown(self.text[max(0, wrong.pos - begin - 20) : wrong.pos - begin + 20].strip())
                raise DataError(f"{self.path}:{line} is not JSON: {wrong.msg}, near {near}.")


def _elements(path: Path) -> Iterator[tuple[Row, int, int]]:
    window, number = _Window(path), 0
    mark = window.next_character()  # the bracket
    while mark != "]":
        window.move(window.at + 1)
        if window.next_character() == "]" and not number:
            break
        number, line = number + 1, window.line
        yield _check_row(window.value(), f"{path}, record {number} (line {line})"), number, line
        mark = window.next_character()
        if mark not in (",", "]"):
            what = f"{shown(mark)} stands" if mark else "the file ends"
            raise DataError(f"{path}:{window.line} is not JSON: {what} where a comma or the end of the array should.")
    window.move(window.at + 1)
    if window.next_character():
        raise DataError(f"{path}:{window.line} is not JSON: there is more after the end of the array.")
