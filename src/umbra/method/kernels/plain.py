"""Whether a fast form may read a module's weights instead of calling it."""

from torch import nn

from umbra.base import private_torch
from umbra.method.kernels.products import PatchedForward

PLAIN_KINDS: set[type] = {
    nn.Linear, nn.LayerNorm, nn.SiLU, nn.GELU, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleDict
}  # fmt: skip


def is_plain(module: nn.Module, known_hooks: type | tuple[type, ...] = (), kinds: set[type] = PLAIN_KINDS) -> bool:
    """Return whether a module does exactly what its class says.

    A parametrised or wrapped module (LoRA) has another class; weight norm and the like use hooks.

    Args:
        module: the module.
        known_hooks: classes of hooks for which the caller accounts.
        kinds: the classes that the caller knows.
    """
    if type(module) not in kinds or private_torch.has_global_hook():
        return False
    if not all(isinstance(hook, known_hooks) for hook in private_torch.hooks_of(module)):
        return False
    forward = vars(module).get("forward")
    return forward is None or isinstance(forward, PatchedForward)
