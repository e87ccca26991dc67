"""``umbra export``: the shadow alone for transformers, onnxruntime or llama.cpp, compared with PyTorch before it is kept."""

import json
import shutil
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from umbra.adapters.prompting import open_formatter
from umbra.base import architectures
from umbra.base.loading import load_base, load_tokenizer
from umbra.data import ChatFormatter, end_tokens
from umbra.data.corpus import read_prompts
from umbra.data.sources import local_files, named_sources, resolve
from umbra.deploy.detach import end_as_learned, formatter_of, parse_dtype, save_stock, write_stock
from umbra.deploy.export import parity
from umbra.deploy.export.parity import Parity, Stock, answer, check, compare, compare_whole
from umbra.deploy.export.process import run_python
from umbra.deploy.export.quiet import quiet
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
from umbra.errors import CheckpointError, ConfigError, DataError, ExportError
from umbra.files import folder
from umbra.files.manifest import Manifest, check_apart, of_model, writing
from umbra.model.loading import load
from umbra.options import ExportOptions
from umbra.shadow.pretrained import LANGUAGE_MODELS, read_config

__all__ = ["export", "table"]

# Of each format: what is not quantised, which must say what PyTorch says; then the rest, and what is written by default.
KINDS = {"hf": (), "onnx": ("fp32", "int8", "int4"), "gguf": ("f16", "q8_0", "q4_0", "q4_k_m")}
DEFAULTS = {"hf": (), "onnx": ("fp32", "int8"), "gguf": ("f16", "q8_0", "q4_0")}
RUN_FIRST = ("int8", "int4", "q8_0", "q4_k_m", "q4_0", "fp32", "f16")  # by run.py and Ollama, of what there is
PACKAGES = {
    "hf": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf", "conversion", "sentencepiece", "cyllama"),
}
RUN, PROMPT, PARITY, MODELFILE = "run.py", "prompt.json", "parity.json", "Modelfile"
MARKS = {RUN: "Umbra writes this file", MODELFILE: "FROM ./model-"}  # by which files of earlier versions are known
PLACE = "the prompt stands here"
CONTEXT = 4096  # tokens that Ollama is to keep, of models that do not say how many they can

table = parity.table


def export(options: ExportOptions) -> tuple[list[Parity], str | None]:
    """Run ``umbra export``: how each file compares, and the answer to ``prompt`` if one was given.

    Raises:
        ConfigError, DataError: unusable options or files, or a package that is missing, before any model is loaded.
        CheckpointError, BaseModelError, DetachError: see `umbra.load` and `umbra.deploy.detach`.
        ExportError: a model that the format cannot hold, or an export that says something else. Nothing is left of it.
    """
    wanted = _check(options)
    prompts = read_prompts(named_sources(options.prompts)) if options.prompts else parity.QUESTIONS
    with writing(options.out, _asked(options, wanted), options.overwrite) as noted:
        out, writer = Path(options.out), None
        _check_own(out, noted, options.to)
        if not noted.is_complete:
            check_apart(out, adapter=options.adapter, base=options.base)
            model, writer = _load(options)
            rows = _write(model, writer, out, wanted, prompts, options)
            _clear(out, noted, [row.file for row in rows], options.to)
            noted.result = [asdict(row) for row in rows]
        rows = [Parity(**row) for row in noted.result]
        return rows, None if options.prompt is None else _answer(options, out, writer)


def _asked(options: ExportOptions, wanted: list[str]) -> dict[str, Any]:
    """All that the files depend on."""
    others = {k: v for k, v in asdict(options).items() if k not in ("out", "prompt", "overwrite", "json")}
    texts = [source for given in (options.prompts, options.vocabulary) for source in named_sources(given)]
    digests = [folder.digest_of(local_files(source)) for source in texts]
    return {**others, "command": "export", "adapter": of_model(options.adapter), "wanted": wanted, "texts": digests}


