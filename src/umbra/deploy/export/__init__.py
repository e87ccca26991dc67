"""``umbra export``: write the shadow for transformers, onnxruntime or llama.cpp, after comparing it with PyTorch."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from umbra.adapters.files import CONFIG_FILE, local_folder, read_optional_json
from umbra.base import architectures
from umbra.base.loading import load_tokenizer
from umbra.data import ChatFormatter, encode_plain, end_tokens
from umbra.data.generated_text import read_prompts
from umbra.data.labels import prediction_of
from umbra.data.sources import local_files, named_sources, resolve
from umbra.deploy.detach import parse_dtype, save_stock, set_end_tokens, write_stock
from umbra.deploy.export import parity
from umbra.deploy.export.classifier import check_classifier, logits_of, write_classifier
from umbra.deploy.export.parity import Parity, Stock, answer, check, compare, compare_whole
from umbra.deploy.export.process import run_python
from umbra.deploy.export.quiet import quiet
from umbra.deploy.export.readme import write_readme
from umbra.deploy.export.run import answer as greedy
from umbra.deploy.export.to_gguf import check_architecture, modelfile, pre_tokenizer, write_gguf
from umbra.deploy.export.vocabulary import (
    needed,
    read_specification,
    read_texts,
    special_ids,
    trim_model,
    trim_tokenizer,
)
from umbra.deploy.opening import ADAPTER, kind_of, open_model
from umbra.errors import CheckpointError, ConfigError, DataError, ExportError
from umbra.files import folder
from umbra.files.manifest import Manifest, check_apart, of_model, writing
from umbra.model.shadow_model import ShadowModel
from umbra.options import ExportOptions
from umbra.options.extras import install_command

__all__ = ["export", "table"]

# The quantizations of each format: the first is unquantised, and must agree with PyTorch. And those written by default.
QUANTIZATIONS = {"hf": (), "onnx": ("fp32", "int8", "int4"), "gguf": ("f16", "q8_0", "q4_0", "q4_k_m")}
DEFAULTS = {"hf": (), "onnx": ("fp32", "int8"), "gguf": ("f16", "q8_0", "q4_0")}
PREFERRED = ("int8", "int4", "q8_0", "q4_k_m", "q4_0", "fp32", "f16")  # by run.py and Ollama, among those written
PACKAGES = {
    "hf": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf", "conversion", "sentencepiece", "cyllama"),
}
RUN, PROMPT, PARITY, MODELFILE = "run.py", "prompt.json", "parity.json", "Modelfile"
MARKS = {RUN: "Umbra writes this file", MODELFILE: "FROM ./model-"}  # by which earlier versions' files are recognised
PLACEHOLDER = "the prompt stands here"
CONTEXT = 4096  # Ollama's context for models with an unknown number of positions

table = parity.table


def export(options: ExportOptions) -> tuple[list[Parity], str | None]:
    """Run ``umbra export``.

    Args:
        options: of the command.

    Returns:
        The comparison of each file with PyTorch, and the answer to ``options.prompt``, if there is one.

    Raises:
        ConfigError, DataError: unusable options or files, or a missing package; before any model is loaded.
        CheckpointError, BaseModelError, DetachError: see `umbra.load` and `umbra.shadow.detached.detached`.
        ExportError: the format cannot represent the model, or the export predicts other tokens. Nothing is left of it.
    """
    quantizations = _check(options)
    prompts = read_prompts(named_sources(options.prompts)) if options.prompts else parity.QUESTIONS
    with writing(options.out, _request(options, quantizations), options.overwrite) as manifest:
        out, writer = Path(options.out), None
        _check_foreign_files(out, manifest, options.to)
        if not manifest.is_complete:
            check_apart(out, adapter=options.adapter, base=options.base)
            model, writer = _load(options)
            write = _write if model.can_generate() else _write_classifier
            rows = write(model, writer, out, quantizations, prompts, options)
            _remove_obsolete(out, manifest, [row.file for row in rows], options.to)
            manifest.result = [asdict(row) for row in rows]
        rows = [Parity(**row) for row in manifest.result or ()]
        return rows, None if options.prompt is None else _answer(options, out, writer)


def _request(options: ExportOptions, quantizations: list[str]) -> dict[str, Any]:
    """Everything that the files depend on."""
    others = {k: v for k, v in asdict(options).items() if k not in ("out", "prompt", "overwrite", "json")}
    texts = [source for names in (options.prompts, options.vocabulary) for source in named_sources(names)]
    digests = [folder.digest_of(local_files(source)) for source in texts]
    adapter = of_model(options.adapter)
    return {**others, "command": "export", "adapter": adapter, "wanted": quantizations, "texts": digests}


def _write(
    model: PreTrainedModel, writer: ChatFormatter, out: Path, quantizations: list[str], prompts: Iterable[str],
    options: ExportOptions,
) -> list[Parity]:  # fmt: skip
    """Write all files, and compare them with the model."""
    tokenizer = writer.tokenizer
    if options.to == "gguf":
        check_architecture(model)
    pre, whole, ids = None, (model, writer), None
    if options.vocabulary:
        model, tokenizer, ids, pre = _trim(model, writer, options)
        writer = replace(writer, tokenizer=tokenizer)
    reference = answer(model, writer, prompts, options.max_new_tokens)
    rows: list[Parity] = []
    trimmed = [] if ids is None else [compare_whole(reference, ids, *whole)]

    def write(staging: Path) -> None:
        if options.to == "hf":
            with quiet():
                save_stock(model, staging, tokenizer, parse_dtype(options.dtype))
            rows.extend([_compare_stock(reference, staging, writer, options), *trimmed])
            write_readme(staging, out, options, rows, writer, _base_of(options))
            return
        _write_runner(model, writer, staging, quantizations, options)
        unquantised = QUANTIZATIONS[options.to][0]  # compared in any case
        written = list(dict.fromkeys([unquantised, *quantizations]))
        for name, file in zip(written, _write_models(model, tokenizer, staging, written, options, pre), strict=True):
            size = sum(part.stat().st_size for part in staging.glob(f"{file.name}*"))
            row = compare(reference, file, size, staging / RUN)
            if name == unquantised:
                check(row)
            if name in quantizations:
                rows.append(row)
        if unquantised not in quantizations:
            for part in staging.glob(f"model-{unquantised}.*"):
                part.unlink()
        rows.extend(trimmed)
        folder.write_text(staging / PARITY, json.dumps([asdict(r) for r in rows], indent=2) + "\n")
        write_readme(staging, out, options, rows, writer, _base_of(options))

    (write_stock if options.to == "hf" else folder.write_together)(out, write)
    return rows


def _write_classifier(
    model: PreTrainedModel, writer: ChatFormatter, out: Path, quantizations: list[str], prompts: Iterable[str],
    options: ExportOptions,
) -> list[Parity]:  # fmt: skip
    """Write all files of a classifier, and compare them with the model."""

    def describe(staging: Path, rows: list[Parity]) -> None:
        write_readme(
            staging, out, options, rows, writer, _base_of(options), labels=list((model.config.id2label or {}).values())
        )

    return write_classifier(model, writer.tokenizer, out, quantizations, prompts, options, describe)


def _check_foreign_files(out: Path, manifest: Manifest, to: str) -> None:
    """Raise a CheckpointError for a user's file with the name of an exported one."""
    for name, mark in MARKS.items() if to != "hf" else ():
        path = out / name
        if path.is_file() and not manifest.has_written(out, name) and mark not in path.read_text("utf-8", "replace"):
            raise CheckpointError(f"{path} was not written by Umbra: move it away, or choose another folder.")


