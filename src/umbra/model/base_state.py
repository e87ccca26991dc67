"""What `attach` changes on a base besides its hooks, so that `ShadowModel.unload` can undo it."""

from torch import nn
from transformers import PreTrainedModel

from umbra.base import architectures, quantized
from umbra.method import kernels


class BaseState:
    """Record how a base was set up, and restore it.

    Args:
        base: the base model, before its weights are frozen.
        repacking: the layers that `quantized.keep_unpacked` returned.
    """

    def __init__(self, base: PreTrainedModel, repacking: list[nn.Module]):
        self.base, self.repacking = base, repacking
        self.was_checkpointing = base.is_activation_checkpointing
        self.modes = architectures.modes(base)
        self.trainable_names = [name for name, p in base.named_parameters() if p.requires_grad]

    def restore(self) -> None:
        """Undo all changes."""
        kernels.unpatch_linears(self.base.modules())
        if not self.was_checkpointing:
            self.base.activation_checkpointing_disable()
        architectures.restore_modes(self.base, self.modes)
        for name in self.trainable_names:
            self.base.get_parameter(name).requires_grad_(True)
        quantized.allow_repacking(self.repacking)
