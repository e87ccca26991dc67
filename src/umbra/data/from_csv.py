"""CSV and TSV files: every cell is text, exactly as written."""

import csv
from collections.abc import Iterator
from pathlib import Path

from umbra.data.rows import LINE, Row, Rows
from umbra.data.text_files import LONGEST, form_of, numbered_lines
from umbra.errors import DataError, shown

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(path: Path) -> Rows:
    """Return the rows of a table whose first line names the columns.

    Cells are strings with their white space, also ``None``, ``007`` and empty cells. Cells in double quotes may contain delimiters
    and line ends. Blank lines are skipped.

    Raises:
        DataError: a column without a name, two columns of the same name, a row with more or fewer cells than columns, or an
            unclosed quote; with the line.
    """
    delimiter = _delimiter(path)
    records = _records(path, delimiter)
    header, line = next(records, ([], 1))
    for number, name in enumerate(header, start=1):
        if not name.strip():
            raise DataError(
                f"{path}:{line}: column {number} of {len(header)} has no name: name it, or leave it out (pandas writes an "
                "unnamed index unless index=False)."
            )
        if header.index(name) < number - 1:
            raise DataError(f"{path}:{line}: two columns are named {shown(name)}: rename one.")
    return Rows.of(str(path), LINE, _rows(path, delimiter, header, records))


def _rows(
    path: Path, delimiter: str, header: list[str], records: Iterator[tuple[list[str], int]]
) -> Iterator[tuple[Row, int, int]]:
    for number, (cells, line) in enumerate(records, start=1):
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{line} has {len(cells)} cells, separated by {DELIMITERS[delimiter]}, for {len(header)} columns "
                f"({', '.join(map(shown, header[:8]))}): {shown(cells)}. Put cells that hold the separator into double quotes."
            )
        yield dict(zip(header, cells, strict=True)), number, line


def _delimiter(path: Path) -> str:
    """Return the delimiter: the usual one for the file's name, unless the first line has several cells only with another."""
    usual = "\t" if form_of(path) in (".tsv", ".tab") else ","
    first = next((line for _, line in numbered_lines(path) if line.strip()), "")

    def cells(delimiter: str) -> int:
        try:
            return len(next(csv.reader([first], delimiter=delimiter), []))
        except csv.Error:  # raised again when the rows are read
            return 0

    return next((d for d in (usual, *DELIMITERS) if cells(d) > 1), usual)


def _records(path: Path, delimiter: str) -> Iterator[tuple[list[str], int]]:
    """Yield the cells of each record, and the line on which it begins."""
    limit = csv.field_size_limit(LONGEST)
    reader = csv.reader((line for _, line in numbered_lines(path)), delimiter=delimiter, strict=True)
    single = None
    try:
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise _not_csv(path, line, reader.line_num, error) from None
            if cells is None:
                return
            single = len(cells) == 1 if single is None and cells else single
            if cells and (single or len(cells) > 1 or cells[0].strip()):
                yield cells, line
    finally:
        csv.field_size_limit(limit)


def _not_csv(path: Path, line: int, last: int, error: csv.Error) -> DataError:
    reason = str(error)
    if "new-line character" in reason:
        reason = "a carriage return stands within a line; convert the line ends (`tr '\\r' '\\n'`)"
    elif "end of data" in reason or "field larger" in reason:
        reason = f"a cell in double quotes begins in this row and does not end by line {last}"
    elif "expected after" in reason:
        reason = (
            f"text follows a closing double quote in line {last}; a double quote within a quoted cell is written twice, and a "
            "cell that begins with one is put into quotes"
        )
    return DataError(f"{path}:{line} is not CSV: {reason}.")
