"""The stages of pretraining: their losses, the trainer that learns them, and what is measured after each.

    alignment      ‖P · x − h‖² / D + KL(base ‖ shadow) at every token, of the projection P only
    distillation   τ² · D(base, shadow) at every token, see umbra.method.divergences
    next_token     CE(shadow, y) at every token

x are the states of the shadow's backbone, h the base's. A stage is one of these losses or their sum, which counts the divergence of
the first two once. With another divergence, temperature or teacher_top_k than the default, that D replaces alignment's KL.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from umbra.method.divergences import Teacher, linear_divergence, teacher_log_probs
from umbra.method.kernels import Head, linear_loss
from umbra.method.losses import labelled_positions
from umbra.model.causal_lm import ShadowForCausalLM
from umbra.options import PretrainOptions, is_main_process
from umbra.training.teacher_cache import TeacherCache
from umbra.training.trainers import Inputs, Loss, ShadowTrainer

LOSSES = ("alignment", "distillation", "next_token")
ROWS = 256  # of logits at once


@dataclass(frozen=True)
class StageLoss:
    """The sum of a stage's losses.

    Args:
        names: any of `LOSSES`.
        options: divergence, temperature and teacher_top_k.
        cache: the teacher of the training blocks, if it is cached.
    """

    names: tuple[str, ...]
    options: PretrainOptions
    cache: TeacherCache | None = None

    @property
    def needs_base(self) -> bool:
        """Whether the base must run in each step."""
        return set(self.names) != {"next_token"} and self.cache is None

    def __call__(
        self,
        rows: Tensor,
        targets: Tensor,
        base_rows: Tensor | None,
        places: tuple[Tensor, Tensor],
        heads: tuple[Head, Head],
    ) -> Tensor:
        """Return the loss (), summed over N tokens.

        Args:
            rows: (N, D) inputs of the shadow's head.
            targets: (N,) the next tokens.
            base_rows: (N, D) inputs of the base's head; None unless `needs_base`.
            places: (N,) block and (N,) position of each token, by which the cache is read.
            heads: the heads of the attached model and of the shadow.
        """
        options, (attached, shadow) = self.options, heads
        total = rows.new_zeros((), dtype=torch.float32)
        if "alignment" in self.names and base_rows is not None:
            total = total + F.mse_loss(rows.float(), base_rows.float(), reduction="sum") / rows.shape[-1]
        is_plain_kl = (options.divergence, options.temperature, options.teacher_top_k) == ("forward", 1.0, None)
        if is_plain_kl or "next_token" in self.names:
            teacher = (base_rows, attached) if base_rows is not None and is_plain_kl else None
            ce, kl = linear_loss(rows, shadow, targets, teacher)
            total = total + kl + (ce if "next_token" in self.names else 0)
        if set(self.names) != {"next_token"} and not is_plain_kl:

            def teacher_of(part: slice) -> Teacher:
                if base_rows is None:
                    assert self.cache is not None
                    return self.cache.read(places[0][part], places[1][part], rows.device)
                return teacher_log_probs(attached.logits(base_rows[part]), options.temperature, options.teacher_top_k)

            total = total + linear_divergence(rows, shadow, teacher_of, options.divergence, options.temperature)
        return total


class Pretrainer(ShadowTrainer):
    """Trains the shadow alone, by the loss of a stage."""

    stage_loss: StageLoss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Loss:
        """Return the stage's loss () over the tokens of blocks (B, T), divided by their number."""
        with self.accelerator.autocast():  # accelerate enters it only around the model's own forward
            loss = self._mean_loss(cast(ShadowForCausalLM, self.model), dict(inputs), num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _mean_loss(self, model: ShadowForCausalLM, inputs: Inputs, num_items: Tensor | int | None) -> Tensor:
        blocks, (positions, targets) = inputs.pop("block"), labelled_positions(inputs.pop("labels"))
        chosen, factor = model.losses.sample(positions, model.training)
        heads, flat = linear_heads(model), positions[chosen]
        rows = shadow_states(model, inputs)[flat]
        base_rows = base_states(model, inputs)[flat] if self.stage_loss.needs_base else None
        length = inputs["input_ids"].shape[1]
        places = (blocks[flat // length], flat % length)
        loss = factor * self.stage_loss(rows, targets[chosen], base_rows, places, heads)
        return loss / (len(targets) if num_items is None else num_items)


def is_trained(name: str, losses: tuple[str, ...]) -> bool:
    """Return whether a stage with these losses trains the shadow's parameter ``name``."""
    if losses == ("alignment",):
        return name.startswith("projection.")
    return not name.startswith(("couplings.", "heads."))


def linear_heads(model: ShadowForCausalLM) -> tuple[Head, Head]:
    """Return the heads of the attached model and of the shadow; `pretrain` refuses a model without linear heads."""
    heads = model.losses.heads()
    assert heads is not None
    return heads


def shadow_states(model: ShadowForCausalLM, inputs: Inputs) -> Tensor:
    """Return the inputs (B · T, D) of the head when the shadow runs alone."""
    with model.shadow_only():
        return model.base_model(**inputs).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def base_states(model: ShadowForCausalLM, inputs: Inputs) -> Tensor:
    """Return the inputs (B · T, D) of the head when the bare base runs, without dropout."""
    was_training = model.base.training
    model.base.eval()
    try:
        with model.disable_adapter():
            return model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    finally:
        model.base.train(was_training)


@torch.no_grad()
def base_teacher(model: ShadowForCausalLM, ids: Tensor, options: PretrainOptions) -> Teacher:
    """Return the bare base's next-token distributions after each token of ids (B, T) that has a successor."""
    ids = ids.to(model.device)
    positions, _ = labelled_positions(ids)
    rows = base_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[positions]
    head, _ = linear_heads(model)
    parts = [
        teacher_log_probs(head.logits(part), options.temperature, options.teacher_top_k) for part in rows.split(ROWS)
    ]
    return Teacher(*(torch.cat(values) for values in zip(*parts, strict=True)))


@torch.no_grad()
def measure(model: ShadowForCausalLM, blocks: np.ndarray, batch_size: int) -> dict[str, float]:
    """Return cross_entropy and divergence KL(base ‖ shadow), in nats/token, and agreement, on blocks (N, T)."""
    was_training = model.training
    model.eval()
    attached, shadow = linear_heads(model)
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    is_quiet = None if is_main_process() else True
    for start in tqdm(range(0, len(blocks), batch_size), desc="measure", leave=False, disable=is_quiet):
        ids = torch.as_tensor(blocks[start : start + batch_size], dtype=torch.long, device=model.device)
        positions, targets = labelled_positions(ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows, base_rows = (states(model, inputs)[positions] for states in (shadow_states, base_states))
        ce, kl = linear_loss(rows, shadow, targets, (base_rows, attached))
        same = sum(
            int((shadow.logits(a).argmax(-1) == attached.logits(b).argmax(-1)).sum())
            for a, b in zip(rows.split(ROWS), base_rows.split(ROWS), strict=True)
        )
        sums += torch.tensor([float(ce), float(kl), same], dtype=torch.float64)
        count += len(targets)
    model.train(was_training)
    return dict(zip(("cross_entropy", "divergence", "agreement"), (sums / count).tolist(), strict=True))