def _remove_obsolete(out: Path, manifest: Manifest, files: list[str], to: str) -> None:
    """Remove the files of an earlier export, perhaps of another vocabulary; transformers' files have other names."""
    if to == "hf":
        return
    old = [] if to == "gguf" else [MODELFILE]
    models = [f"model-{name}.{suffix}" for suffix, names in QUANTIZATIONS.items() for name in names]
    old += [file for model in models if model not in files for file in (model, f"{model}.data")]
    for name in old:
        if manifest.has_written(out, name) or (not manifest.files and (out / name).is_file()):
            (out / name).unlink()


# -- before any work ---------------------------------------------------------------------------------------------------


def _check(options: ExportOptions) -> list[str]:
    """Check the options, and return the quantizations to write.

    Raises:
        ConfigError: an unusable option, or a missing package.
    """
    if options.to not in QUANTIZATIONS or not options.out:
        raise ConfigError(
            f"Say what to write and where: --to {'|'.join(QUANTIZATIONS)} --out FOLDER; got --to {options.to or 'nothing'}."
        )
    known, listed = QUANTIZATIONS[options.to], options.quantization
    names = list(DEFAULTS[options.to]) if listed is None else [n.strip() for n in listed.split(",") if n.strip()]
    if options.to == "hf" and listed is not None:
        raise ConfigError(f"--quantization is for onnx and gguf, got {listed!r} for hf: use --dtype.")
    if options.to != "hf" and (not names or set(names) - set(known)):
        raise ConfigError(f"Unknown quantization {listed!r} of {options.to}: choose from {', '.join(known)}.")
    if parse_dtype(options.dtype) is not None and options.to != "hf":
        raise ConfigError(
            f"--dtype is for hf, got {options.dtype} for {options.to}: use --quantization {','.join(known)}."
        )
    if missing := [p for p in PACKAGES[options.to] if find_spec(p) is None]:
        raise ConfigError(f"--to {options.to} needs {', '.join(missing)}: {install_command(options.to)}.")
    for name in (*named_sources(options.prompts), *named_sources(options.vocabulary)):
        try:
            resolve(name)
        except DataError as error:
            raise ConfigError(f"{name} is neither a file nor a data set: {error}") from None
    return sorted(dict.fromkeys(names), key=known.index)


