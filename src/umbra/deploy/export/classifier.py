"""Export a classifier to ONNX, compared with PyTorch: text in, label and probabilities out."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from umbra.base import architectures
from umbra.data import encode_plain
from umbra.data.tokens import special_ends
from umbra.deploy.detach import parse_dtype, save_stock, write_stock
from umbra.deploy.export.parity import Parity, run_request
from umbra.deploy.export.quiet import quiet
from umbra.errors import ExportError
from umbra.files import folder
from umbra.options import ExportOptions

TOLERANCE = 1e-2  # largest difference of a logit with which an unquantised export is accepted


def check_classifier(options: ExportOptions) -> None:
    """Check that the options fit a classifier.

    Raises:
        ExportError: GGUF, whose runtimes generate text only, or a trimmed vocabulary.
    """
    if options.to == "gguf":
        raise ExportError(
            f"{options.adapter} classifies, but has no language-model head, which llama.cpp needs: use --to onnx or --to hf."
        )
    if options.vocabulary:
        raise ExportError(f"{options.adapter} classifies; --vocabulary trims language models alone: leave it out.")


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: list[list[int]]) -> np.ndarray:
    """Return the logits (N, C) of texts given as token ids, one at a time."""
    return np.stack([model(input_ids=torch.tensor([ids])).logits[0].float().numpy() for ids in rows])


def write_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, quantizations: list[str],
    texts: Iterable[str], options: ExportOptions, write_more: Callable[[Path, list[Parity]], object],
) -> list[Parity]:  # fmt: skip
    """Write a classifier, and compare each file with the model.

    Args:
        model: the stock classifier.
        tokenizer: its tokenizer.
        out: the folder.
        quantizations: the files to write; none for transformers.
        texts: the texts of the comparison.
        options: of the command.
        write_more: writes README.md, from the folder and the comparison.

    Raises:
        ExportError: the format cannot represent the model.
    """
    texts = list(texts)
    ids = [encode_plain(tokenizer, text)[: architectures.positions(model.config)] for text in texts]
    expected, rows = logits_of(model, ids), []

    def write(staging: Path) -> None:
        if options.to == "hf":
            with quiet():
                save_stock(model, staging, tokenizer, parse_dtype(options.dtype))
            again = AutoModelForSequenceClassification.from_pretrained(staging, dtype="auto", trust_remote_code=False)
            size = sum(part.stat().st_size for part in staging.iterdir())
            rows.append(_compared(out.name, size, expected, logits_of(again.eval(), ids), texts))
            _check(rows[0], options.dtype in ("auto", "float32"))
        else:
            rows.extend(_write_onnx(model, tokenizer, staging, quantizations, (texts, ids, expected)))
            folder.write_text(staging / "parity.json", json.dumps([asdict(r) for r in rows], indent=2) + "\n")
        write_more(staging, rows)

    (write_stock if options.to == "hf" else folder.write_together)(out, write)
    return rows


def _write_onnx(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, staging: Path, quantizations: list[str],
    reference: tuple[list[str], list[list[int]], np.ndarray],
) -> list[Parity]:  # fmt: skip
    from umbra.deploy.export.to_onnx import write_onnx

    texts, ids, expected = reference
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        shutil.copyfile(Path(scratch) / "tokenizer.json", staging / "tokenizer.json")
    written = list(dict.fromkeys(["fp32", *quantizations]))  # fp32 is compared in any case
    settings = settings_of(model, tokenizer, f"model-{'int8' if 'int8' in quantizations else quantizations[0]}.onnx")
    folder.write_text(staging / "prompt.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(Path(__file__).with_name("run.py"), staging / "run.py")
    rows = []
    for name, file in zip(written, write_onnx(model, staging, written), strict=True):
        size = sum(part.stat().st_size for part in staging.glob(f"{file.name}*"))
        with TemporaryDirectory() as scratch:
            response = run_request(staging / "run.py", file, {"classify": texts}, Path(scratch))
        row = _compared(file.name, size, expected, np.asarray(response["logits"], np.float32), texts)
        alike = sum(a == b for a, b in zip(ids, response["tokens"], strict=True))
        row = replace(row, prompts_tokenised_alike=alike)
        if name == "fp32":
            _check(row, True)
        if name in quantizations:
            rows.append(row)
    if "fp32" not in quantizations:
        for part in staging.glob("model-fp32.*"):
            part.unlink()
    return rows


def settings_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str) -> dict[str, Any]:
    """Return the content of ``prompt.json``, by which run.py classifies."""
    config: Any = model.config
    begin, end = special_ends(tokenizer)
    regresses = config.problem_type == "regression" or config.num_labels == 1
    problem = "regression" if regresses else config.problem_type or "single_label_classification"
    labels = [config.id2label[i] for i in range(config.num_labels)]
    return {
        "model": file, "problem": problem, "labels": labels, "start": list(begin), "finish": list(end), "end": [],
        "positions": architectures.positions(config),
    }  # fmt: skip


def _compared(file: str, size: int, expected: np.ndarray, logits: np.ndarray, texts: list[str]) -> Parity:
    """One file's comparison: the same class, and the difference of the logits (N, C)."""
    difference = np.abs(logits - expected)
    same = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    return Parity(
        file=file, bytes=size, tokens=len(texts), same_next=same / len(texts), answers=len(texts), same_answers=same,
        logits_max=float(difference.max()), logits_mean=float(difference.mean()), prompts_tokenised_alike=len(texts),
        classifies=True,
    )  # fmt: skip


def _check(row: Parity, exactly: bool) -> None:
    """Raise an ExportError if an unquantised export classifies otherwise than the model it was made from."""
    apart = exactly and (row.logits_max or 0) > TOLERANCE
    if row.same_answers < row.answers - row.answers // 20 or row.prompts_tokenised_alike < row.answers or apart:
        raise ExportError(
            f"{row.file} gives the same class as the model it was made from to {row.same_answers} of {row.answers} texts, "
            f"tokenises {row.prompts_tokenised_alike} alike, and its logits differ by up to {row.logits_max:.2g}. Nothing was "
            "written: this format cannot represent the model; take another (--to)."
        )
