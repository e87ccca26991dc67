"""The losses of a language model and its shadow, where there are labels.

    loss = CE(attached, y) + λ · CE(shadow, y′) + μ · KL(attached ‖ shadow)

All are sums over labelled tokens divided by the same number of items: those with a label of either. y′ is y, or what the
shadow is to say instead; they are distilled where both are the same. The shadow's two may read every k-th of these
tokens, from a random one on, and weigh it k times: the same in expectation.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.base import architectures, quantized, sharded
from umbra.errors import BaseModelError, ConfigError
from umbra.method import kernels
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import is_plain_linear
from umbra.method.kernels import Head, linear_loss
from umbra.method.losses import at_least_one, labelled_positions, token_loss
from umbra.model.forward import Route
from umbra.model.paths import CausalPaths


class Losses(NamedTuple):
    """Scalars, each divided by the number of items and not multiplied by its weight; None where it is not computed."""

    task: Tensor
    shadow: Tensor | None = None
    distillation: Tensor | None = None


class Labels(NamedTuple):
    """Which flat positions of (B, T) each loss reads: those of the attached path and of the shadow, what should follow
    there, and which of the former the latter are, where they are distilled.

    Args:
        positions: (N,), with targets (N,).
        own: (M,), with own_targets (M,).
        same: (M,) of N, -1 where the shadow is to say something else; None where it never is.
    """

    positions: Tensor
    targets: Tensor
    own: Tensor
    own_targets: Tensor
    same: Tensor | None = None

    @classmethod
    def of(cls, labels: Tensor, shadow_targets: Tensor | None, shift_labels: Tensor | None = None) -> "Labels":
        """Of labels (B, T), or of these shifted already, and the shadow's (B, T) where they are others.

        Raises:
            ConfigError: shadow_targets of another shape.
        """
        positions, targets = labelled_positions(labels, shift_labels)
        if shadow_targets is None:
            return cls(positions, targets, positions, targets)
        if shadow_targets.shape != labels.shape:
            raise ConfigError(
                f"shadow_targets must be of the labels' shape {tuple(labels.shape)}, got {tuple(shadow_targets.shape)}."
            )
        own, own_targets = labelled_positions(shadow_targets)
        place = torch.full((labels.numel(),), -1, device=positions.device)
        place[positions] = torch.arange(len(positions), device=positions.device)
        same = place[own].where(labels.flatten()[own + 1] == own_targets, -1)
        return cls(positions, targets, own, own_targets, same)

    def items(self, training: bool) -> tuple[int, int]:
        """What the task's and the shadow's sums are divided by where nobody else says so."""
        if training and self.same is not None:
            either = max(torch.cat([self.positions, self.own]).unique().numel(), 1)
            return either, either
        return max(self.positions.numel(), 1), max(self.own.numel(), 1)


class Labelled(CausalPaths):
    """Forwards with labels."""

    def _run_labelled(
        self: Any, batch: dict[str, Any], route: Route, labels: Labels, items: Any, skip_logits: bool
    ) -> tuple[dict[str, Any], Losses]:
        """The base's output by name, without ``logits`` (B, T, V) if they are skipped, and the losses."""
        fused = self._fused_heads() if skip_logits else None
        run = self._run_plain if fused is None else self._run_fused
        return run(batch, route, labels, items, skip_logits if fused is None else fused)

    def _run_fused(
        self: Any, batch: dict[str, Any], route: Route, labels: Labels, items: Any, heads: tuple[Head, Head]
    ) -> tuple[dict[str, Any], Losses]:
        positions, targets, own, own_targets, same = labels
        count, own_count = labels.items(self.training) if items is None else [at_least_one(items)] * 2
        found: dict[str, Tensor] = {}

        def use_state(s0: Tensor) -> None:
            found["s0"] = s0.reshape(-1, s0.shape[-1])

        def use_rows(rows: Tensor) -> None:
            attached, shadow = heads
            on = targets.to(rows.device)
            found["task"] = linear_loss(rows, attached, on)[0] / count
            if "s0" not in found:
                return
            chosen, factor = self._every(own)
            states = architectures.head_input(self.base, found["s0"][own[chosen].to(found["s0"].device)]).to(
                rows.device
            )
            to_say = own_targets[chosen].to(rows.device)
            if not self._distils:
                found["shadow"] = factor * linear_loss(states, shadow, to_say)[0] / own_count
                return
            apart = 0.0
            if same is not None:
                alike = same[chosen].to(rows.device)
                apart = linear_loss(states[alike < 0], shadow, to_say[alike < 0])[0]
                states, to_say, chosen = states[alike >= 0], to_say[alike >= 0], alike[alike >= 0]
            ce, kl = linear_loss(states, shadow, to_say, (rows.detach()[chosen.to(rows.device)], attached))
            found["shadow"], found["distillation"] = factor * (ce + apart) / own_count, factor * kl / own_count

        plan = HeadInputs((), flatten=True, positions=positions, consume=use_rows)
        out = self._run_base(batch, route, plan, use_state if self._reads_s0 else None)
        _check_read(plan, self.base)
        return out, Losses(found["task"], found.get("shadow"), found.get("distillation"))

    def _run_plain(
        self: Any, batch: dict[str, Any], route: Route, labels: Labels, items: Any, skip_logits: bool
    ) -> tuple[dict[str, Any], Losses]:
        positions, targets, own, own_targets, same = labels
        chosen, factor = self._every(own)
        plan = HeadInputs(
            [(rows, shadow.heads) for shadow, rows in route], flatten=True, positions=positions if skip_logits else None
        )

        def use_state(s0: Tensor) -> None:
            rows = s0.reshape(-1, s0.shape[-1])[own[chosen].to(s0.device)]
            plan.extra = architectures.head_input(self.base, rows)

        out = self._run_base(batch, route, plan, use_state if self._reads_s0 else None)
        _check_read(plan, self.base)
        logits, shadow = out["logits"][0, : plan.num_rows], out["logits"][0, plan.num_rows :]
        at_labels = logits if skip_logits else logits[positions.to(logits.device)]
        shape = (batch["input_ids"] if batch["inputs_embeds"] is None else batch["inputs_embeds"]).shape[:2]
        out["logits"] = logits.view(*shape, -1) if not skip_logits else None
        count, own_count = labels.items(self.training) if items is None else [at_least_one(items)] * 2
        task = token_loss(at_labels, targets, count)
        if not self._reads_s0:
            return out, Losses(task)
        loss = factor * token_loss(shadow, own_targets[chosen], own_count)
        if not self._distils:
            return out, Losses(task, loss)
        wide = torch.promote_types(shadow.dtype, torch.float32)
        if same is not None:
            alike = same[chosen]
            shadow, chosen = shadow[(alike >= 0).to(shadow.device)], alike[alike >= 0]
        teacher = F.log_softmax(at_labels.detach()[chosen.to(at_labels.device)], -1, dtype=wide)
        kl = F.kl_div(F.log_softmax(shadow, -1, dtype=wide), teacher, log_target=True, reduction="sum")
        return out, Losses(task, loss, factor * kl / own_count)

    def _router_loss(self: Any, out: dict[str, Any]) -> Tensor | float:
        """The load-balancing loss of a base with routers, with its weight, as it is in the base's own loss; or 0.

        Raises:
            ConfigError: a base that does not say how it weighs it.
        """
        loss = out.get("aux_loss")
        if loss is None:
            return 0.0
        weight = architectures.router_loss_weight(self.base)
        if weight is None:
            raise ConfigError(
                f"output_router_logits: {type(self.base).__name__} does not say how it weighs its routers' loss. Leave it out."
            )
        return weight * loss

    @property
    def _distils(self: Any) -> bool:
        return self.training and self._only is None and self.shadow.config.distillation_weight > 0

    def _loss_alone(self: Any, s0: Tensor, labels: Labels, items: Any) -> Tensor:
        """CE(shadow, y) from s⁰ (B, T, D), without logits."""
        positions, targets = labels.own, labels.own_targets
        count = at_least_one(targets.numel() if items is None else items)
        chosen, factor = self._every(positions)
        heads, rows, targets = self._fused_heads(), s0.flatten(0, 1)[positions[chosen].to(s0.device)], targets[chosen]
        if heads is None:
            return factor * token_loss(self._logits_alone(rows[None]), targets, count)
        weight = heads[1].weight
        states = architectures.head_input(self.base, rows).to(weight.device)
        return factor * linear_loss(states, heads[1], targets.to(weight.device))[0] / count

    @property
    def _reads_s0(self: Any) -> bool:
        return self._weight > 0 or self._distils

    def _every(self: Any, positions: Tensor) -> tuple[Tensor, int]:
        """Which (n,) of the labelled positions the shadow's losses read, and what each then counts for."""
        k, indices = self.shadow.config.auxiliary_loss_every, torch.arange(len(positions), device=positions.device)
        if k == 1 or not self.training:
            return indices, 1
        return indices[(indices + torch.randint(k, (), device=indices.device)) % k == 0], k

    def _fused_heads(self: Any) -> tuple[Head, Head] | None:
        """The heads of the two paths for the fast form of their losses; None where the plain one is to run."""
        added = self.shadow.added_tokens  # whose rows of the head the fast form takes for frozen
        return self._heads() if kernels.in_use() and not (added and added.is_trained) else None

    def _heads(self: Any) -> tuple[Head, Head] | None:
        """The heads of the two paths, if a product with their weights is all there is to them."""
        self._attachment.settle()
        modules = self.shadow.heads.values() if self.shadow.heads else [self.base_head] * 2
        if not all(is_plain_linear(m) and quantized.is_plain(m.weight) and sharded.is_whole(m.weight) for m in modules):
            return None
        factor, cap = architectures.after_head(self.base.config)
        attached, shadow = (Head(m.weight, m.bias, factor, cap) for m in modules)
        if self._attachment.head_is_linear is None:
            self._attachment.head_is_linear = self._agrees(shadow)
        return (attached, shadow) if self._attachment.head_is_linear else None

    @torch.no_grad()
    def _agrees(self: Any, head: Head) -> bool:
        """Whether the base gives the same logits for a state as ``head``: some mask or shift them in ways of their own."""
        weight = head.weight
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(1, 1, architectures.locate(self.base).config.hidden_size, generator=generator).to(
            weight.device, weight.dtype
        )
        expected = self._logits_alone(state).double()
        found = head.logits(architectures.head_input(self.base, state[0])).double()
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
        return bool((found - expected).norm() <= tolerance * expected.norm())


def _check_read(plan: HeadInputs, base: Any) -> None:
    if plan.num_rows is None:
        raise BaseModelError(
            f"{type(base).__name__} does not call its output embeddings as a module; its labelled positions cannot be "
            "chosen."
        )
