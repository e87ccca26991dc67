"""Files in, rows out: every form as it is written, and every refusal with file, line and value."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import socket
import subprocess
import time
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import umbra
from support.tokenizer import make_tokenizer
from umbra.cli import main
from umbra.data import ChatFormatter, Rows, local_files, read_records, read_rows, text_files
from umbra.data.corpus import read_documents
from umbra.data.generated_text import read_prompts
from umbra.data.splits import parse_split, read_split
from umbra.deploy.export.vocabulary import read_texts

ROWS = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(10)]


def put(path: Path, content: str | bytes | list) -> str:
    """Write text, bytes, or rows as JSON lines; return the path as text."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(source, *says: str, split: str = "train") -> str:
    """The message with which a source is refused; it holds all of ``says``."""
    with pytest.raises(umbra.DataError) as error:
        read_rows(source, split)
    for part in says:
        assert part in str(error.value), str(error.value)
    assert len(str(error.value)) < 1200
    return str(error.value)


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.ndjson", "d.JSONL"])
def test_json_lines_are_read_with_line_numbers(tmp_path, name):
    rows = read_rows(put(tmp_path / name, '\ufeff\n{"text": "a"}\r\n  \n\n{"text": "b\\u2028"}\n'))
    assert rows == [{"text": "a"}, {"text": "b\u2028"}]
    assert list(rows.places()) == [f"{tmp_path / name}:2", f"{tmp_path / name}:5"]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_is_read_with_record_and_line_numbers(tmp_path, name, indent):
    rows = read_rows(put(tmp_path / name, "\n" + json.dumps(ROWS[:3], indent=indent) + "\n"))
    assert rows == ROWS[:3]
    assert rows.where(2) == f"{tmp_path / name}, record 3 (line {11 if indent else 2})"


def test_large_json_array_is_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 7)
    rows = [{"text": "é\n" * i, "n": [{"a": 10**i}] * i} for i in range(30)]
    read = read_rows(put(tmp_path / "d.json", json.dumps(rows, indent=1, ensure_ascii=False)))
    assert read == rows
    line = int(read.where(29).partition("(line ")[2].rstrip(")"))
    assert line == json.dumps(rows[:29], indent=1).count("\n") + 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n{"a": \n', ["d.json:2 is not JSON", "column", "{\"a\":"]),
        ('{"a": 1}\n{\'a\': 2}\n', ["d.json:2 is not JSON", "{'a'"]),
        ('{"a": 1}\n\nnull\n', ["d.json:3 is null, not an object"]),
        ('{"a": 1}\n[1, 2]\n', ["d.json:2 is a JSON list, [1, 2]"]),
        ('{"a": 1}\n{}\n', ["d.json:2 is an empty object"]),
        ('{"a": 1, "b": 2, "a": 3}\n', ["d.json:1 has the key 'a' twice"]),
        ('{"a": {"b": 1, "b": 1}}\n', ["d.json:1 has the key 'b' twice"]),
        ('{"a": NaN}\n', ["d.json:1 holds NaN"]),
        ('{"a": -Infinity}\n', ["d.json:1 holds -Infinity"]),
        ('{"a": 1e999}\n', ["d.json:1 holds the number '1e999'"]),
        ('{"a": "\\ud800"}\n', ["d.json:1 holds half of a character"]),
        ('{"\\udfff": 1}\n', ["d.json:1 holds half of a character"]),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}\n", ["d.json:1 is nested more than 100 levels"]),
        ('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}\n", ["d.json:1", "nested more than 100 levels"]),
        ('{"a": 1}\x00\n', ["d.json:1 is not JSON"]),
        ('{"data": [{"text": "a"}]}\n', ["d.json:1 is one object around the records", "'data' has 1 objects", "jq -c '.data[]'"]),
        ('{\n "data": [\n  {"text": "a"}\n ]\n}', ["d.json:1 is one object around the records", "jq -c '.data[]'"]),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}', ["d.json:1 begins an object over several lines", "jq -c ."]),
        ("[]", ["contains no record"]),
        (" \n\n", ["contains no record"]),
        ("", ["contains no record"]),
        ('[{"a": 1},\n {"a": \n ]', ["d.json:3 is not JSON", "near"]),
        ('[{"a": 1},\n 3]', ["record 2 (line 2) is a JSON int, 3"]),
        ('[{"a": 1},\n null]', ["record 2 (line 2) is null"]),
        ('[{"a": 1}\n {"a": 2}]', ["d.json:2 is not JSON", "'{' stands where a comma"]),
        ('[{"a": 1},\n]', ["d.json:2 is not JSON"]),
        ('[{"a": 1}', ["d.json:1 is not JSON", "the file ends"]),
        ('[{"a": 1}]\n{"a": 2}', ["d.json:2 is not JSON", "after the end of the array"]),
        ('[{"a": 1},\n{"a": NaN}]', ["d.json:2 holds NaN"]),
        ('[{"a": 1},\n{"a": 1, "a": 2}]', ["d.json:2 has the key 'a' twice"]),
    ],
)  # fmt: skip
def test_ambiguous_json_is_refused_with_its_line(tmp_path, text, says):
    refused(put(tmp_path / "d.json", text), *says)


