"""Write down three walks through the code as call lists: ``python -m bench.walks OUT.md``.

A walk lists the functions of Umbra in the order in which they are first entered, grouped by module. ``PYTHONPATH`` selects the
checkout that is traced.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import FrameType

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import umbra

SOURCE = str(Path(umbra.__file__).parent)
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def trace(walk: Callable[[], object]) -> tuple[list[tuple[str, str]], int]:
    """Return (module, function) of each function in the order of its first call, and the number of JSON texts parsed."""
    calls: dict[tuple[str, str], None] = {}
    parsed = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal parsed
        code, caller = frame.f_code, frame.f_back
        if event != "call":
            return
        if code.co_filename.startswith(SOURCE) and "<" not in code.co_name:
            calls[Path(code.co_filename).relative_to(SOURCE).with_suffix("").as_posix(), code.co_qualname] = None
        parsed += code is json.loads.__code__ and caller is not None and caller.f_code.co_filename.startswith(SOURCE)

    sys.setprofile(profile)
    try:
        walk()
    finally:
        sys.setprofile(None)
    return list(calls), parsed


def lines(name: str, walk: Callable[[], object], last: str = "") -> list[str]:
    """Return a walk as Markdown, an entry for each run of functions of one module.

    Args:
        name: the heading.
        walk: what is traced.
        last: part of the name of the function that ends the list.
    """
    calls, parsed = trace(walk)
    ends = [i for i, (_, function) in enumerate(calls) if last and function.endswith(last)]
    calls = calls[: ends[0] + 1] if ends else calls
    files, runs = {module for module, _ in calls}, groupby(calls, key=lambda call: call[0])
    entries = [f"- `{module}`: {', '.join(function for _, function in run)}" for module, run in runs]
    head = f"{len(calls)} functions in {len(files)} files; {len(entries)} changes of file; {parsed} JSON texts parsed."
    return [f"### {name}", "", head, "", *entries, ""]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each printable character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def main(out: Path) -> None:
    """Trace the walks on a tiny random Llama, and write them to a file."""
    torch.manual_seed(0)
    train = importlib.import_module("umbra.training.train" if find_spec("umbra.training") else "umbra.train").train
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(f"{scratch}/base")
        character_tokenizer().save_pretrained(f"{scratch}/base")
        Path(scratch, "data.jsonl").write_text('{"prompt": "2 + 2 =", "completion": "4"}\n' * 4)
        settings = {
            "base": f"{scratch}/base", "train_data": f"{scratch}/data.jsonl", "output_dir": f"{scratch}/out", "rank": 4,
            "max_steps": 1, "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        model = umbra.attach(base, umbra.ShadowConfig(rank=4)).eval()
        model.save_pretrained(f"{scratch}/adapter")
        again, ids = AutoModelForCausalLM.from_pretrained(f"{scratch}/base"), torch.arange(3, 11)[None]
        text = [
            *lines("A record from file to loss (`umbra train`)", lambda: train(settings), "_total"),
            *lines("`generate(draft=4)`", lambda: model.generate(ids, draft=4, max_new_tokens=8, do_sample=False)),
            *lines("`umbra.load`", lambda: umbra.load(f"{scratch}/adapter", again)),
        ]
    out.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
