"""The losses of a language model and its shadow, at the labelled positions.

    loss = CE(attached, y) + λ · CE(shadow, y′) + μ · KL(attached ‖ shadow)

Each is a sum over labelled tokens divided by one number of items: the tokens with a label of either path. y′ is y, or the
shadow's own targets; distillation covers the tokens for which both are equal. The shadow's losses may read every k-th of its
tokens, from a random offset on, and weigh it k times: the same in expectation.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from umbra.base import architectures, quantized, sharded
from umbra.errors import BaseModelError, ConfigError
from umbra.method import kernels
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import Attachment, ForwardContext, is_plain_linear
from umbra.method.kernels import Head
from umbra.method.losses import at_least_one
from umbra.model.adapter_set import AdapterSet
from umbra.model.forward import Batch, ForwardRunner, Route, input_of
from umbra.model.head_kernels import ChunkedKernel, HeadKernel, LogitsKernel, Share
from umbra.model.labels import Labels
from umbra.model.training_guard import TrainingGuard


class Losses(NamedTuple):
    """Scalars, divided by the number of items and not multiplied by their weights; None if not computed."""

    task: Tensor
    shadow: Tensor | None = None
    distillation: Tensor | None = None

    def total(self, shadow_weight: float, distillation_weight: Tensor | float) -> Tensor:
        """Return task + λ · shadow + μ · distillation.

        Args:
            shadow_weight: λ.
            distillation_weight: μ.
        """
        total = self.task
        if self.shadow is not None:
            total = total + shadow_weight * self.shadow
        if self.distillation is not None:
            total = total + distillation_weight * self.distillation
        return total


class Sample(NamedTuple):
    """The labelled positions that the shadow's losses read, by their numbers (n,), and the weight of each."""

    indices: Tensor
    factor: int