def test_json_numbers_keep_their_digits(tmp_path):
    rows = read_rows(put(tmp_path / "d.jsonl", '{"a": 9223372036854775809, "b": 0.1, "c": 1e300}\n'))
    assert rows == [{"a": 2**63 + 1, "b": 0.1, "c": 1e300}]


def test_single_messages_record_is_not_a_wrapper(tmp_path):
    record = {"messages": [{"role": "user", "content": "a"}], "data": [{"x": 1}]}
    assert read_rows(put(tmp_path / "d.json", [record])) == [record]
    assert read_rows(put(tmp_path / "e.json", [{"messages": record["messages"]}])) == [{"messages": record["messages"]}]


def test_gigabyte_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST", 1000)
    refused(put(tmp_path / "d.jsonl", '{"a": 1}\n{"a": "' + "x" * 2000), "d.jsonl:2 is longer than 1,000 bytes")


# -- CSV ---------------------------------------------------------------------------------------------------------------

WORDS = [
    "None",
    "NA",
    "null",
    "NaN",
    "007",
    "7",
    "1.0",
    "0.0",
    "true",
    "5.50",
    "02108",
    "",
    " x ",
    "1e5",
    "é",
    "-",
    "1,5",
]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("d.csv", ","), ("d.tsv", "\t"), ("d.csv", ";"), ("d.csv", "\t"), ("d.tab", "\t")]
)
def test_cells_stay_text_as_written(tmp_path, name, delimiter):
    """Cases 10 and 11."""
    lines = [
        f'q{i}{delimiter}"{word}"' if delimiter in word else f"q{i}{delimiter}{word}" for i, word in enumerate(WORDS)
    ]
    rows = read_rows(put(tmp_path / name, "\n".join([f"prompt{delimiter}completion", *lines]) + "\n"))
    assert [row["completion"] for row in rows] == WORDS
    assert rows.where(3) == f"{tmp_path / name}:5"


def test_quoted_newlines_blank_lines_and_bom_are_read(tmp_path):
    text = '\ufefftext,label\r\n"a\r\nb\u2028""c"", d",x\r\n\r\n   \r\n' + f'"{"long " * 40000}",y\r\n'
    rows = read_rows(put(tmp_path / "d.csv", text))
    assert [row["text"] for row in rows] == ['a\r\nb\u2028"c", d', "long " * 40000]
    assert list(rows.places()) == [f"{tmp_path / 'd.csv'}:2", f"{tmp_path / 'd.csv'}:6"]


def test_single_column_may_have_blank_cells(tmp_path):
    assert read_rows(put(tmp_path / "d.csv", 'text\na;b\n""\n\n c\n')) == [
        {"text": "a;b"},
        {"text": ""},
        {"text": " c"},
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n1,2,3\n", ["d.csv:3 has 3 cells, separated by commas, for 2 columns ('a', 'b'): ['1', '2', '3']"]),
        ("a,b\n1,2\n\n7\n", ["d.csv:4 has 1 cells", "['7']"]),
        ("a,b,a\n1,2,3\n", ["d.csv:1: two columns are named 'a'"]),
        ("a,b,\n1,2,\n", ["d.csv:1: column 3 of 3 has no name"]),
        (",a,b\n0,1,2\n", ["column 1 of 3 has no name", "index=False"]),
        ('a,b\n1,2\n"x,2\n3,4\n', ["d.csv:3 is not CSV", "does not end by line 4"]),
        ('a,b\n"x"y,2\n', ["d.csv:2 is not CSV", "closing double quote"]),
        ("a,b\r1,2\r", ["d.csv:1 is not CSV", "carriage return"]),
        ("a,b\n", ["contains no record"]),
        ("", ["contains no record"]),
    ],
)
def test_ragged_table_is_refused_with_its_line(tmp_path, text, says):
    refused(put(tmp_path / "d.csv", text), *says)


