"""The columns: what is run, and what its result must equal before it is timed.

At initialisation every adapter is without effect, so the base itself tells the loss, the logits and the tokens.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from umbra.lab.bench.base import Base
from umbra.lab.bench.methods import BASE, LORA, REFERENCES, Batch, Method, naive_loss

Run = Callable[[], Tensor]
FEW = (BASE, LORA, "PEFT LoRA +", "Umbra")  # the rows of the costlier columns, unless rows are asked for
# |a − b| ≤ tolerance · max |b|: rounding of fp32 through some dozens of blocks. bf16 keeps 8 bits, and DoRA, which divides
# by the norms of weights, rounds elsewhere than the base does: 5 % of the largest logit on SmolLM2-135M.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
ALONE = "measured for Umbra only"
ONLY = "differs from another row only in {}"
DRAFT = 4  # tokens that the shadow drafts at once


class Disagreement(Exception):
    """A method that does not do what the base does, and is not timed."""


def check_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise a Disagreement where they differ by more than ``tolerance`` times the largest expected entry."""
    found, expected = found.detach().float(), expected.float()
    if found.shape != expected.shape:
        raise Disagreement(f"{what} have shape {tuple(found.shape)}, the base's {tuple(expected.shape)}")
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= tolerance * scale:
        raise Disagreement(f"{what} differ from the base's by {difference:.2e}, of {scale:.2e} at most")


def make_batch(base: Base, rows: int, length: int, labelled: float = 1.0) -> Batch:
    """Random tokens (rows, length), of which the last share is labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, base.vocabulary, (rows, length), generator=generator).to(base.device)
    labels = ids.clone()
    labels[:, : round(length * (1 - labelled))] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def unlabelled(batch: Batch) -> Batch:
    """The batch as inference is given it."""
    return {k: v for k, v in batch.items() if k != "labels"}


@torch.no_grad()
def check_logits(model: Any, base: Base) -> None:
    """Raise a Disagreement unless a method's logits (2, 16, V) at initialisation are the base's."""
    batch = unlabelled(make_batch(base, 2, 16))
    expected = base.answer("logits", lambda bare: bare(**batch).logits)
    check_close("logits", model.eval()(**batch).logits, expected, TOLERANCE[base.dtype])


@dataclass(frozen=True)
class Case:
    """One column, on a batch of ``rows`` × ``length`` tokens.

    Args:
        name: for ``--cases`` and the tables.
        about: what is measured, in one line.
        methods: the rows it has, unless rows are asked for; None for all.
    """

    name: str
    about: str
    rows: int
    length: int
    methods: tuple[str, ...] | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def absent(self, method: Method) -> str | None:
        """Why a method has no such column; None where it has."""
        return ONLY.format("training") if method.only == "training" else None

    def ready(self, method: Method, model: Any, base: Base) -> Run:
        """What is to be timed, run once and found to do what the base does.

        Raises:
            Disagreement: it does not.
        """
        raise NotImplementedError

    def cost(self, forward: float, token: float) -> float:
        """Rough seconds of one run, from those of the base per token of a forward and per decoded token."""
        raise NotImplementedError


@dataclass(frozen=True)
class Step(Case):
    """Forward, backward, gradients dropped; no optimizer. The forward alone for the bare base."""

    labelled: float = 1.0

    def absent(self, method: Method) -> str | None:
        return ONLY.format("inference") if method.only == "inference" else None

    def ready(self, method: Method, model: Any, base: Base) -> Run:
        if not method.is_bare:
            batch = make_batch(base, self.rows, self.length, self.labelled)
            expected = base.answer(
                ("loss", self.rows, self.length, self.labelled),
                lambda bare: naive_loss(bare(**unlabelled(batch)).logits, batch["labels"]),
            )
            with torch.no_grad():
                found = (method.task or method.loss)(model.train(), batch)
            check_close("task losses", found, expected, LOSS_TOLERANCE[base.dtype])
        run = self.unchecked(method, model, base)
        run()
        return run

    def unchecked(self, method: Method, model: Any, base: Base) -> Run:
        """What is to be timed or weighed."""
        batch = make_batch(base, self.rows, self.length, self.labelled)
        return self._forward(model, unlabelled(batch)) if method.is_bare else self._step(method, model, batch)

    def _forward(self, model: Any, batch: Batch) -> Run:
        @torch.no_grad()
        def run() -> Tensor:
            return model.eval()(**batch, use_cache=False).logits[0, -1]

        return run

    def _step(self, method: Method, model: Any, batch: Batch) -> Run:
        def run() -> Tensor:
            loss = method.loss(model.train(), batch)
            loss.backward()
            model.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    def cost(self, forward: float, token: float) -> float:
        return 2.6 * self.tokens * forward


@dataclass(frozen=True)
class Memory(Step):
    """The peak memory of such a step, in a process of its own; see memory.py."""

    def absent(self, method: Method) -> str | None:
        return "the bare base has no training step" if method.is_bare else super().absent(method)

    def cost(self, forward: float, token: float) -> float:
        return 8 + super().cost(forward, token)


@dataclass(frozen=True)
class Prefill(Case):
    """One forward over a prompt that fills a cache; logits as the model's own `generate` asks for them."""

    def ready(self, method: Method, model: Any, base: Base) -> Run:
        batch = unlabelled(make_batch(base, self.rows, self.length))
        # As in GenerationMixin: the last token's logits, where the model's forward takes that argument.
        last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

        @torch.no_grad()
        def run() -> Tensor:
            return model(**batch, **last, use_cache=True).logits[:, -1]

        model.eval()
        expected = base.answer(("prefill", self), lambda bare: bare(**batch, logits_to_keep=1).logits[:, -1])
        check_close("last logits", run(), expected, TOLERANCE[base.dtype])
        return run

    def cost(self, forward: float, token: float) -> float:
        return self.tokens * forward


