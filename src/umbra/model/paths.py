"""One path of a `ShadowModel` alone, for trainers that compute a loss by themselves (see trainers.py).

attached    logits = head(base blocks, corrected by the shadow)
shadow      logits = head(s⁰), those of the detached model
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from umbra.base import architectures
from umbra.errors import ConfigError, StateError
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import ForwardContext
from umbra.model.forward import Forward

NOTHING_TO_TRAIN = (
    "The model is in training, but no parameter of its shadow requires a gradient. Load the adapter by "
    "umbra.load(…, trainable=True), or call requires_grad_(True) on the parts of model.shadow to train; call eval() otherwise."
)


class Paths(Forward):
    """The contexts that choose a path, and what λ is within them."""

    _has_warned = False  # of training with nothing to train

    @property
    def _is_disabled(self) -> bool:
        frame = self._attachment.current()
        return frame is not None and frame.disabled

    def disable_adapter(self) -> ForwardContext:
        """A context in which this thread runs the bare base: ``with model.disable_adapter(): model(...)``."""
        return ForwardContext(self._attachment, disabled=True)

    def attached_only(self) -> ForwardContext:
        """A context in which losses are the task's alone: for a trainer that adds the shadow's by itself."""
        return ForwardContext(self._attachment, only="attached")

    def shadow_only(self) -> ForwardContext:
        """A context in which logits and losses are the shadow's own, as after detaching; nothing is cached."""
        return ForwardContext(self._attachment, only="shadow")

    @property
    def _only(self) -> str | None:
        frame = self._attachment.current()
        return None if frame is None else frame.only

    @property
    def _weight(self) -> float:
        """λ, or 0 where somebody else sees to the shadow's loss."""
        return 0.0 if self._only == "attached" else self.shadow.config.auxiliary_loss_weight

    def _untrained(self) -> str | None:
        """What to tell a caller whose loss, computed outside the model, leaves the shadow's own out; None if it may."""
        if not self.training or not torch.is_grad_enabled() or self._attachment.current() or self._weight == 0:
            return None
        return (
            f"this loss is computed outside the model and leaves the shadow's own (auxiliary_loss_weight={self._weight}) "
            "out. Pass labels and use the loss returned, train with umbra.with_shadow_loss(<your Trainer>), or set "
            "auxiliary_loss_weight=0."
        )

    def _to_train(self: Any, x: Tensor | None, embeds: Tensor | None) -> Tensor | None:
        """A loss or what one is computed from; where training could change nothing, one whose backward says so.

        Args:
            embeds: the input, which may want a gradient itself. That the result has a graph tells nothing: activation
                checkpointing begins one at the input.
        """
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if x is None or not trains or self._only is not None or not x.is_floating_point():
            return x
        learns = any(p.requires_grad for part in (self.shadow, self.base) for p in part.parameters())
        if learns or (embeds is not None and embeds.requires_grad):
            return x
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(NOTHING_TO_TRAIN, stacklevel=4)
        return _Untrainable.apply(x, torch.zeros((), device=x.device, requires_grad=True))  # type: ignore[return-value]

    def _warn_if_untrained(self) -> None:
        problem = None if torch.compiler.is_compiling() else self._untrained()
        if problem:
            warnings.warn(f"Called without labels in training: {problem}", stacklevel=3)

    def _state_alone(self: Any, batch: dict[str, Any]) -> Tensor:
        """s⁰ where nothing else runs."""
        if batch["past_key_values"] is not None:
            raise StateError(
                "Within shadow_only() nothing is cached; to generate with the shadow alone use detached()."
            )
        if self._merges_embeddings:
            raise StateError(
                "Within shadow_only() nobody merges images into the embeddings: use labels and the model's own loss."
            )
        return self._initial_state(self._seen_by(self.shadow, {**batch, "use_cache": False}, {}))


class _Untrainable(torch.autograd.Function):
    """The identity, with a backward that raises where autograd would complain about a tensor without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()  # trainers scale a loss in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        raise ConfigError(NOTHING_TO_TRAIN)


class CausalPaths(Paths):
    """What a language model shows to trainers that read its hidden states, such as TRL's."""

    @property
    def base_model(self) -> Any:
        """The decoder without its head, to be called as a model of transformers is."""
        return self._hidden_states

    def _hidden_states(self: Any, input_ids: Tensor | None = None, **batch: Any) -> Any:
        """A model output whose ``last_hidden_state`` is (B, T, D) before the head, in the head's dtype.

        Raises:
            StateError: in training, where nobody sees to the shadow's loss.
        """
        batch = {"inputs_embeds": None, "past_key_values": None, "use_cache": None, **self._further_arguments(batch)}
        batch["input_ids"] = input_ids
        dtype = self.get_output_embeddings().weight.dtype
        added = self.shadow.added_tokens
        if self.training and torch.is_grad_enabled() and added is not None and added.is_trained:
            raise StateError(
                "Hidden states do not train the rows that added tokens have in the head: use the model's logits or its own "
                "loss, or freeze the rows (model.shadow.added_tokens.requires_grad_(False))."
            )
        if self._only == "shadow":
            states = architectures.head_input(self.base, self._state_alone(batch))
            return MoeModelOutputWithPast(last_hidden_state=states.to(dtype))  # type: ignore[arg-type]
        if problem := self._untrained():
            raise StateError(f"Hidden states were asked for in training: {problem}")
        self._settle_use_cache(batch)
        route = [] if self._is_disabled else [(self.shadow, None)]
        if route:
            self._prepare_cache(batch, route)
        with self._undivided(batch), self._frame(batch, route):
            out = self._call_base(batch, self.base.base_model, return_dict=True)
        out.last_hidden_state = self._to_train(out.last_hidden_state.to(dtype), batch["inputs_embeds"])
        return out

    def get_output_embeddings(self: Any) -> nn.Module | None:
        """The head of the path that runs: a trained copy where there is one."""
        if self.shadow.heads and not self._is_disabled:
            return self.shadow.heads["shadow" if self._only == "shadow" else "attached"]
        return self.base.get_output_embeddings()

    def _logits_alone(self: Any, s0: Tensor) -> Tensor:
        """(B · T, V) from s⁰, by the head within a forward of the base on one token, which scales and caps them too."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=s0.device)
        rows = architectures.head_input(self.base, s0.flatten(0, 1))
        plan = HeadInputs([(None, self.shadow.heads)], flatten=True, positions=nothing[0, :0], extra=rows)
        with ForwardContext(self._attachment, head=plan):
            return self.base(input_ids=nothing, use_cache=False, return_dict=True).logits[0]
