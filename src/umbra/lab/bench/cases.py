"""The cases to measure, columns of the tables, and the results that a method must reproduce before it is timed.

At initialization no adapter has an effect, so the base gives the expected loss, logits and tokens.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from umbra.base import private_torch, private_transformers
from umbra.lab.bench.base import Base, LanguageModel
from umbra.lab.bench.methods import BASE, LORA, REFERENCES, Batch, Method, naive_loss
from umbra.model.shadow_model import ShadowModel

Run = Callable[[], Tensor]
FEW = (BASE, LORA, "PEFT LoRA +", "Umbra")  # the default methods of expensive cases
# |a − b| ≤ tolerance · max |b|: fp32 rounding through dozens of blocks. bf16 has 8 bits, and DoRA, which divides by the norms of
# weights, rounds at other places than the base: 5 % of the largest logit on SmolLM2-135M.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
ALONE = "measured for Umbra only"
ONLY = "differs from another method only in {}"
DRAFT = 4  # draft tokens per verification


class Disagreement(Exception):
    """A method does not reproduce the results of the base, and is not timed."""


def check_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise `Disagreement` if tensors differ by more than ``tolerance`` times the largest expected entry."""
    actual, expected = actual.detach().float(), expected.float()
    if actual.shape != expected.shape:
        raise Disagreement(f"{what} have shape {tuple(actual.shape)}, the base's {tuple(expected.shape)}")
    difference, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    if not difference <= tolerance * scale:
        raise Disagreement(f"{what} differ from the base's by {difference:.2e}, of {scale:.2e} at most")


def make_batch(base: Base, rows: int, length: int, labelled: float = 1.0) -> Batch:
    """Return random tokens (rows, length), of which the last share ``labelled`` has labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, base.vocabulary, (rows, length), generator=generator).to(base.device)
    labels = ids.clone()
    labels[:, : round(length * (1 - labelled))] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def unlabelled(batch: Batch) -> Batch:
    """Return the batch without labels."""
    return {k: v for k, v in batch.items() if k != "labels"}


@torch.no_grad()
def check_logits(model: nn.Module, base: Base) -> None:
    """Raise `Disagreement` unless the logits (2, 16, V) of a method at initialization are those of the base."""
    batch = unlabelled(make_batch(base, 2, 16))
    expected = base.reference("logits", lambda bare: bare(**batch).logits)
    check_close("logits", model.eval()(**batch).logits, expected, TOLERANCE[base.dtype])


@dataclass(frozen=True)
class Case(ABC):
    """One case, a column of the tables.

    Args:
        name: Its name in ``--cases`` and in the tables.
        about: What is measured, in one line.
        rows: The rows of the batch.
        length: The tokens of a row.
        methods: The methods that are measured by default; None for all.
    """

    name: str
    about: str
    rows: int
    length: int
    methods: tuple[str, ...] | None = None

    @property
    def tokens(self) -> int:
        """The tokens of the batch."""
        return self.rows * self.length

    def absent(self, method: Method) -> str | None:
        """Return why a method is not measured; None if it is."""
        return ONLY.format("training") if method.only == "training" else None

    @abstractmethod
    def ready(self, method: Method, model: nn.Module, base: Base) -> Run:
        """Return a run to be timed, after one run whose result was compared with the base.

        Raises:
            Disagreement: the results differ.
        """

    @abstractmethod
    def cost(self, forward: float, token: float) -> float:
        """Estimate the seconds of one run from the base's seconds per token of a forward and per decoded token."""


