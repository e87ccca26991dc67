"""Narrower copies of a base's blocks: the directions, heads and neurons that weigh most.

    states    x′ = Qᵀ · x              Q (D, Ds): the leading eigenvectors of Eᵀ · E, E the embeddings (V, D)
    reading   W′ = c · W · diag(g) · Q   g: the weight of the norm before, c = √(share of E's energy in Q · D / Ds), since
    writing   W′ = Qᵀ · W                    the norm of fewer directions is another

Heads are kept in groups that share keys and values, by ‖W_v‖; of a group, and of the neurons, those with the largest weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from umbra.base import quantized
from umbra.base.architectures.parts import Anatomy, embedding_rows
from umbra.errors import ConfigError

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
NORMS = ("input_layernorm", "post_attention_layernorm")
READING = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITING = ("self_attn.o_proj", "mlp.down_proj")
# All parameters of a block in Llama's form, and those that it may have as well. A norm with a bias is none of these.
NEEDED = {f"{name}.weight" for name in (*NORMS, *READING, *WRITING)}
ALLOWED = {f"{name}.bias" for name in (*READING, *WRITING)} | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
ROWS = 2**14  # of a table at once


def is_narrower(config: PretrainedConfig, base: PretrainedConfig) -> bool:
    """Whether a shadow of the base's architecture has other sizes than its blocks."""
    if config.model_type != base.model_type:
        return False
    first = base.per_layer_config[0]  # as `mirror_config` takes them
    return any(getattr(config, n, None) != getattr(first, n, None) for n in (*SIZES, "head_dim"))


class Narrowed(NamedTuple):
    """What brings embeddings (Ds, D) into, and states (D, Ds) out of the narrower stream; None where it is as wide."""

    embed_projection: Tensor | None
    projection: Tensor | None


@torch.no_grad()
def prune_blocks(source: Anatomy, backbone: PreTrainedModel, layers: tuple[int, ...]) -> Narrowed:
    """Start a narrower shadow from these blocks of the base.

    Raises:
        ConfigError: blocks of another form than Llama's, or sizes that no part of the base has.
    """
    mine: Any = backbone
    config, base = backbone.config, source.config
    _check(source, backbone)
    width, share = config.hidden_size, 1.0
    turn = torch.eye(base.hidden_size)
    if width < base.hidden_size:
        turn, share = _directions(embedding_rows(source.embeddings), width)
    scale = (share * base.hidden_size / width) ** 0.5
    for block, l in zip(mine.layers, layers, strict=True):
        _prune(source.blocks[l], block, turn, scale, source, config)
    final = source.decoder.get_submodule("norm")
    if width == base.hidden_size:
        mine.norm.load_state_dict(final.state_dict())
        return Narrowed(None, None)
    _level(mine.norm)
    return Narrowed(turn.T, scale * _gain(final)[:, None] * turn)


def _check(source: Anatomy, backbone: PreTrainedModel) -> None:
    config, base = backbone.config, source.config
    blocks: Any = backbone
    found = {name for name, _ in blocks.layers[0].named_parameters()} if hasattr(backbone, "layers") else set()
    if type(backbone) is not type(source.decoder) or not NEEDED <= found <= NEEDED | ALLOWED:
        raise ConfigError(
            f"init='base' copies blocks of a {base.model_type} into a shadow of their own sizes; only blocks of Llama's form "
            "can be made narrower. Leave the shadow's sizes alone."
        )
    for name in SIZES:
        if getattr(config, name) > getattr(base, name):
            raise ConfigError(
                f"init='base' copies parts of the base: shadow_{name}={getattr(config, name)} is more than its "
                f"{getattr(base, name)}."
            )
    groups = [c.num_attention_heads // c.num_key_value_heads for c in (config, base)]
    if _head_dim(config) != _head_dim(base) or groups[0] > groups[1]:
        raise ConfigError(
            f"init='base' copies whole heads: shadow_head_dim must be {_head_dim(base)}, and at most {groups[1]} heads may share "
            f"keys and values, got {_head_dim(config)} and {groups[0]}."
        )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gain(norm: Any) -> Tensor:
    """What a norm multiplies by: its weight, or 1 + weight."""
    return norm(torch.ones(norm.weight.shape, dtype=norm.weight.dtype, device=norm.weight.device)).float().cpu()


def _level(norm: Any) -> None:
    """Make a norm multiply by 1."""
    norm.weight.fill_(1.0)
    if (_gain(norm) - 1).abs().max() > 1e-2:
        norm.weight.zero_()


def _directions(table: Tensor, width: int) -> tuple[Tensor, float]:
    """Q (D, Ds), and the share of the energy of a table (V, D) that lies in it."""
    gram = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for rows in table.split(ROWS):
        gram += (rows.float().T @ rows.float()).cpu()
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, -width:].flip(-1).float(), float(values[-width:].sum() / values.sum())


