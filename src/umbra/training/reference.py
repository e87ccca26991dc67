"""The bare base as the reference model of a TRL trainer: no second copy of the base is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer

from umbra.errors import ConfigError
from umbra.model.shadow_model import ShadowModel


class ReferenceTrainer(Protocol):
    """A trainer that compares the model in training with a reference model, by a KL divergence of weight ``beta``."""

    model: ShadowModel
    ref_model: nn.Module | None
    beta: float


class BareBase(nn.Module):
    """The bare base of the model in training, without parameters of its own.

    The last output is kept: the second pass of a step needs it again.
    """

    def __init__(self, trainer: ReferenceTrainer):
        super().__init__()
        self.trainer = trainer
        self._input_ids: Tensor | None = None
        self._output: object = None

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model in training."""
        return self.trainer.model.config

    def forward(self, **inputs: Tensor) -> object:
        """Run the base with its shadow disabled."""
        if self._input_ids is not inputs["input_ids"]:
            with self.trainer.model.disable_adapter():
                self._input_ids, self._output = inputs["input_ids"], self.trainer.model(**inputs)
        return self._output


@contextmanager
def base_as_reference(trainer: Trainer, arguments: dict[str, object], takes_reference: bool) -> Iterator[None]:
    """While a TRL trainer is constructed, keep it from loading a reference model; afterwards, give it a `BareBase`.

    Args:
        trainer: the trainer under construction.
        arguments: arguments of its constructor, to which ``ref_model`` may be added.
        takes_reference: whether the constructor has a parameter ``ref_model``.

    Raises:
        ConfigError: the reference is to follow the model in training.
    """
    settings: dict[str, object] = {} if arguments.get("args") is None else vars(arguments["args"])
    if arguments.get("ref_model") is not None:
        yield
        return
    if settings.get("sync_ref_model"):
        raise ConfigError(
            "sync_ref_model=True: the reference model is the frozen base, which never changes. Set it to False."
        )
    referring = cast(ReferenceTrainer, trainer)
    reference, beta = BareBase(referring), 0.0 if takes_reference else cast(float, settings.get("beta", 0.0))
    if takes_reference and not settings.get("precompute_ref_log_probs"):
        arguments["ref_model"] = reference
    try:
        if beta:
            settings["beta"] = 0.0  # otherwise TRL loads a copy of the base
        yield
    finally:
        if beta:
            settings["beta"] = referring.beta = beta
    if takes_reference or beta:
        vars(reference).pop("forward", None)  # TRL has replaced it
        referring.ref_model = reference