# -- encodings and compression -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt"])
def test_utf_8_and_utf_16_with_bom_are_read(tmp_path, name, encoding):
    words = ["café 😀", "日本\u0a0a語"]
    form = {"d.jsonl": [json.dumps({"text": w}, ensure_ascii=False) for w in words], "d.csv": ["text", *words], "d.txt": words,
            "d.json": [json.dumps([{"text": w} for w in words], ensure_ascii=False)]}[name]  # fmt: skip
    text = ("\ufeff" if encoding.endswith(("le", "be")) else "") + "\n".join(form) + "\n"
    path = put(tmp_path / name, text.encode(encoding))
    assert read_prompts(path) == words
    if name != "d.txt":
        assert [row["text"] for row in read_rows(path)] == words


@pytest.mark.parametrize(
    ("encoding", "text", "suspected"),
    [
        ("cp1252", "un café crème à l’œil", "WINDOWS-1252"),
        ("cp1251", "привет, мир", "WINDOWS-1251"),
        ("gb18030", "今天天气很好，我们去公园。", "GB18030"),
        ("euc-kr", "오늘은 날씨가 좋습니다", "EUC-KR"),
        ("shift_jis", "これはペンです。日本語", "SHIFT_JIS"),
        ("utf-16-le", "plain text", "UTF-16LE"),
        ("utf-16-be", "plain text", "UTF-16BE"),
        ("utf-32", "plain text", "UTF-32"),
    ],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_other_encodings_are_refused_with_line_and_fix(tmp_path, name, encoding, text, suspected):
    lines = {
        "d.jsonl": ['{"text": "a"}', '{"text": "%s"}'],
        "d.json": ['[{"text": "a"},', '{"text": "%s"}]'],
        "d.csv": ["text", "%s"],
    }
    line = 2 if encoding[:3] != "utf" else 1
    path = put(tmp_path / name, ("\n".join(lines[name]) % text + "\n").encode(encoding))
    refused(
        path,
        f"{name}:{line} is not UTF-8 but seems to be {suspected}",
        f"iconv -f {suspected} -t UTF-8 {path} > utf8-{name}",
    )


def test_suggested_encoding_fix_works(tmp_path):
    path = put(tmp_path / "my d.csv.gz", gzip.compress("text\ncafé\n".encode("cp1252")))
    command = refused(path, "my d.csv.gz:2").partition("`")[2].partition("`")[0]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_rows(str(tmp_path / "utf8-my d.csv.gz")) == [{"text": "café"}]


def test_damaged_utf_8_is_not_mistaken_for_another_encoding(tmp_path):
    path = put(tmp_path / "d.jsonl", '{"text": "日本語 "}\n'.encode() + '{"text": "日本語'.encode()[:-1] + b'"}\n')
    refused(path, "d.jsonl:2 is damaged UTF-8 (byte 0xe8")


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt"])
def test_compressed_text_is_read(tmp_path, name, suffix):
    text = {"d.jsonl": '{"text": "a"}\n{"text": "b"}\n', "d.json": '[{"text": "a"}, {"text": "b"}]', "d.csv": "text\na\nb\n",
            "d.txt": "a\nb\n"}[name]  # fmt: skip
    half = len(text) // 2
    parts = COMPRESS[suffix](text[:half].encode()) + COMPRESS[suffix](text[half:].encode())  # two members in one file
    assert read_prompts(put(tmp_path / (name + suffix), parts)) == ["a", "b"]
    damaged = COMPRESS[suffix](random.Random(0).randbytes(3000).hex().encode())[:1500]
    refused(put(tmp_path / ("cut" + name + suffix).replace("txt", "csv"), damaged), "cannot be read")


def test_extension_contradicting_content_is_refused(tmp_path):
    refused(put(tmp_path / "d.jsonl.gz", ROWS), "is not a .gz file, though its name ends so")
    assert read_rows(put(tmp_path / "d.jsonl", gzip.compress(b'{"a": 1}'))) == [{"a": 1}]
    pq.write_table(pa.table({"a": [1]}), tmp_path / "d.parquet")
    refused(
        put(tmp_path / "e.csv", (tmp_path / "d.parquet").read_bytes()), "is a Parquet file: end its name in .parquet"
    )
    refused(put(tmp_path / "f.parquet", ROWS), "f.parquet cannot be read")
    refused(put(tmp_path / "f.arrow", ROWS), "f.arrow cannot be read")


@pytest.mark.parametrize("name", ["kaggle.zip", "d.csv", "sheet.xlsx", "d.jsonl.zip"])
def test_archives_are_refused_with_fix(tmp_path, name):
    refused(put(tmp_path / name, b"PK\x03\x04" + bytes(100)), "is a zip archive (or an Excel file): unpack it")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_decompression_bomb_is_refused_in_bounded_memory(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(text_files, "EXPANDS", 2**20)
    line = b'{"text": "' + b"a" * 100 + b'"}\n'
    bombs = {"zeros": bytes(2**24), "lines": line * (2**24 // len(line))}
    for name, content in bombs.items():
        path = put(tmp_path / f"{name}.jsonl{suffix}", COMPRESS[suffix](content))
        assert Path(path).stat().st_size * text_files.RATIO < len(content)
        tracemalloc.start()
        refused(path, "expands to more than 120 times its size", "decompress it")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**24  # of which the dictionary of xz takes half


def test_well_compressed_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "EXPANDS", 2**10)
    rows = [{"text": f"{random.Random(i).random()} " + "the same words again and again " * 30} for i in range(1000)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = gzip.compress(data)
    assert 30 < len(data) / len(packed) < 100
    assert read_rows(put(tmp_path / "d.jsonl.gz", packed)) == rows


def test_parquet_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("umbra.data.from_arrow.EXPANDS", 2**20)
    pq.write_table(pa.table({"text": ["a" * 1000] * 20000}), tmp_path / "d.parquet")
    refused(str(tmp_path / "d.parquet"), "more than 120 times the bytes of the file")


# -- what is no file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["x.csv", "x.jsonl", "/nowhere/x.jsonl.gz", "~/nowhere-x.parquet", "data/x.csv", "./x", "/x/y", "../x/y.json", "here/missing",
     "imdb", "a/b/c", "a/b.zip", "x y", "https://example.com/x.jsonl", "C:\\\\x.csv", "nobody~/x"],
)  # fmt: skip
def test_missing_file_is_refused_without_hub_lookup(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    started = time.perf_counter()
    refused(name, f"{name} cannot be read: ", "URL" if "://" in name else "no such file")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("name", ["", "  ", [], ["a", ""], [3], 3, None, {}, "a\0b", "x" * 5000])
def test_invalid_source_name_is_refused(name):
    refused(name)


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet", "d.arrow", "d.txt", "d.json.gz"])
def test_pipes_and_folders_are_refused_immediately(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / f"link.{name}").symlink_to(tmp_path / name)
    for path in (name, f"link.{name}"):
        refused(str(tmp_path / path), "is a pipe (FIFO), not a file")
        for read in (read_prompts, lambda p: read_documents(p, "train", ChatFormatter(make_tokenizer()))):
            with pytest.raises(umbra.DataError, match="is a pipe"):
                read(str(tmp_path / path))
    (tmp_path / f"zero.{name}").symlink_to("/dev/zero")
    refused(str(tmp_path / f"zero.{name}"), "is a device, not a file")
    (tmp_path / f"dangling.{name}").symlink_to("nowhere")
    refused(str(tmp_path / f"dangling.{name}"), "no such file")
    (tmp_path / f"loop.{name}").symlink_to(f"loop.{name}")
    refused(str(tmp_path / f"loop.{name}"), "cannot be read")


def test_devices_and_sockets_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.jsonl")
        refused("s.jsonl", "is a socket, not a file")
    for name in ("/dev/zero", "/dev/urandom", "/dev/null"):
        refused(name, "is a device, not a file")
    reader, writer = os.pipe()
    refused(f"/dev/fd/{reader}", "is a pipe (FIFO), not a file: write its content to a file")
    os.close(reader)
    os.close(writer)


def test_unknown_extension_is_read_by_content_or_refused(tmp_path):
    assert read_rows(put(tmp_path / "data", ROWS)) == ROWS
    assert read_rows(put(tmp_path / "data.jsonl.bak", json.dumps(ROWS))) == ROWS
    refused(put(tmp_path / "d.txt", "a\nb\n"), "d.txt cannot be read as records: its name ends in .txt", ".csv")
    refused(put(tmp_path / "d.yaml", "a: 1\n"), "its name ends in .yaml")


# -- lists, globs, folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.jsonl, b.csv, c.parquet and d/e.jsonl of two rows each, in the working folder, which is the home folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "a.jsonl", ROWS[:2])
    put(tmp_path / "b.csv", "text,label\nt2,a\nt3,b\n")
    datasets.Dataset.from_list(ROWS[4:6]).to_parquet("c.parquet")
    put(tmp_path / "d" / "e.jsonl", ROWS[6:8])
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected", "where"),
    [
        ("~/a.jsonl", ROWS[:2], "{}/a.jsonl:2"),
        (["a.jsonl", "b.csv"], ROWS[:4], "b.csv:3"),
        (["b.csv", "~/c.parquet"], ROWS[2:6], "{}/c.parquet, row 2"),
        ("[ab].*", ROWS[:4], "b.csv:3"),
        ("~/**/*.jsonl", [*ROWS[:2], *ROWS[6:8]], "{}/d/e.jsonl:2"),
        (["d", "*.csv"], [*ROWS[6:8], *ROWS[2:4]], "b.csv:3"),
        ("d", ROWS[6:8], "d/e.jsonl:2"),
    ],
)
def test_lists_globs_home_and_folders_are_read_in_order(files, source, expected, where):
    """Case 40."""
    rows = read_records(source)
    assert rows == expected
    assert rows.where(len(rows) - 1) == where.format(files)
    assert [Path(file).suffix for file in local_files(source)] == [Path(f).suffix for f in dict.fromkeys(
        place.rsplit(":", 1)[0].split(",")[0] for place in rows.places())]  # fmt: skip


def test_file_named_like_glob_is_read(files):
    assert read_rows(put(files / "x[1].jsonl", ROWS[:1])) == ROWS[:1]


def test_list_with_incompatible_rows_is_refused(files):
    refused("*.tsv", "*.tsv matches no file")
    for twice in (["a.jsonl", "./a.jsonl"], ["*.jsonl", "~/a.jsonl"], ["a.jsonl", "a.jsonl"]):
        refused(twice, "is named twice")
    put(files / "q.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(umbra.DataError, match=r"q\.jsonl:1"):
        read_records(["a.jsonl", "q.jsonl"])
    refused(["a.jsonl", "missing.jsonl"], "missing.jsonl cannot be read: no such file")


def test_folder_splits_are_words_in_paths(tmp_path):
    for name in (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl.gz",
        "data/dev.csv",
        ".hidden/train.csv",
    ):
        content = "text,label\nd,b\n" if name.endswith("csv") else json.dumps({"text": name, "label": "a"}) + "\n"
        put(tmp_path / name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    put(tmp_path / "README.md", "train")
    assert [row["text"][-8:] for row in read_rows(str(tmp_path))] == ["02.jsonl", "jsonl.gz"]
    assert read_rows(str(tmp_path), "validation") == [{"text": "d", "label": "b"}]
    refused(str(tmp_path), "has no split 'test': it has 'train', 'validation'", split="test")
    put(tmp_path / "more.jsonl", ROWS)
    refused(str(tmp_path), "holds more.jsonl of no split beside files of train, validation")
    (tmp_path / "more.jsonl").rename(tmp_path / "train-and-test.jsonl")
    refused(str(tmp_path), "train-and-test.jsonl names the splits train and test")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "holds no data")


def test_copied_hub_set_with_configurations_is_refused(tmp_path):
    put(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: main\n  data_files: m/*\n- config_name: other\n---\n# Set\n",
    )
    put(tmp_path / "m/train.jsonl", ROWS)
    refused(str(tmp_path), "holds several configurations (main, other)")


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "saved", "dict", "folder", "list", "arrow"])
def test_split_slice_selects_its_rows(tmp_path, form):
    """Case 61."""
    rows = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"d.{form}"
    match form:
        case "jsonl":
            put(path, ROWS)
        case "json":
            put(path, json.dumps(ROWS))
        case "csv":
            rows.to_csv(path)
        case "parquet":
            rows.to_parquet(path)
        case "arrow":
            rows.save_to_disk(tmp_path / "s")
            path = next((tmp_path / "s").glob("*.arrow"))
        case "saved":
            rows.save_to_disk(path)
        case "dict":
            datasets.DatasetDict({"train": rows, "test": rows.select([9])}).save_to_disk(path)
        case "folder":
            put(path / "train.jsonl", ROWS)
    source = [put(tmp_path / "a.jsonl", ROWS[:1]), put(tmp_path / "b.jsonl", ROWS[1:])] if form == "list" else str(path)
    assert read_rows(source) == ROWS
    sliced = read_rows(source, "train[:2]")
    assert sliced == ROWS[:2]
    assert read_rows(source, "train[5:10]+train[:10%]") == ROWS[5:] + ROWS[:1]
    last = read_rows(source, "train[-1:]")
    assert last == ROWS[9:] and last.where(0) == read_rows(source).where(9)
    refused(source, "selects no row: train has 10", split="train[5:5]")
    for malformed in (
        "train[:2",
        "train[2]",
        "train[a:b]",
        "train[:2%]%",
        "",
        "train[:1.5]",
        "train[::2]",
        "train[:10%5]",
    ):
        refused(source, "is not a split", split=malformed)


def test_slices_equal_datasets_slices():
    """Bounds, percents, negative ones and roundings, drawn at random."""
    rng = random.Random(0)

    def bound(unit):
        return rng.choice(["", f"{rng.randint(-100, 100)}{unit}"])

    for _ in range(500):
        unit, count = rng.choice(["", "%"]), rng.choice([1, 7, 10, 100, 333])
        part = f"[{bound(unit)}:{bound(unit)}]"
        rounding = "(pct1_dropremainder)" if count >= 100 and part.count("%") else ""
        spec = rng.choice(["train", f"train{part}{rounding}"])
        expected = [
            i
            for cut in datasets.ReadInstruction.from_spec(spec).to_absolute({"train": count})
            for i in range(cut.from_, cut.to)
        ]
        assert list(range(count))[parse_split(spec)[0].of(count)] == expected, (spec, count)


def test_plain_file_serves_any_split_but_once(tmp_path):
    path = put(tmp_path / "d.jsonl", ROWS)
    assert read_rows(path, "test") == read_rows(path, "validation") == ROWS
    assert read_rows(path, "validation[:3]") == ROWS[:3]
    refused(path, "has no splits", split="train+test")


def test_saved_split_must_exist(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows.select([1]), "eval": rows.select([2])}).save_to_disk(tmp_path / "d")
    assert read_rows(str(tmp_path / "d"), "eval + train") == [ROWS[2], ROWS[1]]
    refused(str(tmp_path / "d"), "has no split 'test': it has 'eval', 'train'", split="test[:2]")


# -- Arrow -------------------------------------------------------------------------------------------------------------


def call(name: str, **arguments) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


CALLS = [
    {"messages": [{"role": "user", "content": "a"}, call("weather", city="Rome", days=[1, 2])], "note": None},
    {"messages": [call("book", seats=2, who={"name": "x"}), call("stop")], "note": "n"},
    {"messages": [call("weather", days=[]), {"role": "tool", "content": "c"}], "note": None},
]


@pytest.mark.parametrize("form", ["parquet", "saved", "hub", "shuffled"])
def test_tool_calls_keep_their_arguments(tmp_path, form, monkeypatch):
    """Case 05: what Arrow adds is dropped below the top level."""
    rows = datasets.Dataset.from_list(CALLS)
    assert rows[1]["messages"][0]["tool_calls"][0]["function"]["arguments"]["city"] is None  # which Arrow has added
    if form == "parquet":
        rows.to_parquet(tmp_path / "d")
        (tmp_path / "d").rename(tmp_path / "d.parquet")
        source = str(tmp_path / "d.parquet")
    else:
        (rows.select([2, 0, 1]).select([1, 2, 0]) if form == "shuffled" else rows).save_to_disk(tmp_path / "d")
        source = str(tmp_path / "d")
    if form == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: rows)
        source = "owner/name:all"
    read = read_rows(source)
    assert read == CALLS
    assert read.where(1) == {"parquet": f"{source}, row 2", "hub": "owner/name:all, split train, row 2"}.get(
        form, f"{source}, row 2"
    )


def test_json_columns_keep_explicit_nulls(tmp_path):
    values = [{"a": None, "b": [None, {"c": None}]}, {"z": 1}, [1], "5 apples", None]
    features = datasets.Features({"x": datasets.Json(), "y": datasets.List(datasets.Json())})
    rows = datasets.Dataset.from_dict({"x": values, "y": [[v] for v in values]}, features=features)
    rows.to_parquet(tmp_path / "d.parquet")
    rows.save_to_disk(tmp_path / "d")
    for name in ("d.parquet", "d"):
        read = read_rows(str(tmp_path / name))
        assert [row["x"] for row in read] == values
        assert [row["y"][0] for row in read] == values


def test_class_labels_are_read_as_names(tmp_path):
    """Case 42."""
    kind = datasets.ClassLabel(names=["neg", "pos"])
    within = {"c": kind, "d": datasets.List(kind)}
    features = datasets.Features(
        {
            "text": datasets.Value("string"), "label": kind, "many": datasets.List(kind), "within": within,
            "pairs": datasets.Sequence({"c": kind}),
        }
    )  # fmt: skip
    values = {
        "text": ["a", "b"], "label": [1, 0], "many": [[0, 1], []], "within": [{"c": 0, "d": [1]}] * 2, "pairs": [{"c": [1]}] * 2,
    }  # fmt: skip
    rows = datasets.Dataset.from_dict(values, features=features)
    rows.to_parquet(tmp_path / "d.parquet")
    rows.save_to_disk(tmp_path / "d")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    first = {
        "text": "a",
        "label": "pos",
        "many": ["neg", "pos"],
        "within": {"c": "neg", "d": ["pos"]},
        "pairs": {"c": ["pos"]},
    }
    for name in ("d.parquet", "d", "dict"):
        assert read_rows(str(tmp_path / name)) == [first, {**first, "text": "b", "label": "neg", "many": []}]
    bad = datasets.Dataset.from_dict({"label": [0, -1]}, features=datasets.Features({"label": kind}))
    bad.to_parquet(tmp_path / "bad.parquet")
    refused(
        str(tmp_path / "bad.parquet"),
        "bad.parquet, row 2, column 'label': -1 is none of the 2 classes (-1 stands for no class)",
    )


def test_pandas_index_is_dropped_and_categories_are_text(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": pd.Categorical(["x", None, "y"])})
    frame[frame.text != "a"].to_parquet(tmp_path / "d.parquet")
    assert read_rows(str(tmp_path / "d.parquet")) == [{"text": "b", "label": None}, {"text": "c", "label": "y"}]


def test_maps_and_arrow_files_are_read(tmp_path):
    table = pa.table({"m": pa.array([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64())), "t": ["x"]})
    with pa.ipc.new_file(tmp_path / "d.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(tmp_path / "e.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("d.arrow", "e.arrow"):
        assert read_rows(str(tmp_path / name)) == [{"m": {"a": 1, "b": None}, "t": "x"}]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_tables_are_refused_by_name(tmp_path, damage):
    rows = datasets.Dataset.from_list(ROWS * 100)
    rows.to_parquet(tmp_path / "d.parquet")
    rows.save_to_disk(tmp_path / "d")
    for file in (tmp_path / "d.parquet", *(tmp_path / "d").glob("*.arrow")):
        data = bytearray(file.read_bytes())
        data[40:60] = b"\xff" * 20
        file.write_bytes({"cut": data[: len(data) // 2], "flipped": bytes(data), "empty": b""}[damage])
    refused(str(tmp_path / "d.parquet"), "d.parquet cannot be read")
    refused(str(tmp_path / "d"), "cannot be read")


def test_hub_csv_cells_are_text(tmp_path, monkeypatch):
    put(tmp_path / "hub" / "train.csv", "prompt,completion\na,None\nb,007\nc,1.0\n")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **k: load(str(tmp_path / "hub"), cache_dir=tmp_path / "cache", **k)
    )
    rows = read_rows("owner/name")
    assert [row["completion"] for row in rows] == ["None", "007", "1.0"]
    assert rows.where(1) == "owner/name, split train, row 2"


# -- text --------------------------------------------------------------------------------------------------------------


def test_prompt_lines_end_at_line_feed_only(tmp_path):
    """Case 24."""
    prompts = ["a\u2028b", "c\x0cd", "e\x85f", "g\x0bh", "i\x1cj\x1d", "k\u2029l", "m\rn"]
    assert read_prompts(put(tmp_path / "p.txt", "\r\n\n".join(prompts) + "\r\n \t\n")) == prompts
    lines = "".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts)
    assert read_prompts(put(tmp_path / "p.jsonl", lines)) == prompts
    assert read_prompts([str(tmp_path / "p.txt"), put(tmp_path / "q.txt", "last")]) == [*prompts, "last"]


def test_record_without_prompt_is_named(tmp_path):
    for record in ({"completion": "a"}, {"prompt": None}, {"prompt": 3}, {"prompt": [{"role": "user"}]}, {"text": " "}):
        with pytest.raises(umbra.DataError, match=r"p\.jsonl:2 has no prompt"):
            read_prompts(put(tmp_path / "p.jsonl", [{"prompt": "a"}, record]))


def test_all_text_sources_use_one_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    writer = ChatFormatter(make_tokenizer())
    put(tmp_path / "t" / "a.txt", "\ufeffone\r\n\r\ntwo".encode("utf-16-le"))
    put(tmp_path / "t" / "b.txt.gz", gzip.compress("three\u2028four\n\nfive".encode()))
    put(tmp_path / "c.csv", "text\nNone\n")
    words = ["one", "two", "three\u2028four", "five"]
    for source in ("~/t/*", "~/t", [f"{tmp_path}/t/a.txt", "~/t/b.txt.gz"]):
        assert read_documents(source, "train", writer).texts == words
    assert read_documents("~/c.csv", "train", writer).texts[0].startswith("None")
    assert read_texts("~/t/*, ~/c.csv", writer)[:2] == ["one\n\ntwo", "three\u2028four\n\nfive"]
    with pytest.raises(umbra.DataError, match=r"is text, and .* contains records"):
        read_prompts(["~/t/a.txt", "~/c.csv"])
    with pytest.raises(umbra.DataError, match=r"l\.txt:2 is not UTF-8"):
        read_documents(put(tmp_path / "l.txt", b"a\ncaf\xe9 b\n"), "train", writer)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_row_locations_survive_slicing_and_selection(tmp_path):
    path = put(tmp_path / "d.jsonl", ROWS)
    rows = read_rows([path, put(tmp_path / "e.csv", "text,label\nx,y\n")])
    assert isinstance(rows[2:], Rows) and rows[2:].where(0) == f"{path}:3"
    assert (
        rows[::-1].where(0)
        == rows[5:].where(5)
        == rows.take([3, 10]).where(1)
        == rows.where(-1)
        == f"{tmp_path / 'e.csv'}:2"
    )
    assert rows[2:][1:3] == ROWS[3:5]
    assert Rows(rows).where(1) == pickle.loads(pickle.dumps(rows)).where(1) == f"{path}:2"
    assert Rows(ROWS).where(4) == "record 5" and Rows(ROWS)[2:].where(0) in ("record 1", "record 3")
    assert read_split("train[1:2]", lambda _: rows).where(0) == f"{path}:2"
    rows.pop()
    with pytest.raises(AssertionError, match="in place"):
        rows.where(0)


def test_row_locations_use_little_memory(tmp_path):
    path = put(tmp_path / "d.jsonl", "".join(f'{{"text": "t{i}"}}\n' for i in range(4000)))
    tracemalloc.start()
    rows = read_rows(path)
    size, peak = tracemalloc.get_traced_memory()
    del rows
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tracemalloc.start()
    plain = [json.loads(line) for line in Path(path).read_text().splitlines()]
    least, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plain) == 4000 and size - left < 1.2 * least and peak < 1.2 * least + 2**22


# -- commands ----------------------------------------------------------------------------------------------------------


def test_command_line_accepts_several_files(files, base_folder, capsys):
    command = ["train", "--base", base_folder, "--max_steps", "1", "--use_cpu", "--rank", "2"]
    assert (
        main([*command, "--output_dir", "out", "--train_data", "a.jsonl", "b.csv", "--train_data", "~/c.parquet"]) == 0
    )
    asked = json.loads(Path("out/run.json").read_text())
    assert asked["asked"]["train_data"] == ["a.jsonl", "b.csv", "~/c.parquet"]
    assert list(asked["contents"]) == ["a.jsonl", "b.csv", f"{files}/c.parquet"]
    put(
        files / "run.yaml",
        f"base: {base_folder}\nmax_steps: 1\nuse_cpu: true\nrank: 2\ntrain_data: [a.jsonl, '*.csv']\noutput_dir: two\n",
    )
    assert main(["train", "run.yaml", "--train_split", "train[:3]"]) == 0
    put(files / "bad.csv", "text,label\nt2,a,x\n")
    assert main([*command, "--output_dir", "three", "--train_data", "bad.csv"]) == 2
    assert "umbra: error: bad.csv:2 has 3 cells" in capsys.readouterr().err