def _write(
    model: PreTrainedModel, writer: ChatFormatter, out: Path, wanted: list[str], prompts: Any, options: ExportOptions
) -> list[Parity]:
    """Write all files, and compare them with the model."""
    tokenizer = writer.tokenizer
    if options.to == "gguf":
        check_architecture(model)
    pre, whole, kept = None, (model, writer), None
    if options.vocabulary:
        model, tokenizer, kept, pre = _trim(model, writer, options)
        writer = replace(writer, tokenizer=tokenizer)
    reference = answer(model, writer, prompts, options.max_new_tokens)
    rows: list[Parity] = []
    trimmed = [] if kept is None else [compare_whole(reference, kept, *whole)]

    def write(staging: Path) -> None:
        if options.to == "hf":
            with quiet():
                save_stock(model, staging, tokenizer, parse_dtype(options.dtype))
            rows.extend([_compare_stock(reference, staging, writer, options), *trimmed])
            return
        _write_around(model, writer, staging, wanted, options)
        kinds = list(dict.fromkeys([KINDS[options.to][0], *wanted]))  # what is not quantised is compared in any case
        for kind, file in zip(kinds, _write_models(model, tokenizer, staging, kinds, options, pre), strict=True):
            parts = list(staging.glob(f"{file.name}*"))
            found = compare(reference, file, sum(part.stat().st_size for part in parts), staging / RUN)
            if kind == kinds[0]:
                check(found)
            if kind in wanted:
                rows.append(found)
        if kinds[0] not in wanted:
            for part in staging.glob(f"model-{kinds[0]}.*"):
                part.unlink()
        rows.extend(trimmed)
        folder.write_text(staging / PARITY, json.dumps([asdict(r) for r in rows], indent=2) + "\n")

    (write_stock if options.to == "hf" else folder.write_together)(out, write)
    return rows


def _check_own(out: Path, noted: Manifest, to: str) -> None:
    """Raise a CheckpointError for a file of the user's that has the name of one of an export."""
    for name, mark in MARKS.items() if to != "hf" else ():
        path = out / name
        if path.is_file() and not noted.has_written(out, name) and mark not in path.read_text("utf-8", "replace"):
            raise CheckpointError(f"{path} was not written by Umbra: move it away, or choose another folder.")


def _clear(out: Path, noted: Manifest, files: list[str], to: str) -> None:
    """Take away files of an export before, of another vocabulary perhaps; a model of transformers shares none with them."""
    if to == "hf":
        return
    old = [] if to == "gguf" else [MODELFILE]
    known = [f"model-{kind}.{ending}" for ending in KINDS for kind in KINDS[ending]]
    old += [n for name in known if name not in files for n in (name, f"{name}.data")]
    for name in old:
        if noted.has_written(out, name) or (not noted.files and (out / name).is_file()):
            (out / name).unlink()


# -- before any work ---------------------------------------------------------------------------------------------------


def _check(options: ExportOptions) -> list[str]:
    """The files to write."""
    if options.to not in KINDS or not options.out:
        raise ConfigError(
            f"Say what to write and where: --to {'|'.join(KINDS)} --out FOLDER; got --to {options.to or 'nothing'}."
        )
    known, asked = KINDS[options.to], options.quantization
    wanted = list(DEFAULTS[options.to]) if asked is None else [k.strip() for k in asked.split(",") if k.strip()]
    if options.to == "hf" and asked is not None:
        raise ConfigError(f"--quantization is for onnx and gguf, got {asked!r} for hf: use --dtype.")
    if options.to != "hf" and (not wanted or set(wanted) - set(known)):
        raise ConfigError(f"Unknown quantization {asked!r} of {options.to}: choose from {', '.join(known)}.")
    if parse_dtype(options.dtype) is not None and options.to != "hf":
        raise ConfigError(
            f"--dtype is for hf, got {options.dtype} for {options.to}: use --quantization {','.join(known)}."
        )
    if missing := [p for p in PACKAGES[options.to] if find_spec(p) is None]:
        raise ConfigError(f"--to {options.to} needs {', '.join(missing)}: pip install 'umbra-peft[{options.to}]'.")
    for name in (*named_sources(options.prompts), *named_sources(options.vocabulary)):
        try:
            resolve(name)
        except DataError as error:
            raise ConfigError(f"{name} is no file or data set: {error}") from None
    return sorted(dict.fromkeys(wanted), key=known.index)


def _load(options: ExportOptions) -> tuple[PreTrainedModel, ChatFormatter]:
    """The stock model, in float32, with its tokenizer and chat formatting."""
    source = Path(options.adapter)
    if folder.find(source, "config.json").is_file() and not folder.find(source, "adapter_config.json").is_file():
        import torch

        if options.base is not None:
            raise ConfigError(f"{options.adapter} is a model of its own, it has no base: leave out --base.")
        if LANGUAGE_MODELS.isdisjoint(read_config(str(source)).get("architectures") or ()):
            raise _classifier(options)
        stock = load_base(str(source), dtype=torch.float32).eval()
        tokenizer = _fast(load_tokenizer(str(source)))
        return stock, formatter_of(stock, tokenizer, options.chat_template, options.chat_template_kwargs)
    attached = load(options.adapter, options.base)
    if not attached.can_generate():
        raise _classifier(options)
    formatter = open_formatter(attached, options.chat_template, options.chat_template_kwargs)
    _fast(formatter.tokenizer)
    stock: PreTrainedModel = attached.detached()
    end_as_learned(stock, formatter)
    return stock.float().eval(), formatter


