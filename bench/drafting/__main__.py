"""``python -m bench.drafting``."""

import argparse
import copy
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import umbra
from umbra.base.loading import load_base, load_tokenizer
from umbra.files import folder
from umbra.lab.bench.machine import Device
from umbra.options import EMBEDDED

from . import measure, report, shadow

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    """Train missing rounds, measure, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.drafting", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/drafting"), help="folder for the trained shadow")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    rounds = "examples per round of training the shadow alone"
    parser.add_argument("--alone", type=int, nargs="+", default=[8000], help=rounds)
    parser.add_argument(
        "--together", type=int, nargs="+", default=[600, 800, 2400], help="examples per round of training with the base"
    )
    parser.add_argument("--questions", type=int, default=10, help="test questions to time")
    parser.add_argument("--split", default="test", choices=list(shadow.SEEDS), help="of the problems to time")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="precision of the base")
    given = parser.parse_args()
    adapter = shadow.train(given.out, given.alone, given.together)
    tokenizer: Any = load_tokenizer(EMBEDDED)
    base: Any = load_base(EMBEDDED, dtype=getattr(torch, given.dtype))
    bare = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model: Any = umbra.load(adapter, base=base).eval()
    prompts = shadow.prompts(tokenizer, given.split, given.questions)
    costs = measure.costs(bare, model, prompts[0])
    rows, texts = measure.answers(bare, model, tokenizer.eos_token_id, prompts)
    expected = [r["completion"] for r in shadow.records(given.split, given.questions)]
    right = sum(_result(tokenizer.decode(t)) == _result(e) for t, e in zip(texts, expected, strict=True))
    shadow_parameters = sum(p.numel() for n, p in model.shadow.named_parameters() if "embed" not in n)
    blocks = sum(p.numel() for n, p in model.base.named_parameters() if "embed" not in n)
    values = {
        "base": EMBEDDED, "dtype": given.dtype, "questions": given.questions, "split": given.split, "right": right,
        "machine": Device().describe(), "date": date.today().isoformat(),
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "reasoning_gym")),
        "training": f"{' + '.join(map(str, given.alone))} examples alone, {' + '.join(map(str, given.together))} beside the base",
        "shadow_parameters": shadow_parameters, "share": shadow_parameters / blocks,
        "draft_vocabulary": len(model.shadow.draft_tokens),
        **report.summary(rows, costs), "costs": costs, "rows": rows,
    }  # fmt: skip
    stem = "drafting" if given.dtype == "float32" else f"drafting-{given.dtype}"
    given.results.mkdir(parents=True, exist_ok=True)
    text = report.text(values)
    folder.write_text(given.results / f"{stem}.json", json.dumps(values, indent=1) + "\n")
    folder.write_text(given.results / f"{stem}.md", text)
    report.picture(values, given.results / f"{stem}.png")
    print(text)


def _result(text: str) -> str:
    """Return the text after ####."""
    return text.partition("####")[2].replace("<|im_end|>", "").strip()


if __name__ == "__main__":
    main()