@dataclass(frozen=True)
class Step(Case):
    """A training step: forward and backward without an optimizer. For the bare base, the forward alone."""

    labelled: float = 1.0

    def absent(self, method: Method) -> str | None:
        """See `Case.absent`."""
        return ONLY.format("inference") if method.only == "inference" else None

    def ready(self, method: Method, model: nn.Module, base: Base) -> Run:
        """See `Case.ready`."""
        if not method.is_bare:
            batch = make_batch(base, self.rows, self.length, self.labelled)
            expected = base.reference(
                ("loss", self.rows, self.length, self.labelled),
                lambda bare: naive_loss(bare(**unlabelled(batch)).logits, batch["labels"]),
            )
            with torch.no_grad():
                loss = (method.task or method.loss)(model.train(), batch)
            check_close("task losses", loss, expected, LOSS_TOLERANCE[base.dtype])
        run = self.unchecked(method, model, base)
        run()
        return run

    def unchecked(self, method: Method, model: nn.Module, base: Base) -> Run:
        """Return the run without a comparison."""
        batch = make_batch(base, self.rows, self.length, self.labelled)
        return self._forward(model, unlabelled(batch)) if method.is_bare else self._step(method, model, batch)

    def _forward(self, model: nn.Module, batch: Batch) -> Run:
        @torch.no_grad()
        def run() -> Tensor:
            return model.eval()(**batch, use_cache=False).logits[0, -1]

        return run

    def _step(self, method: Method, model: nn.Module, batch: Batch) -> Run:
        def run() -> Tensor:
            loss = method.loss(model.train(), batch)
            loss.backward()
            model.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    def cost(self, forward: float, token: float) -> float:
        """See `Case.cost`."""
        return 2.6 * self.tokens * forward


@dataclass(frozen=True)
class Memory(Step):
    """The peak memory of a training step, in a separate process; see memory.py."""

    def absent(self, method: Method) -> str | None:
        """See `Case.absent`."""
        return "the bare base has no training step" if method.is_bare else super().absent(method)

    def cost(self, forward: float, token: float) -> float:
        """See `Case.cost`."""
        return 8 + super().cost(forward, token)


@dataclass(frozen=True)
class Prefill(Case):
    """One forward over a prompt that fills a cache, with the logits that the model's `generate` requests."""

    def ready(self, method: Method, model: nn.Module, base: Base) -> Run:
        """See `Case.ready`."""
        batch = unlabelled(make_batch(base, self.rows, self.length))
        # As in GenerationMixin: only the logits of the last token, if the forward has that argument.
        last = {"logits_to_keep": 1} if cast(Any, model)._supports_logits_to_keep() else {}

        @torch.no_grad()
        def run() -> Tensor:
            return model(**batch, **last, use_cache=True).logits[:, -1]

        model.eval()
        expected = base.reference(("prefill", self), lambda bare: bare(**batch, logits_to_keep=1).logits[:, -1])
        check_close("last logits", run(), expected, TOLERANCE[base.dtype])
        return run

    def cost(self, forward: float, token: float) -> float:
        """See `Case.cost`."""
        return self.tokens * forward


@dataclass(frozen=True)
class Decode(Case):
    """Greedy decoding of ``new`` tokens after a prompt, with a cache."""

    new: int = 32

    def options(self, method: Method, base: Base) -> dict[str, Any]:
        """Return further arguments of `generate`."""
        return {}

    def ready(self, method: Method, model: nn.Module, base: Base) -> Run:
        """See `Case.ready`."""
        run = self._generation(model, base, **self.options(method, base))
        key = ("tokens", self.rows, self.length, self.new)
        expected = base.reference(key, lambda bare: self._generation(bare, base)())
        self._check_tokens(run(), expected, base)
        return run

    def _generation(self, model: nn.Module, base: Base, **options: object) -> Run:
        batch = unlabelled(make_batch(base, self.rows, self.length))
        model.eval()

        @torch.no_grad()
        def run() -> Tensor:
            return cast(LanguageModel, model).generate(
                **batch, max_new_tokens=self.new, do_sample=False, use_cache=True, pad_token_id=0, **options
            )

        return run

    def _check_tokens(self, actual: Tensor, expected: Tensor, base: Base) -> None:
        """Raise `Disagreement` unless tokens are equal up to ties: the base must score the first different token as high."""
        if actual.shape != expected.shape:
            raise Disagreement(f"tokens have shape {tuple(actual.shape)}, the base's {tuple(expected.shape)}")
        for row, expected_row in zip(actual, expected, strict=True):
            differs = (row != expected_row).nonzero()
            if not len(differs):
                continue
            at = int(differs[0])
            logits = base.model(input_ids=expected_row[None, :at], logits_to_keep=1).logits[0, -1].float()
            gap = float((logits.max() - logits[row[at]]) / logits.abs().max())
            if gap > TOLERANCE[base.dtype]:
                place = f"token {at - self.length} of {self.new}"
                raise Disagreement(f"{place} is {int(row[at])}, the base's {int(expected_row[at])}")

    def cost(self, forward: float, token: float) -> float:
        """See `Case.cost`."""
        return self.tokens * forward + 1.7 * self.new * token


