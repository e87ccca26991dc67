"""The cost of a training step by layers, batch, context and rank, varied one at a time on random Llamas."""

from dataclasses import dataclass
from typing import Any

from umbra.lab.bench.cases import Step
from umbra.lab.bench.methods import BASE, LORA

AXES = {
    "layers": (4, 8, 16, 32),
    "batch": (1, 2, 4, 8),
    "context": (64, 128, 256, 512),
    "rank": (4, 8, 16, 32, 64),
}
CENTRE = {"layers": 8, "batch": 4, "context": 128, "rank": 8}
SHAPE = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 704, "vocab_size": 8192,
}  # fmt: skip
ROWS = (BASE, LORA, "PEFT LoRA +", "Umbra")


@dataclass(frozen=True)
class Point:
    """One value of one size; the other sizes are those of `CENTRE`."""

    axis: str
    value: int

    @property
    def sizes(self) -> dict[str, int]:
        """All sizes."""
        return {**CENTRE, self.axis: self.value}

    @property
    def shape(self) -> dict[str, Any]:
        """Fields of the configuration of the base."""
        return {**SHAPE, "num_hidden_layers": self.sizes["layers"]}

    @property
    def case(self) -> Step:
        """The case: a step with the last third of the tokens labelled."""
        s = self.sizes
        about = ", ".join(f"{n} {v}" for n, v in s.items())
        return Step(f"{self.axis} {self.value}", about, s["batch"], s["context"], labelled=1 / 3)


POINTS = tuple(Point(axis, value) for axis, values in AXES.items() for value in values)