def _load(options: ExportOptions) -> tuple[PreTrainedModel, ChatFormatter]:
    """The stock model in float32, and its chat formatter."""
    opened = open_model(
        options.adapter, options.base, chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs, **_float32(options.adapter),
    )  # fmt: skip
    _fast(opened.formatter.tokenizer)
    if not opened.model.can_generate():
        check_classifier(options)
    if not isinstance(opened.model, ShadowModel):
        return opened.model, opened.formatter
    stock = opened.model.detached()
    set_end_tokens(stock, opened.formatter)
    return stock.float().eval(), opened.formatter


def _float32(path: str) -> dict[str, Any]:
    """How a model is loaded: a stock one in float32, an adapter's base in its own type."""
    import torch

    return {} if kind_of(path) == ADAPTER else {"dtype": torch.float32}


def _fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer; raise an ExportError for a slow one."""
    if not tokenizer.is_fast:
        raise ExportError(
            f"A {type(tokenizer).__name__} has no tokenizer.json, which run.py reads: load a fast tokenizer."
        )
    return tokenizer


def _trim(
    model: PreTrainedModel, writer: ChatFormatter, options: ExportOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int], str | None]:
    """Trim the vocabulary.

    Returns:
        The trimmed model and tokenizer, old token ids by new ones, and for GGUF the result of `pre_tokenizer`.
    """
    tokenizer, pre = writer.tokenizer, None
    read_specification(tokenizer)
    texts = read_texts(options.vocabulary or "", writer)
    escalation = getattr(model.generation_config, "escalation", None)
    texts += [escalation] if escalation else []
    if options.to == "gguf":
        with TemporaryDirectory() as whole:
            tokenizer.save_pretrained(whole)
            pre = pre_tokenizer(Path(whole), model)
    ids = needed(tokenizer, [*texts, writer.ask("")], special_ids(model))
    return trim_model(model, ids), trim_tokenizer(tokenizer, ids), ids, pre


# -- writing -----------------------------------------------------------------------------------------------------------


def _write_runner(
    model: PreTrainedModel, writer: ChatFormatter, staging: Path, quantizations: list[str], options: ExportOptions
) -> None:
    """Write run.py, prompt.json, and for Ollama a Modelfile."""
    tokenizer = writer.tokenizer
    before, _, after = writer.ask(PLACEHOLDER).partition(PLACEHOLDER)
    plain = tokenizer.encode("a", add_special_tokens=False)
    start = [] if writer.chats else writer.tokens("a")[: -len(plain)]
    file = f"model-{next(name for name in PREFERRED if name in quantizations)}.{options.to}"
    settings = {"model": file, "prefix": before, "suffix": after, "start": start, "end": end_tokens(model, writer)}
    settings["positions"] = architectures.positions(model.config)
    settings["escalation"] = getattr(model.generation_config, "escalation", None)
    folder.write_text(staging / PROMPT, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(Path(__file__).with_name(RUN), staging / RUN)
    if options.to == "gguf":
        context = architectures.positions(model.config) or CONTEXT
        folder.write_text(staging / MODELFILE, modelfile(writer, file, context))


def _write_models(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, staging: Path, quantizations: list[str],
    options: ExportOptions, pre: str | None,
) -> list[Path]:  # fmt: skip
    """Write the model files, in the order of ``quantizations``."""
    with TemporaryDirectory() as stock:
        if options.to == "onnx":
            from umbra.deploy.export.to_onnx import write_onnx

            tokenizer.save_pretrained(stock)
            shutil.copyfile(Path(stock) / "tokenizer.json", staging / "tokenizer.json")
            return write_onnx(model, staging, quantizations)
        with quiet():
            save_stock(model, Path(stock), tokenizer, None)
        return write_gguf(model, Path(stock), staging, quantizations, Path(options.out).name, pre)


def _compare_stock(reference: parity.Reference, staging: Path, writer: ChatFormatter, options: ExportOptions) -> Parity:
    """Compare a checkpoint of transformers, loaded again, with the reference."""
    again = AutoModelForCausalLM.from_pretrained(staging, dtype="auto", trust_remote_code=False).eval()
    size = sum(part.stat().st_size for part in staging.iterdir())
    row = compare(
        reference,
        Path(options.out),
        size,
        Stock(again, replace(writer, tokenizer=load_tokenizer(str(staging)))),
    )
    if options.dtype != "bfloat16":
        check(row)
    return row


def _base_of(options: ExportOptions) -> str | None:
    """The name of the base, as the adapter stores it."""
    if options.base is not None or kind_of(options.adapter) != ADAPTER:
        return options.base
    name = (read_optional_json(local_folder(options.adapter), CONFIG_FILE) or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def _answer(options: ExportOptions, out: Path, writer: ChatFormatter | None) -> str:
    """The exported model's answer to the prompt."""
    prompt = options.prompt or ""
    if options.to == "hf" and not open_model(str(out)).model.can_generate():
        return _label_of(out, prompt)
    if options.to == "hf":
        again = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=False).eval()
        writer = replace(writer or _load(options)[1], tokenizer=load_tokenizer(str(out)))
        prompt_ids, end = writer.tokens(writer.ask(prompt)), end_tokens(again, writer)
        ids = list(greedy(Stock(again, writer), prompt_ids, options.max_new_tokens, end))
        return str(writer.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    done = run_python(str((out / RUN).resolve()), "--max-new-tokens", str(options.max_new_tokens), "--", prompt)
    if done.returncode:
        raise ExportError(f"{out} was written, but did not answer: {done.stderr[-1000:].strip()}")
    return done.stdout.strip()


def _label_of(out: Path, text: str) -> str:
    """A stock classifier's label of a text, as JSON."""
    import torch

    opened = open_model(str(out))
    ids = encode_plain(opened.formatter.tokenizer, text)
    row = logits_of(opened.model, [ids])[0]
    return json.dumps(prediction_of(torch.from_numpy(row), opened.model.config), ensure_ascii=False)
