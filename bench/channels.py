"""The energy of SmolLM2-135M's hidden states by channel: ``python -m bench.channels --data ../shared/data``.

Before every third block: the root mean square of the first token and of the other tokens; for the other tokens, the share of the
energy in the three largest channels and the effective dimension (e to the entropy of their covariance's spectrum).
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from umbra.base.loading import load_base, load_tokenizer
from umbra.options import EMBEDDED

from .shipping.text import rows

TEXTS = 64


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.channels", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    data = parser.parse_args().data
    base: Any = load_base(EMBEDDED, dtype="float32").eval()
    tokenizer: Any = load_tokenizer(EMBEDDED)
    texts = [f"{r['text']}\nWhat is the intent?\n" for r in rows(data, "intents", "train")[:TEXTS]]
    states = [base(tokenizer(t, return_tensors="pt").input_ids, output_hidden_states=True).hidden_states for t in texts]
    print("| block | first token | others | three largest | dimension |\n|---:|---:|---:|---:|---:|")
    for l in range(0, len(states[0]) - 1, 3):
        first, others = torch.stack([t[l][0, 0] for t in states]), torch.cat([t[l][0, 1:] for t in states])
        energy = others.square().mean(0).sort(descending=True).values
        share = torch.linalg.svdvals(others - others.mean(0)).square()
        share = share / share.sum()
        dimension = torch.special.entr(share).sum().exp()
        print(
            f"| {l} | {first.square().mean().sqrt():.1f} | {others.square().mean().sqrt():.1f} "
            f"| {100 * energy[:3].sum() / energy.sum():.0f} % | {dimension:.0f} |"
        )


if __name__ == "__main__":
    main()