def _classifier(options: ExportOptions) -> ExportError:
    return ExportError(
        f"{options.adapter} has no language-model head; write it with `umbra detach {options.adapter} FOLDER`."
    )


def _fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not tokenizer.is_fast:
        raise ExportError(
            f"A {type(tokenizer).__name__} has no tokenizer.json, which run.py reads: load a fast tokenizer."
        )
    return tokenizer


def _trim(
    model: PreTrainedModel, writer: ChatFormatter, options: ExportOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int], str | None]:
    tokenizer, pre = writer.tokenizer, None
    read_specification(tokenizer)
    texts = read_texts(options.vocabulary or "", writer)
    passing_on = getattr(model.generation_config, "escalation", None)
    texts += [passing_on] if passing_on else []
    if options.to == "gguf":
        with TemporaryDirectory() as whole:
            tokenizer.save_pretrained(whole)
            pre = pre_tokenizer(Path(whole), model)
    kept = needed(tokenizer, [*texts, writer.ask("")], special_ids(model))
    return trim_model(model, kept), trim_tokenizer(tokenizer, kept), kept, pre


# -- writing -----------------------------------------------------------------------------------------------------------


def _write_around(
    model: PreTrainedModel, writer: ChatFormatter, staging: Path, wanted: list[str], options: ExportOptions
) -> None:
    """The runner, what that must know of the model, and what Ollama must."""
    tokenizer = writer.tokenizer
    before, _, after = writer.ask(PLACE).partition(PLACE)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = [] if writer.chats else writer.tokens("a")[: -len(plain)]  # type: ignore[arg-type]
    file = f"model-{next(k for k in RUN_FIRST if k in wanted)}.{options.to}"
    told = {"model": file, "prefix": before, "suffix": after, "start": start, "end": end_tokens(model, writer)}
    told["positions"] = architectures.positions(model.config)
    told["escalation"] = getattr(model.generation_config, "escalation", None)
    folder.write_text(staging / PROMPT, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(Path(__file__).with_name(RUN), staging / RUN)
    if options.to == "gguf":
        context = architectures.positions(model.config) or CONTEXT
        folder.write_text(staging / MODELFILE, modelfile(writer, file, context))


def _write_models(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, staging: Path, kinds: list[str], options: ExportOptions,
    pre: str | None,
) -> list[Path]:  # fmt: skip
    with TemporaryDirectory() as stock:
        if options.to == "onnx":
            from umbra.deploy.export.to_onnx import write_onnx

            tokenizer.save_pretrained(stock)
            shutil.copyfile(Path(stock) / "tokenizer.json", staging / "tokenizer.json")
            return write_onnx(model, staging, kinds)
        with quiet():
            save_stock(model, Path(stock), tokenizer, None)
        return write_gguf(model, Path(stock), staging, kinds, Path(options.out).name, pre)


def _compare_stock(reference: parity.Reference, staging: Path, writer: ChatFormatter, options: ExportOptions) -> Parity:
    again = AutoModelForCausalLM.from_pretrained(staging, dtype="auto", trust_remote_code=False).eval()
    size = sum(part.stat().st_size for part in staging.iterdir())
    found = compare(
        reference,
        Path(options.out),
        size,
        Stock(again, replace(writer, tokenizer=load_tokenizer(str(staging)))),
    )
    if options.dtype != "bfloat16":
        check(found)
    return found


def _answer(options: ExportOptions, out: Path, writer: ChatFormatter | None) -> str:
    """The answer to the prompt, by what was written."""
    prompt = options.prompt or ""
    if options.to == "hf":
        again = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=False).eval()
        writer = replace(writer or _load(options)[1], tokenizer=load_tokenizer(str(out)))
        asked, end = writer.tokens(writer.ask(prompt)), end_tokens(again, writer)
        ids = list(greedy(Stock(again, writer), asked, options.max_new_tokens, end))
        return str(writer.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    done = run_python(str((out / RUN).resolve()), "--max-new-tokens", str(options.max_new_tokens), "--", prompt)
    if done.returncode:
        raise ExportError(f"{out} was written, but did not answer: {done.stderr[-1000:].strip()}")
    return done.stdout.strip()
