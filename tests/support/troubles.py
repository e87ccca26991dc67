"""Kinds of trouble that test_trouble.py provokes.

``PYTHONPATH=tests python -m support.troubles`` prints the table of docs/reference/errors.md.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LONG = "x" * 300
TRAIN = "train --base {base} --use_cpu --disable_tqdm --max_steps 1 --rank 4 "


class Kind(NamedTuple):
    """A kind of trouble: the command, words of its error line, and the remedy."""

    name: str
    command: str
    says: str
    mend: str
    prepare: Callable[[Path], object] | None = None
    code: int = 2


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Return a preparation that writes a file."""
    return lambda here: (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edited(name: str, **values: object) -> Callable[[Path], object]:
    """Return a preparation that edits a JSON file of the copied base or adapter."""

    def edit(here: Path) -> None:
        file = here / name
        file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))

    return edit


def looped(here: Path) -> None:
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
NAME = "check the name"
RUN = TRAIN + "--train_data {data} --output_dir {here}/x "
THREE = RUN.replace("--max_steps 1", "--max_steps 3")
ON_BASE = "generate {out} x --base {here}/base"
# Adapters carry their tokenizer: training alone reads that of the base.
TRAIN_ON = RUN.replace("{base}", "{here}/base")
KINDS = [
    # the command line
    Kind("unknown command", "bogus", "Unknown command 'bogus'", "umbra --help lists the commands"),
    Kind("unknown flag", "eval {out} {data} --bogus 1", "unrecognized arguments: --bogus", "umbra eval --help"),
    Kind("missing argument", "eval {out}", "required: data", "umbra eval --help"),
    Kind("flag without its value", "train --rank", "--rank: expected one argument", "give the value"),
    Kind("flag given twice", "eval {out} {data} --limit 1 --limit 2", "--limit is given twice", "give it once"),
    Kind("flag of the run given twice", TRAIN + "--learning_rate 1 --learning-rate 2", "given twice", "give it once"),
    Kind("misspelt setting", "train --learning-rat 1", "Did you mean 'learning_rate'", "spell it as the message says"),
    Kind("no number", "generate {out} x --max-new-tokens many", "invalid int value: 'many'", "a number"),
    Kind("negative number", "eval {out} {data} --batch-size=-1", "batch_size must be at least 1", "a larger number"),
    Kind("zero", "generate {out} x --max-new-tokens 0", "max_new_tokens must be at least 1", "a larger number"),
    Kind("NaN", "generate {out} x --temperature nan", "temperature must be float, got nan", "a finite number"),
    Kind("infinity", RUN + "--learning_rate inf", "learning_rate", "a number"),
    Kind("huge seed of train", RUN + "--seed 1" + 30 * "0", "seed must be", "below 2³²"),
    Kind("huge seed of generate", "generate {out} x --seed 1" + 30 * "0", "seed must be", "a seed below 2³²"),
    Kind("huge seed of bench", "bench --seed 1" + 30 * "0", "seed must be", "a seed below 2³²"),
    Kind(
        "huge seed of pretrain",
        "pretrain --base {base} --data {data} --output_dir {here}/x --seed 1" + 30 * "0",
        "seed must be",
        "below 2³²",
    ),
    Kind(
        "seed above 2³²",
        "generate {out} x --seed 4294967296",
        "seed must be less than 4,294,967,296",
        "a seed below 2³²",
    ),
    Kind("negative learning rate", RUN + "--learning_rate=-1", "learning_rate must be at least 0", "a positive rate"),
    Kind("unknown dtype", "detach {out} {here}/x --dtype int8", "Unknown dtype 'int8'", "one of those listed"),
    Kind("unknown mode", "eval {out} {data} --modes sideways", "Unknown mode 'sideways'", "one of those listed"),
    Kind(
        "broken regular expression", "eval {out} {data} --answer-pattern (", "not a valid regular expression", "mend it"
    ),
    Kind("empty prompt", "generate {out} ' '", "The prompt is empty", "give a prompt"),
    Kind(
        "weights that overflow",
        THREE + "--alpha 1e30 --logging_steps 1",
        "Training has diverged by step",
        "smaller settings",
    ),
    Kind("a rate that overflows", THREE + "--learning_rate 1e38", "Training has diverged by step", "a lower rate"),
    Kind("a schedule's settings as text", RUN + "--lr_scheduler_kwargs abc", "refuse these settings", "a JSON object"),
    Kind(
        "unknown settings of a schedule",
        RUN + "--lr_scheduler_kwargs '{{\"x\":1}}'",
        "refuse these settings",
        "those it has",
    ),
    # settings in a file
    Kind("no such settings file", "train {here}/no.yaml", "No such file", NAME),
    Kind("a folder as settings", "train {here}", "Is a directory", "name a file"),
    Kind(
        "tabs in YAML",
        "train {here}/x.yaml",
        "cannot start any token",
        "indent by spaces",
        text("x.yaml", "a:\n\tb: 1\n"),
    ),
    Kind(
        "a list as settings",
        "train {here}/x.yaml",
        "must hold `field: value` lines",
        "write fields",
        text("x.yaml", "- a\n"),
    ),
    Kind(
        "empty settings file",
        "train {here}/x.yaml",
        "must hold `field: value` lines",
        "write fields",
        text("x.yaml", ""),
    ),
    Kind(
        "a key that stands twice",
        "train {here}/x.yaml",
        "a key stands twice at line 1",
        "remove one",
        text("x.yaml", "rank: 1\nrank: 2\n"),
    ),
    Kind(
        "settings that are not UTF-8",
        "train {here}/x.yaml",
        "unacceptable character",
        "save as UTF-8",
        text("x.yaml", b"base: caf\xe9"),
    ),
    Kind(
        "huge settings file",
        "train {here}/x.yaml",
        "larger than 131,072 bytes",
        "name the right file",
        text("x.yaml", "a: " + "x" * 200_000),
    ),
    Kind(
        "aliases that multiply",
        "train {here}/x.yaml",
        "aliases expand to more",
        "write values out",
        text("x.yaml", BOMB),
    ),
    Kind(
        "an alias to itself",
        "train {here}/x.yaml",
        "aliases expand to more",
        "write values out",
        text("x.yaml", "a: &a [*a]\n"),
    ),
    Kind(
        "Python objects in YAML",
        "train {here}/x.yaml",
        "could not determine a constructor",
        "plain values only",
        text("x.yaml", "a: !!python/object/apply:os.system [x]"),
    ),
    Kind(
        "a pipe as settings",
        "train {here}/x.yaml",
        "it is a pipe",
        "name a file",
        lambda here: os.mkfifo(here / "x.yaml"),
    ),
    Kind(
        "control characters in a key",
        "train {here}/x.yaml",
        "'\\x1b[31mrank'",
        "spell it right",
        text("x.yaml", '"\\e[31mrank": 3'),
    ),
    Kind("a setting of another type", RUN + "--max_length many", "max_length", "a value of that type"),
    # names and paths
    Kind("no such adapter", "inspect {here}/nowhere", "does not exist", NAME),
    Kind("no such base", "generate {out} x --base {here}/nowhere", "there is no such folder", NAME),
    Kind("a base with too many parts", "generate {out} x --base a/b/c", "there is no such folder", NAME),
    Kind("a file as a base", "generate {out} x --base {data}", "there is no such folder", "name its folder"),
    Kind("an adapter whose base has moved", "generate {moved} x", "say where it is by base=… or --base", "--base"),
    Kind("name of more than 255 bytes", "inspect {here}/" + LONG, "File name too long: shorten it", "a shorter name"),
    Kind("path of more than 4,096 bytes", "inspect " + "a/" * 3000, "File name too long: shorten it", "a shorter path"),
    Kind(
        "output name of more than 255 bytes",
        TRAIN + "--train_data {data} --output_dir {here}/" + LONG,
        "File name too long",
        "a shorter name",
    ),
    Kind("a NUL in a path", "inspect 'a\0b'", "path must be str", NAME),
    # output
    Kind(
        "output_dir is a file",
        TRAIN + "--train_data {data} --output_dir {base}/config.json",
        "is no folder",
        "name a folder",
    ),
    Kind(
        "output_dir leads back to itself",
        TRAIN + "--train_data {data} --output_dir {here}/a",
        "a symbolic link to nothing",
        "remove the link",
        looped,
    ),
    Kind(
        "output_dir is a link to nothing",
        TRAIN + "--train_data {data} --output_dir {here}/a",
        "a symbolic link to nothing",
        "remove the link",
        lambda here: (here / "a").symlink_to(here / "gone"),
    ),
    Kind("output below a file", "detach {out} {data}/x", "Not a directory", NAME),
    Kind("output that is not empty", "detach {out} {out}", "is not empty", "another folder, or --overwrite"),
    Kind("replies into a folder", "eval {out} {data} --output {here}", "not a writable file", "name a file"),
    Kind(
        "replies into a pipe",
        "eval {out} {data} --output {here}/x",
        "not a writable file",
        "name a file",
        lambda here: os.mkfifo(here / "x"),
    ),
    Kind("replies over the data", "eval {out} {data} --output {data}", "is the data that is scored", "another file"),
    Kind("replies into no folder", "eval {out} {data} --output {here}/no/x", "a folder that does not exist", "make it"),
    Kind(
        "full disk for replies",
        "eval {out} {data} --modes base --max-new-tokens 1 --output /dev/full",
        "The scores are complete",
        "free some space",
    ),
    Kind("report of no study", "report {here}/nowhere", "study", "name the folder of umbra study"),
    # adapters
    Kind("empty adapter folder", "inspect {here}", "adapter_config.json is missing", "name an adapter"),
    Kind(
        "adapter that is no JSON", "inspect {copy}", "is damaged", "restore it", text("copy/adapter_config.json", "{")
    ),
    Kind(
        "adapter of a later version",
        "inspect {copy}",
        "load it with the version that wrote it",
        "update Umbra",
        edited("copy/adapter_config.json", format_version=99),
    ),
    Kind(
        "adapter of another method",
        "inspect {copy}",
        "was not written by Umbra",
        "use the package that wrote it",
        edited("copy/adapter_config.json", peft_type="LORA"),
    ),
    Kind(
        "truncated adapter",
        "generate {copy} x",
        "is damaged",
        "restore it",
        text("copy/adapter_model.safetensors", b"\x10" * 20),
    ),
    Kind(
        "control characters in an adapter",
        "generate {copy} x",
        "\\x1b[2J",
        "--base",
        edited("copy/adapter_config.json", base_model_name_or_path="./\x1b[2J\nFROM evil"),
    ),
    Kind("convert to nothing", "convert {out}", "The format and the folder are missing", "--to, --out"),
    Kind(
        "export to an unknown format",
        "export {out} --to tflite --out {here}/x",
        "Say what to write",
        "hf, onnx or gguf",
    ),
    # bases
    Kind(
        "base of pickled weights",
        ON_BASE,
        "safetensors",
        "convert it",
        lambda here: (here / "base/model.safetensors").rename(here / "base/pytorch_model.bin"),
    ),
    Kind("base with NaN", ON_BASE, "holds NaN", "restore it", lambda here: spoil(here / "base/model.safetensors")),
    Kind(
        "base that lacks tensors",
        ON_BASE,
        "it lacks",
        "restore it",
        lambda here: spoil(here / "base/model.safetensors", drop=True),
    ),
    Kind(
        "base of an unknown kind",
        ON_BASE,
        "cannot be loaded",
        "a base that transformers knows",
        edited("base/config.json", model_type="no_such_model"),
    ),
    Kind(
        "base with code of its own",
        ON_BASE,
        "cannot be loaded",
        "load it yourself",
        edited("base/config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
    ),
    Kind(
        "base quantised by kernels of the hub",
        ON_BASE,
        "kernels that transformers fetches",
        "dequantise it",
        edited("base/config.json", quantization_config={"quant_method": "mxfp4"}),
    ),
    Kind(
        "tokenizer that does not fit its file", TRAIN_ON, "tokenizer", "restore it", text("base/tokenizer.json", "[]")
    ),
    Kind(
        "chat template with an error",
        TRAIN_ON,
        "chat template refuses",
        "mend the template, or --chat-template no",
        lambda here: (here / "base/chat_template.jinja").write_text("{{ raise_exception('no') }}"),
    ),
    Kind(
        "chat template that escapes",
        TRAIN_ON,
        "chat template refuses",
        "mend the template",
        lambda here: (here / "base/chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ),
    # data
    Kind("no such data", "eval {out} {here}/no.jsonl", "cannot be read", NAME),
    Kind("data that is no JSON", "eval {out} {here}/x.jsonl", "x.jsonl:1", "mend the line", text("x.jsonl", "{\n")),
]


def spoil(file: Path, drop: bool = False) -> None:
    """Put NaN into the first tensor of a file, or remove the tensor."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = min(tensors)
    tensors[name] = tensors[name] * float("nan")
    save_file({k: v for k, v in tensors.items() if not drop or k != name}, file, metadata={"format": "pt"})


def rows() -> str:
    """Return the table of docs/reference/errors.md."""
    lines = ["| trouble | command | umbra says | what helps |", "|---|---|---|---|"]
    for kind in KINDS:
        says = kind.says.replace("|", "\\|")
        lines.append(f"| {kind.name} | `{kind.command.split()[0]}` | … {says} … | {kind.mend} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(rows())