class LanguageModelLosses:
    """Compute the losses of one model.

    Args:
        base: the base model.
        adapters: the losses are those of the active one.
        attachment: the hooks on the base.
        runner: runs the base.
        guard: knows λ.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapters: AdapterSet,
        attachment: Attachment,
        runner: ForwardRunner,
        guard: TrainingGuard,
    ):
        self.base, self.adapters, self.attachment, self.runner, self.guard = base, adapters, attachment, runner, guard

    # -- both paths ------------------------------------------------------------------------------------------------

    def run(
        self, batch: Batch, route: Route, labels: Labels, items: Tensor | int | None, skip_logits: bool, training: bool
    ) -> tuple[dict[str, Any], Losses]:
        """Run the base and compute the losses.

        Args:
            batch: the arguments of the forward.
            route: the active adapter.
            labels: where the losses are read.
            items: the number of labels in the whole accumulated batch; None for those of this batch.
            skip_logits: compute logits only at labelled positions, and return none.
            training: the mode of the model.

        Returns:
            The base's output by name, with ``logits`` (B, T, V) or None, and the losses.
        """
        counts = labels.counts(training) if items is None else (at_least_one(items), at_least_one(items))
        heads = self.fused_heads() if skip_logits else None
        if heads is not None:
            return self._run_chunked(batch, route, labels, counts, heads, training)
        return self._run_with_logits(batch, route, labels, counts, skip_logits, training)

    def _run_chunked(
        self, batch: Batch, route: Route, labels: Labels, counts: tuple[Tensor | int, Tensor | int],
        heads: tuple[Head, Head], training: bool,
    ) -> tuple[dict[str, Any], Losses]:  # fmt: skip
        """Compute the losses when the head would run, from the rows that it would read."""
        states: list[Tensor] = []
        losses: list[Losses] = []

        def use_state(s0: Tensor) -> None:
            # Flattened before the base runs: its place in the graph decides in which order gradients of s⁰ are summed.
            states.append(s0.reshape(-1, s0.shape[-1]))

        def consume(rows: Tensor) -> None:
            sample = self.sample(labels.shadow_positions, training) if states else None
            extra = None if sample is None else self._head_rows(states[0], labels.shadow_positions[sample.indices])
            kernel = ChunkedKernel(heads, rows, None if extra is None else extra.to(rows.device))
            losses.append(self._losses(kernel, labels, counts, sample, training))

        inputs = HeadInputs((), flatten=True, positions=labels.positions, consume=consume)
        out = self.runner.run(batch, route, inputs, use_state if self._reads_shadow(training) else None)
        self._check_head_ran(inputs)
        return out, losses[0]

    def _run_with_logits(
        self, batch: Batch, route: Route, labels: Labels, counts: tuple[Tensor | int, Tensor | int],
        skip_logits: bool, training: bool,
    ) -> tuple[dict[str, Any], Losses]:  # fmt: skip
        """Let the head read the shadow's rows after the base's, and compute the losses from its logits."""
        sample = self.sample(labels.shadow_positions, training)
        inputs = HeadInputs(
            [(rows, shadow.heads) for shadow, rows in route],
            flatten=True,
            positions=labels.positions if skip_logits else None,
        )

        def use_state(s0: Tensor) -> None:
            inputs.extra = self._head_rows(s0.reshape(-1, s0.shape[-1]), labels.shadow_positions[sample.indices])

        reads_shadow = self._reads_shadow(training)
        out = self.runner.run(batch, route, inputs, use_state if reads_shadow else None)
        self._check_head_ran(inputs)
        logits, shadow_logits = out["logits"][0, : inputs.num_rows], out["logits"][0, inputs.num_rows :]
        at_labels = logits if skip_logits else logits[labels.positions.to(logits.device)]
        out["logits"] = logits.view(*input_of(batch).shape[:2], -1) if not skip_logits else None
        kernel = LogitsKernel(at_labels, shadow_logits)
        return out, self._losses(kernel, labels, counts, sample if reads_shadow else None, training)

    def _losses(
        self,
        kernel: HeadKernel,
        labels: Labels,
        counts: tuple[Tensor | int, Tensor | int],
        sample: Sample | None,
        training: bool,
    ) -> Losses:
        """Return the losses over the rows that the head read; of the task alone if the shadow's are not sampled."""
        task = kernel.task(labels.targets, counts[0])
        if sample is None:
            return Losses(task)
        targets, share = labels.shadow_targets[sample.indices], Share(sample.factor, counts[1])
        if not self._distils(training):
            return Losses(task, kernel.shadow(targets, share))
        teachers = sample.indices if labels.same is None else labels.same[sample.indices]
        shadow, divergence = kernel.shadow_and_divergence(targets, teachers, labels.same is None, share)
        return Losses(task, shadow, share.factor * divergence / share.divisor)

    def sample(self, positions: Tensor, training: bool) -> Sample:
        """Sample the labelled positions (N,) that the shadow's losses read: all, or in training every k-th."""
        k, indices = (
            self.adapters.active.config.auxiliary_loss_every,
            torch.arange(len(positions), device=positions.device),
        )
        if k == 1 or not training:
            return Sample(indices, 1)
        return Sample(indices[(indices + torch.randint(k, (), device=indices.device)) % k == 0], k)

    def _head_rows(self, s0: Tensor, positions: Tensor) -> Tensor:
        """Return the rows (n, D) of s⁰ (B · T, D) at positions (n,), as the head reads them."""
        return architectures.head_input(self.base, s0[positions.to(s0.device)])

    def _distils(self, training: bool) -> bool:
        return training and self.attachment.only is None and self.adapters.active.config.distillation_weight > 0

    def _reads_shadow(self, training: bool) -> bool:
        return self.guard.shadow_weight() > 0 or self._distils(training)

    def _check_head_ran(self, inputs: HeadInputs) -> None:
        if inputs.num_rows is None:
            raise BaseModelError(
                f"{type(self.base).__name__} does not call its output embeddings as a module; its labelled positions cannot "
                "be chosen."
            )

    # -- the shadow alone ------------------------------------------------------------------------------------------

    def alone(self, s0: Tensor, labels: Labels, items: Tensor | int | None, training: bool) -> Tensor:
        """Return CE(shadow, y′) from s⁰ (B, T, D), without logits of unlabelled positions.

        Args:
            s0: the shadow's states.
            labels: where the loss is read.
            items: the number of labels in the whole accumulated batch; None for those of this batch.
            training: the mode of the model.
        """
        count = at_least_one(labels.shadow_targets.numel() if items is None else items)
        sample = self.sample(labels.shadow_positions, training)
        heads = self.fused_heads()
        rows = s0.flatten(0, 1)[labels.shadow_positions[sample.indices].to(s0.device)]
        targets, share = labels.shadow_targets[sample.indices], Share(sample.factor, count)
        if heads is None:
            return LogitsKernel(None, self.logits_alone(rows[None])).shadow(targets, share)
        states = architectures.head_input(self.base, rows).to(heads[1].weight.device)
        return ChunkedKernel(heads, None, states).shadow(targets, share)

    def logits_alone(self, s0: Tensor) -> Tensor:
        """Return the logits (B · T, V) of s⁰ (B, T, D).

        The head reads them within a forward of the base on one token, which also scales and caps them.
        """
        token = torch.zeros(1, 1, dtype=torch.long, device=s0.device)
        rows = architectures.head_input(self.base, s0.flatten(0, 1))
        heads = [(None, self.adapters.active.heads)]
        inputs = HeadInputs(heads, flatten=True, positions=token[0, :0], extra=rows)
        with ForwardContext(self.attachment, head=inputs):
            return self.base(input_ids=token, use_cache=False, return_dict=True).logits[0]

    # -- heads -----------------------------------------------------------------------------------------------------

    def fused_heads(self) -> tuple[Head, Head] | None:
        """Return the heads of both paths for the fast form of their losses; None if the plain form must run."""
        added = self.adapters.active.added_tokens  # the fast form would take their rows of the head for frozen
        return self.heads() if kernels.in_use() and not (added and added.is_trained) else None

    def heads(self) -> tuple[Head, Head] | None:
        """Return the heads of the attached path and of the shadow; None if a head is more than a plain linear layer."""
        self.attachment.refresh_hooks()
        copies = self.adapters.active.heads
        modules = list(copies.values()) if copies else [self.attachment.task_head] * 2
        if not all(_is_readable(module) for module in modules):
            return None
        factor, cap = architectures.after_head(self.base.config)
        attached, shadow = (Head(m.weight, m.bias, factor, cap) for m in cast(list[nn.Linear], modules))
        if self.attachment.head_is_linear is None:
            self.attachment.head_is_linear = self._agrees(shadow)
        return (attached, shadow) if self.attachment.head_is_linear else None

    @torch.no_grad()
    def _agrees(self, head: Head) -> bool:
        """Return whether the base computes the same logits as ``head``: some bases mask or shift theirs."""
        weight = head.weight
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(1, 1, architectures.locate(self.base).config.hidden_size, generator=generator).to(
            weight.device, weight.dtype
        )
        expected = self.logits_alone(state).double()
        logits = head.logits(architectures.head_input(self.base, state[0])).double()
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
        return bool((logits - expected).norm() <= tolerance * expected.norm())

    def router_loss(self, out: dict[str, Any]) -> Tensor | float:
        """Return the weighted load-balancing loss of a base with routers, as in the base's own loss; or 0.

        Args:
            out: the base's output by name.

        Raises:
            ConfigError: the base does not define the weight.
        """
        loss = out.get("aux_loss")
        if loss is None:
            return 0.0
        weight = architectures.router_loss_weight(self.base)
        if weight is None:
            raise ConfigError(
                f"output_router_logits: {type(self.base).__name__} does not define the weight of its routers' loss. Leave it "
                "out."
            )
        return weight * loss


def _is_readable(head: nn.Module) -> bool:
    if not is_plain_linear(head):
        return False
    weight = cast(nn.Linear, head).weight
    return quantized.is_plain(weight) and sharded.is_whole(weight)
