"""Whether a fast form may read a module's weights in place of calling it."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from umbra.method.kernels.products import Quick

PLAIN = {nn.Linear, nn.LayerNorm, nn.SiLU, nn.GELU, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleDict}


def is_plain(module: nn.Module, ours: type | tuple[type, ...] = (), kinds: set[type] = PLAIN) -> bool:
    """Whether a module does what its class says and nothing else.

    A parametrised module has another class, a wrapped one too (LoRA); other weights come from hooks (weight norm).

    Args:
        ours: classes of hooks that the caller takes into account.
        kinds: the classes that the caller knows.
    """
    if type(module) not in kinds or _has_any_global_hook():
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        tables = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
        if not all(isinstance(hook, ours) for table in tables for hook in table.values()):
            return False
    forward = vars(module).get("forward")
    return forward is None or isinstance(forward, Quick)
