"""Decoder families of transformers as data: a tiny configuration of each, and why some cannot carry a shadow.

`test_architectures.py` runs its checks on every entry, and docs/architectures.md is written from their outcomes.
"""

from dataclasses import dataclass, field
from typing import Any

from tiny import COMMON, LLAMA_LIKE


@dataclass(frozen=True)
class Family:
    """One line of docs/architectures.md.

    Args:
        kind: dense, MoE, ALiBi, learned positions, parallel blocks, hybrid, …: what is special about it.
        config: keyword arguments of its configuration, of about 2 × 16 … 32.
        shadow: the form that the default shadow takes beside it: mirror or dense.
        note: for the reader of the page.
        model_type: of its configuration; the family's own name where empty.
        skip: names of checks that cannot hold, each with the reason, which is written on the page.
    """

    kind: str
    config: dict[str, Any]
    shadow: str = "mirror"
    note: str = ""
    model_type: str = ""
    skip: dict[str, str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family("dense", LLAMA_LIKE),
    "gpt2": Family("learned positions", {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
}

# Model types of AutoModelForCausalLM that `umbra.attach` refuses, each with what its error says (a regular expression).
REFUSED: dict[str, str] = {}