@dataclass(frozen=True)
class Decode(Case):
    """``new`` greedy tokens after a prompt, with a cache."""

    new: int = 32

    def options(self, method: Method, base: Base) -> dict[str, Any]:
        """Of `generate`, beside the common ones."""
        return {}

    def ready(self, method: Method, model: Any, base: Base) -> Run:
        run = self._generation(model, base, **self.options(method, base))
        question = ("tokens", self.rows, self.length, self.new)
        expected = base.answer(question, lambda bare: self._generation(bare, base)())
        self._check_tokens(run(), expected, base)
        return run

    def _generation(self, model: Any, base: Base, **options: Any) -> Run:
        batch = unlabelled(make_batch(base, self.rows, self.length))
        model.eval()

        @torch.no_grad()
        def run() -> Tensor:
            return model.generate(
                **batch, max_new_tokens=self.new, do_sample=False, use_cache=True, pad_token_id=0, **options
            )

        return run

    def _check_tokens(self, found: Tensor, expected: Tensor, base: Base) -> None:
        """Equal, up to the base's own ties: where another token stands first, the base must like it as much."""
        if found.shape != expected.shape:
            raise Disagreement(f"tokens have shape {tuple(found.shape)}, the base's {tuple(expected.shape)}")
        for ours, theirs in zip(found, expected, strict=True):
            differs = (ours != theirs).nonzero()
            if not len(differs):
                continue
            at = int(differs[0])
            logits = base.model(input_ids=theirs[None, :at], logits_to_keep=1).logits[0, -1].float()
            gap = float((logits.max() - logits[ours[at]]) / logits.abs().max())
            if gap > TOLERANCE[base.dtype]:
                place = f"token {at - self.length} of {self.new}"
                raise Disagreement(f"{place} is {int(ours[at])}, the base's {int(theirs[at])}")

    def cost(self, forward: float, token: float) -> float:
        return self.tokens * forward + 1.7 * self.new * token