def _prune(block: Any, mine: Any, turn: Tensor, scale: float, source: Anatomy, config: Any) -> None:
    dtype, attention, mlp = source.model.dtype, block.self_attn, block.mlp

    def weight(module: Any) -> Tensor:
        return quantized.linear_weight(module, dtype).float().cpu()

    groups, heads = _kept_heads(weight(attention.v_proj), weight(attention.o_proj), source.config, config)
    inner = [weight(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    sizes = inner[0].norm(dim=1) * inner[1].norm(dim=1) * inner[2].norm(dim=0)
    neurons = sizes.topk(config.intermediate_size).indices.sort().values
    gains = []
    for name in NORMS:
        old, new = block.get_submodule(name), mine.get_submodule(name)
        if turn.shape[0] == turn.shape[1]:
            new.load_state_dict(old.state_dict())
            gains.append(torch.ones(len(turn)))
        else:
            _level(new)
            gains.append(scale * _gain(old))
    own = mine.self_attn
    for name, rows in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
        _read(getattr(own, name), getattr(attention, name), weight, rows, gains[0], turn)
    _write(own.o_proj, attention.o_proj, weight, heads, turn)
    for name in ("gate_proj", "up_proj"):
        _read(getattr(mine.mlp, name), getattr(mlp, name), weight, neurons, gains[1], turn)
    _write(mine.mlp.down_proj, mlp.down_proj, weight, neurons, turn)
    for name in ("q_norm", "k_norm"):
        if hasattr(own, name) and getattr(own, name).weight.shape == getattr(attention, name).weight.shape:
            getattr(own, name).load_state_dict(getattr(attention, name).state_dict())


def _kept_heads(v: Tensor, o: Tensor, base: Any, config: Any) -> tuple[Tensor, Tensor]:
    """Rows of k and v, and of q: of the kept groups, and of the heads kept in each."""
    dim, old, new = _head_dim(base), base.num_key_value_heads, config.num_key_value_heads
    together, kept = base.num_attention_heads // old, config.num_attention_heads // new
    groups = v.view(old, -1).norm(dim=1).topk(new).indices.sort().values
    sizes = o.T.reshape(old, together, -1).norm(dim=2)[groups]
    heads = sizes.topk(kept, dim=1).indices.sort(dim=1).values + groups[:, None] * together
    return tuple((x.flatten()[:, None] * dim + torch.arange(dim)).flatten() for x in (groups, heads))  # type: ignore[return-value]


def _read(mine: Any, old: Any, weight: Any, rows: Tensor, gain: Tensor, turn: Tensor) -> None:
    mine.weight.copy_((weight(old)[rows] * gain) @ turn)
    if mine.bias is not None:
        mine.bias.copy_(old.bias[rows])


def _write(mine: Any, old: Any, weight: Any, columns: Tensor, turn: Tensor) -> None:
    mine.weight.copy_(turn.T @ weight(old)[:, columns])
    if mine.bias is not None:
        mine.bias.copy_(turn.T @ old.bias.float().cpu())
