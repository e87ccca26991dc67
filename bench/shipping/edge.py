"""The detached shadow in PyTorch, onnxruntime and llama.cpp, and the pair and the bare base where they run.

Every row is a separate process that loads one file; the processes of the two runtimes import neither Umbra nor transformers.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from umbra.adapters.files import WEIGHTS_FILE
from umbra.base.loading import load_base, load_tokenizer
from umbra.data import ChatFormatter, Record, read_records
from umbra.deploy.export import export
from umbra.deploy.export.run import __file__ as RUN
from umbra.evaluation.scores import wilson
from umbra.evaluation.scoring import answer_of, reference_of
from umbra.options import EMBEDDED, ExportOptions

from .text import TASKS, write_task

QUESTIONS = 100  # whose answers are compared with the test file
TIMED, TOKENS = 5, 64  # timed questions, and tokens of a timed answer
THREADS = (1, 2)


class Row(NamedTuple):
    """One exported file, or one mode in PyTorch."""

    who: str
    runtime: str
    form: str
    command: list[str]
    bytes: int
    tokenizer: str = EMBEDDED


def run(data: Path, out: Path, adapter: Path, task: str) -> list[dict[str, Any]]:
    """Return for each row bytes, peak_bytes, load_seconds; by threads first_token_seconds and tokens_per_second; right of asked.

    Measured rows are stored in ``out``/edge/rows and not repeated.
    """
    files = write_task(data, task, out / "tasks")
    records, measured = read_records(files["test"])[:QUESTIONS], []
    for row in tqdm(_rows(out / "edge", adapter, files["train"]), desc="edge"):
        file = out / "edge" / "rows" / f"{row.who}-{row.runtime}-{row.form}.json".replace(" ", "-")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(_measured(row, records, task, out)), encoding="utf-8")
        measured.append(json.loads(file.read_text(encoding="utf-8")))
    return measured


def _measured(row: Row, records: list[Record], task: str, out: Path) -> dict[str, Any]:
    tokenizer: Any = load_tokenizer(row.tokenizer)
    writer = ChatFormatter(tokenizer)
    prompts = [writer.tokens(writer.prompt(r)) for r in records]
    asked = {"prompts": prompts, "max_new_tokens": TASKS[task].answer, "end": [tokenizer.eos_token_id]}
    timed = {"prompts": prompts[:TIMED], "max_new_tokens": TOKENS, "end": []}
    right = [
        answer_of(tokenizer.decode(ids, skip_special_tokens=True), TASKS[task].pattern)
        == answer_of(reference_of(record), TASKS[task].pattern)
        for record, ids in zip(records, _ask(out, row, asked, THREADS[-1])["answers"], strict=True)
    ]  # fmt: skip
    times = {threads: _ask(out, row, timed, threads) for threads in THREADS}
    return {
        "who": row.who, "runtime": row.runtime, "form": row.form, "bytes": row.bytes, "asked": len(right),
        "right": sum(right), "interval": wilson(sum(right), len(right)),
        "peak_bytes": times[THREADS[0]]["peak_bytes"], "load_seconds": times[THREADS[0]]["load_seconds"],
        "first_token_seconds": {t: sorted(x["first_token_seconds"])[TIMED // 2] for t, x in times.items()},
        "tokens_per_second": {t: x["tokens_per_second"] for t, x in times.items()},
    }  # fmt: skip


def _ask(out: Path, row: Row, request: dict[str, Any], threads: int) -> dict[str, Any]:
    file = out / "request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    command = [part.format(threads=threads, request=file) for part in row.command]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _rows(out: Path, adapter: Path, train: str) -> list[Row]:
    """Return all rows; missing files are exported."""
    base, detached, trimmed = out / "base", out / "hf", out / "trimmed-hf"
    if not base.exists():
        load_base(EMBEDDED, dtype="bfloat16").save_pretrained(base)
        load_tokenizer(EMBEDDED).save_pretrained(base)
    whole, less = {"adapter": str(adapter)}, {"adapter": str(adapter), "vocabulary": train}
    of_the_base = {"adapter": str(base)}
    wanted: list[tuple[str, Path, dict[str, Any]]] = [
        ("detached", detached, {**whole, "to": "hf"}),
        ("trimmed", trimmed, {**less, "to": "hf"}),
        ("detached", out / "onnx", {**whole, "to": "onnx", "quantization": "fp32,int8,int4"}),
        ("detached", out / "gguf", {**whole, "to": "gguf", "quantization": "f16,q8_0,q4_0,q4_k_m"}),
        ("trimmed", out / "trimmed-onnx", {**less, "to": "onnx", "quantization": "fp32,int8"}),
        ("trimmed", out / "trimmed-gguf", {**less, "to": "gguf", "quantization": "f16,q8_0,q4_0"}),
        ("bare base", out / "base-onnx", {**of_the_base, "to": "onnx", "quantization": "fp32,int8"}),
        ("bare base", out / "base-gguf", {**of_the_base, "to": "gguf", "quantization": "f16,q8_0,q4_0"}),
    ]
    rows: list[Row] = []
    for who, folder, options in wanted:
        if not (folder / ("config.json" if options["to"] == "hf" else "parity.json")).exists():
            export(ExportOptions(**options, out=str(folder), overwrite=True))
        if options["to"] == "hf":
            continue
        for file in sorted((f for f in folder.iterdir() if f.suffix in (".onnx", ".gguf")), key=_size, reverse=True):
            command = (
                f"{folder / Path(RUN).name} --model {file.name} --threads {{threads}} --request {{request}}".split()
            )
            tokenizer = str(trimmed) if who == "trimmed" else EMBEDDED
            rows.append(Row(who, options["to"], file.stem.removeprefix("model-"), command, _size(file), tokenizer))
    return [*_in_pytorch(base, adapter, detached, trimmed), *rows]


def _in_pytorch(base: Path, adapter: Path, detached: Path, trimmed: Path) -> list[Row]:
    weights = _size(base / "model.safetensors")
    rows = [
        Row("bare base", "PyTorch", "bfloat16", _command(adapter, "base", "bfloat16"), weights),
        Row(
            "attached",
            "PyTorch",
            "bfloat16",
            _command(adapter, "attached", "bfloat16"),
            weights + _size(adapter / WEIGHTS_FILE),
        ),
    ]
    for who, folder, tokenizer in (("detached", detached, EMBEDDED), ("trimmed", trimmed, str(trimmed))):
        size = _size(folder / "model.safetensors")
        for dtype, share in (("float32", 1), ("bfloat16", 2)):
            rows.append(Row(who, "PyTorch", dtype, _command(folder, "detached", dtype), size // share, tokenizer))
    return rows


def _command(folder: Path, mode: str, dtype: str) -> list[str]:
    return ["-m", "bench.shipping.edge_torch", str(folder), mode, dtype, "{threads}", "{request}"]


def _size(file: Path) -> int:
    return sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))
