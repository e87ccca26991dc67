"""README.md of an exported folder: what it is, the packages, the sizes, one command per runtime, and the comparison."""

from pathlib import Path

from umbra import __version__
from umbra.adapters.card import escaped, may_replace, sealed
from umbra.data import ChatFormatter
from umbra.deploy.export.parity import WHOLE, Parity, table
from umbra.files import folder
from umbra.options import ExportOptions

README = "README.md"
PLACEHOLDER = "PROMPT"


def write_readme(
    staging: Path, out: Path, options: ExportOptions, rows: list[Parity], writer: ChatFormatter, base: str | None,
    *, labels: list[str] | None = None,
) -> None:  # fmt: skip
    """Write README.md beside the exported files, unless the user has written one.

    Args:
        staging: where the files are written.
        out: where they will lie.
        options: of the command.
        rows: the comparison of each file with PyTorch.
        writer: formats prompts.
        base: name of the base; None if it is unknown.
        labels: names of a classifier's classes; None for a language model.
    """
    if not may_replace(out / README):
        return
    classifies = labels is not None
    name, files = out.absolute().name, [row for row in rows if row.file != WHOLE]
    task = f"It classifies texts as {escaped(', '.join(labels))}." if labels else "It answers prompts."
    origin = f"the base {escaped(base)}" if base else "its base"
    lines = [
        f"# {name}", "",
        f"A detached shadow of {origin}: a small model that runs alone, written by Umbra {__version__} "
        f"(`umbra export --to {options.to}`). {task}",
        "", "## Run it", "", *_commands(name, options.to, files, classifies), "",
        "## Files", "", *(f"- `{row.file}`: {row.bytes / 1e6:.1f} MB" for row in files), "",
        "## Agreement with PyTorch", "",
        "Each file was compared with the model that it was written from, on the same texts.", "", table(rows), "",
    ]  # fmt: skip
    lines += [] if classifies else ["## Prompt format", "", *_prompt_format(writer), ""]
    lines += [
        "## License", "",
        f"The weights are derived from {origin}: its license applies, and so do the terms of the training data. Umbra adds none.",
        "",
    ]  # fmt: skip
    folder.write_text(staging / README, sealed("\n".join(lines)))


def _commands(name: str, to: str, files: list[Parity], classifies: bool) -> list[str]:
    """Installation and one command per runtime."""
    text = "the room was clean" if classifies else "your prompt"
    if to == "hf":
        auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
        return ["```sh", "pip install transformers torch", "```", "", "```python",
                f"from transformers import AutoTokenizer, {auto}", "",
                f'tokenizer, model = AutoTokenizer.from_pretrained("{name}"), {auto}.from_pretrained("{name}")', "```"]  # fmt: skip
    packages = "onnxruntime tokenizers numpy" if to == "onnx" else "cyllama numpy"
    smallest = min(files, key=lambda row: row.bytes).file
    lines = ["With Python 3.10 or later, from the folder above this one:", "", "```sh", f"pip install {packages}",
             f'python {name}/run.py "{text}"',
             f'python {name}/run.py --model {smallest} "{text}"   # the smallest file', "```"]  # fmt: skip
    if to == "onnx":
        inputs = "`input_ids` and `attention_mask`" if classifies else "`input_ids`, `attention_mask` and the cache"
        return [*lines, "", f"In another program, onnxruntime (Python, C++, C#, Java, JavaScript) reads {inputs}:", "",
                "```python", "import onnxruntime", "",
                f'session = onnxruntime.InferenceSession("{name}/{smallest}")', "```"]  # fmt: skip
    return [*lines, "", "llama.cpp and Ollama:", "", "```sh",
            f'llama-cli -m {name}/{smallest} -p "{text}" --temp 0',
            f"ollama create {name.lower()} -f {name}/Modelfile", f'ollama run {name.lower()} "{text}"', "```"]  # fmt: skip


def _prompt_format(writer: ChatFormatter) -> list[str]:
    """How a prompt is written for the model."""
    if not writer.chats:
        return ["The prompt is the text itself; there is no chat template."]
    rendered = writer.ask(PLACEHOLDER)
    return [f"`run.py`, llama.cpp and Ollama apply the chat template. The prompt {PLACEHOLDER} becomes", "",
            "````text", rendered, "````"]  # fmt: skip