@dataclass(frozen=True)
class Compiled(Decode):
    """With a static cache and a compiled forward; on CUDA with CUDA graphs. Compiling itself is not timed."""

    def absent(self, method: Method) -> str | None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "torch.compile needs a C++ compiler (g++), which is not here"
        return super().absent(method)

    def options(self, method: Method, base: Base) -> dict[str, Any]:
        mode: Any = "reduce-overhead" if base.device.type == "cuda" else None
        config: Any = CompileConfig(mode=mode)
        config._compile_all_devices = True  # transformers compiles by itself on accelerators only
        return {"cache_implementation": "static", "compile_config": config}

    def ready(self, method: Method, model: Any, base: Base) -> Run:
        torch._dynamo.config.recompile_limit = 64  # every method compiles the same code of the base anew
        return super().ready(method, model, base)

    def cost(self, forward: float, token: float) -> float:
        return 8 + super().cost(forward, token)  # compiling, spread over the rounds


@dataclass(frozen=True)
class Detached(Decode):
    """The shadow alone for Umbra, in the base's precision; the others as they are, for comparison."""

    def absent(self, method: Method) -> str | None:
        return super().absent(method) if method.is_umbra or method.name in REFERENCES else ALONE

    def ready(self, method: Method, model: Any, base: Base) -> Run:
        if not method.is_umbra:
            return super().ready(method, model, base)
        edge, batch = model.eval().detached(), unlabelled(make_batch(base, 2, 16))
        with torch.no_grad(), model.shadow_only():
            expected = model(**batch).logits
        with torch.no_grad():
            check_close("the detached model's logits", edge(**batch).logits, expected, TOLERANCE[base.dtype])
        edge.generation_config.eos_token_id = None
        run = self._generation(edge.to(base.dtype), base)
        run()
        return run

    def cost(self, forward: float, token: float) -> float:
        return 0.7 * super().cost(forward, token)


@dataclass(frozen=True)
class Drafted(Decode):
    """The shadow drafts for Umbra; the others as they are, for comparison."""

    def absent(self, method: Method) -> str | None:
        if method.name in REFERENCES:
            return None
        return super().absent(method) if method.is_umbra else ALONE

    def options(self, method: Method, base: Base) -> dict[str, Any]:
        return {"draft": DRAFT} if method.is_umbra else {}


CASES: tuple[Case, ...] = (
    Step("step", "forward and backward, 4 × 128 tokens, all labelled", 4, 128),
    Step("step-masked", "forward and backward, 4 × 128 tokens, the last third labelled", 4, 128, labelled=1 / 3),
    *(
        Step(f"batch-{n}", f"as step-masked, {n} × 128 tokens", n, 128, FEW, labelled=1 / 3) for n in (1, 2, 8)
    ),
    Prefill("prefill", "a forward over 4 × 128 tokens that fills a cache, with the last tokens' logits", 4, 128),
    Decode("decode", "32 greedy tokens after 32, one row, cached", 1, 32),
    Decode("latency", "8 greedy tokens after a prompt of 150, one row (the paper's setting)", 1, 150, new=8),
    Detached("decode-detached", "as decode, Umbra's shadow alone", 1, 32, (*REFERENCES, "Umbra", "Umbra default")),
    Drafted("decode-drafted", f"as decode, Umbra's shadow drafts {DRAFT} tokens at once", 1, 32, (*REFERENCES, "Umbra")),
    Compiled("decode-compiled", "as decode, static cache, compiled", 1, 32, (BASE, LORA, "Umbra", "Umbra upper third")),
    Memory("memory", "peak memory of a step, 8 × 256 tokens, all labelled", 8, 256),
    Memory("memory-masked", "peak memory of a step, 8 × 256 tokens, the last third labelled", 8, 256, labelled=1 / 3),
)  # fmt: skip