@dataclass(frozen=True)
class Compiled(Decode):
    """Greedy decoding with a static cache and a compiled forward; on CUDA with CUDA graphs. Compilation is not timed."""

    def absent(self, method: Method) -> str | None:
        """See `Case.absent`."""
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "torch.compile needs a C++ compiler (g++), which is not installed"
        return super().absent(method)

    def options(self, method: Method, base: Base) -> dict[str, Any]:
        """See `Decode.options`."""
        mode = cast(Any, "reduce-overhead" if base.device.type == "cuda" else None)
        config: Any = CompileConfig(mode=mode)
        private_transformers.compile_on_all_devices(config)
        return {"cache_implementation": "static", "compile_config": config}

    def ready(self, method: Method, model: nn.Module, base: Base) -> Run:
        """See `Case.ready`."""
        private_torch.limit_recompilations(64)  # every method compiles the code of the base again
        return super().ready(method, model, base)

    def cost(self, forward: float, token: float) -> float:
        """See `Case.cost`."""
        return 8 + super().cost(forward, token)  # compilation, spread over the rounds


@dataclass(frozen=True)
class Detached(Decode):
    """Greedy decoding with the detached shadow in the base's precision; other methods unchanged, for comparison."""

    def absent(self, method: Method) -> str | None:
        """See `Case.absent`."""
        return super().absent(method) if method.is_umbra or method.name in REFERENCES else ALONE

    def ready(self, method: Method, model: nn.Module, base: Base) -> Run:
        """See `Case.ready`."""
        if not method.is_umbra:
            return super().ready(method, model, base)
        shadow_model = cast(ShadowModel, model.eval())
        edge, batch = shadow_model.detached(), unlabelled(make_batch(base, 2, 16))
        with torch.no_grad(), shadow_model.shadow_only():
            expected = model(**batch).logits
        with torch.no_grad():
            check_close("the detached model's logits", edge(**batch).logits, expected, TOLERANCE[base.dtype])
        edge.generation_config.eos_token_id = None
        run = self._generation(nn.Module.to(edge, base.dtype), base)
        run()
        return run

    def cost(self, forward: float, token: float) -> float:
        """See `Case.cost`."""
        return 0.7 * super().cost(forward, token)


@dataclass(frozen=True)
class Drafted(Decode):
    """Speculative decoding with the shadow as draft model; other methods unchanged, for comparison."""

    def absent(self, method: Method) -> str | None:
        """See `Case.absent`."""
        if method.name in REFERENCES:
            return None
        return super().absent(method) if method.is_umbra else ALONE

    def options(self, method: Method, base: Base) -> dict[str, Any]:
        """See `Decode.options`."""
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
    Detached("decode-detached", "as decode, with Umbra's detached shadow", 1, 32, (*REFERENCES, "Umbra", "Umbra default")),
    Drafted("decode-drafted", f"as decode, Umbra with {DRAFT} draft tokens per verification", 1, 32, (*REFERENCES, "Umbra")),
    Compiled("decode-compiled", "as decode, static cache, compiled", 1, 32, (BASE, LORA, "Umbra", "Umbra upper third")),
    Memory("memory", "peak memory of a step, 8 × 256 tokens, all labelled", 8, 256),
    Memory("memory-masked", "peak memory of a step, 8 × 256 tokens, the last third labelled", 8, 256, labelled=1 / 3),
)  # fmt: skip
