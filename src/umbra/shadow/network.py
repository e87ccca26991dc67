"""The shadow itself: a small decoder beside the base, and what brings it to the base's width.

    s⁰ = projection(backbone(embed_projection(x)))        # x (B, T, D) → (B, T, Ds) → (B, T, D)

Both projections are bias-free linear maps, and absent where the widths are equal, so that a detached shadow can
fold them into its embeddings and its head.
"""

import dataclasses
import uuid
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from umbra.base import architectures, quantized, sharded
from umbra.base.added_tokens import AddedTokens
from umbra.base.architectures import Anatomy
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, ConfigError
from umbra.method.core import Couplings
from umbra.shadow import input_scale
from umbra.shadow.pretrained import check_vocabulary, load_pretrained

ROWS = 2**14  # of a head, multiplied at once
ROUNDED = 2.0**-8, 1e-7  # relative, absolute: what bf16 and fp16 leave of a number
RIDGE = 1e-9  # of the mean square of a head's column: keeps a matrix without full rank solvable
# What the shadow's backbone may be told about a batch, of all that a forward is given.
BATCH_ARGUMENTS = (
    "attention_mask", "position_ids", "past_key_values", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "cache", "read_index", "write_index", "block_table", "is_causal",  # of continuous batching
)  # fmt: skip


class Shadow(nn.Module):
    """All trainable weights of a `ShadowModel`: backbone, projections, couplings, and trained heads if any.

    Args:
        base: where the parts of the base are.
        config: resolved.
        backbone_config: of a backbone that was saved before; None builds the one that ``config`` asks for.
        device: of the weights; by default that of the base's embeddings.
    """

    def __init__(
        self, base: Anatomy, config: ShadowConfig, backbone_config: PretrainedConfig | None = None,
        device: torch.device | str | None = None,
    ):  # fmt: skip
        super().__init__()
        if base.is_classifier and config.distillation_weight > 0:
            raise ConfigError(
                "distillation_weight is for language models: a classifier's shadow learns the labels alone."
            )
        D, L = base.config.hidden_size, len(base.blocks)
        self.config = config
        self.adapter_id = uuid.uuid4().hex
        self.classifier: dict[str, Any] = {}  # label names, where they are not those of the base's configuration
        self.prompting: Any = None  # how it is asked: see prompting.py; None for the base's tokenizer and template
        self.first_cache_layer = 0
        self.trained: list[str] | None = None  # while it rests: what to train again
        self.draft_tokens: list[int] | None = None  # those that it drafts; None for the whole vocabulary
        self.owns_embeddings = _owns_embeddings(base, config)
        if backbone_config is not None and not self.owns_embeddings:
            backbone_config.vocab_size = architectures.vocabulary_size(base.embeddings)
        self.backbone, projection, into, copied = build_backbone(base, config, backbone_config)
        if config.init == "auto":
            self.config = config = dataclasses.replace(config, init="base" if copied else "random")
        chooses = config.embeddings == "auto" and backbone_config is None
        if self.owns_embeddings and chooses and _has_the_bases_table(base, self.backbone):
            self.config, self.owns_embeddings = dataclasses.replace(config, embeddings="base"), False
        if not self.owns_embeddings:
            architectures.remove_embeddings(self.backbone)
            self.backbone.config.vocab_size = architectures.vocabulary_size(base.embeddings)
        elif config.is_pretrained:
            self.backbone.get_input_embeddings().requires_grad_(False)
        self.added_tokens: AddedTokens | None = None
        self.place(architectures.cache_depth(base))
        self.shares_masks = architectures.shares_masks(base.decoder, self.backbone)

        E, width = architectures.table_width(base.embeddings), architectures.states_width(self.backbone.config)
        narrows = width != E and not self.owns_embeddings
        self.embed_projection = nn.Linear(E, width, bias=False) if narrows else None
        self.projection = nn.Linear(width, D, bias=False) if width != D else None
        if projection is not None:
            self._start_from(projection)
        if into is not None:
            self._read_by(into, base)
        self.couplings = Couplings(L, D, config)

        device = torch.device(architectures.device_of(base.embeddings) if device is None else device)
        train_heads = base.is_classifier if config.train_heads is None else config.train_heads
        measures = config.input_scale == "measured" and backbone_config is None  # or else they come from a file
        if sharded.is_partitioned(base.embeddings.weight) and train_heads:
            raise BaseModelError(
                "ZeRO-3 has partitioned this base already, and train_heads copies its head: load the base before "
                "TrainingArguments(deepspeed=…) are made, or use FSDP2 or ZeRO-2."
            )
        self.heads = nn.ModuleDict()
        if train_heads and base.head.weight.is_meta and device.type != "meta":
            raise BaseModelError(
                "train_heads copies the base's head, whose weights are offloaded: load the base without offloading, or set "
                "train_heads to false."
            )
        if train_heads:
            self.heads.update(
                {path: quantized.trainable_copy(base.head, base.model.dtype) for path in ("attached", "shadow")}
            )
            learns = config.auxiliary_loss_weight > 0 or config.distillation_weight > 0
            self.heads["shadow"].requires_grad_(learns)  # otherwise nothing trains it

        dtype = torch.float64 if base.model.dtype == torch.float64 else torch.float32
        # Beside a base without weights, which are yet to come from rank 0 or from a file, it stays where it was made.
        self.to(device=None if device.type == "meta" else device, dtype=dtype)
        if measures and device.type != "meta":
            input_scale.measure(base, self.couplings)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, table: nn.Module, **batch: Any) -> Tensor:
        """The initial state s⁰ (B, T, D), in the shadow's dtype.

        Args:
            input_ids: (B, T); read by a shadow with its own embeddings.
            inputs_embeds: (B, T, D) of the base; looked up in ``table`` where None.
            table: the base's input embeddings.
            batch: any of `BATCH_ARGUMENTS`.

        Raises:
            BaseModelError: only ``inputs_embeds`` were given to a shadow that has its own embeddings.
        """
        batch.setdefault("use_cache", False)
        if self.owns_embeddings:
            if input_ids is None:
                raise BaseModelError(
                    "This shadow has its own embeddings and cannot read inputs_embeds of the base: pass input_ids."
                )
            x = self.backbone.get_input_embeddings()(input_ids)
        else:
            x = (table(input_ids) if inputs_embeds is None else inputs_embeds).to(self.dtype)
            x = x if self.embed_projection is None else self.embed_projection(x)
        starts_graph = torch.is_grad_enabled() and not x.requires_grad and not torch.compiler.is_compiling()
        if starts_graph and self.backbone.is_activation_checkpointing:
            x = x.detach().requires_grad_()  # which reentrant checkpointing needs; it is never compiled
        return self._project(self.backbone(inputs_embeds=x, **batch).last_hidden_state)

    def _start_from(self, projection: Tensor) -> None:
        needed = None if self.projection is None else tuple(self.projection.weight.shape)
        if self.projection is None or tuple(projection.shape) != needed:
            raise ConfigError(
                f"The pretrained shadow brings a projection of shape {tuple(projection.shape)}, needed is {needed}."
            )
        with torch.no_grad():
            self.projection.weight.copy_(projection)

    @torch.no_grad()
    def _read_by(self, into: Tensor, base: Anatomy) -> None:
        """Take embeddings by a map (Ds, D) of the base's: in every forward, or once for a table of its own."""
        if self.embed_projection is not None:
            self.embed_projection.weight.copy_(into)
        else:
            table: Any = self.backbone.get_input_embeddings()
            ratio = architectures.embedding_scale(base.embeddings) / architectures.embedding_scale(table)
            table.weight.copy_(
                architectures.embedding_rows(base.embeddings).float() @ into.T.to(table.weight.device) * ratio
            )

    def _project(self, x: Tensor) -> Tensor:
        return x if self.projection is None else self.projection(x)

    @property
    def cache_layers(self) -> range:
        """The layers of the common cache that hold this shadow's keys."""
        return range(self.first_cache_layer, self.first_cache_layer + self.backbone.config.num_hidden_layers)

    def resize(self, base: Anatomy) -> None:
        """Follow the base to another number of tokens: what the shadow knows of the old ones stays as it is.

        New rows of trained heads begin as the base's, new rows of an own table as transformers begins them.
        """
        rows = architectures.vocabulary_size(base.embeddings)
        if self.draft_tokens is not None:
            self.draft_tokens = [token for token in self.draft_tokens if token < rows] or None
        if not self.owns_embeddings:
            self.backbone.config.vocab_size = rows
        elif (
            not self.config.is_pretrained or architectures.vocabulary_size(self.backbone.get_input_embeddings()) < rows
        ):
            self.backbone.resize_token_embeddings(rows)
        head: Any
        for path, head in () if base.is_classifier else list(self.heads.items()):
            grown: Any = quantized.copy_without_hooks(base.head).to(device=head.weight.device, dtype=head.weight.dtype)
            with torch.no_grad():
                for new, old in zip(grown.parameters(), head.parameters(), strict=True):
                    new[: len(old)] = old[: len(new)]
            self.heads[path] = grown.requires_grad_(head.weight.requires_grad)

    def place(self, first_cache_layer: int) -> None:
        """Move to other layers of the common cache."""
        architectures.shift_layer_indices(self.backbone, first_cache_layer - self.first_cache_layer)
        self.first_cache_layer = first_cache_layer

    def freeze(self) -> None:
        """Freeze all weights, until `unfreeze`."""
        if self.trained is None:
            self.trained = [name for name, p in self.named_parameters() if p.requires_grad]
        self.requires_grad_(False)

    def unfreeze(self) -> None:
        """Make the weights trainable again that were trainable before `freeze`."""
        for name in self.trained or ():
            self.get_parameter(name).requires_grad_()
        self.trained = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def parts(self) -> dict[str, int]:
        """Parameters of each part; parts without any are left out."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        return {name: n for name, n in counts.items() if n}


class Built(NamedTuple):
    """A backbone, and what the projections from its states (D, Ds) and into it (Ds, D) begin as; None for their own."""

    backbone: PreTrainedModel
    projection: Tensor | None = None
    embed_projection: Tensor | None = None
    is_copied: bool = False


def build_backbone(base: Anatomy, config: ShadowConfig, backbone_config: PretrainedConfig | None) -> Built:
    """The decoder that computes the shadow's states: with weights that are pretrained, copied, or neither.

    Raises:
        ConfigError: sizes that do not fit together or do not exist in this architecture.
        BaseModelError: a pretrained shadow with another vocabulary, or a quantised one.
    """
    if backbone_config is None and config.is_pretrained:
        return _pretrained(base, config.shadow)
    chosen = architectures.unquantised(backbone_config or fresh_config(base, config))
    if not config.is_pretrained:
        chosen._attn_implementation = base.config._attn_implementation
    build = type(base.decoder)._from_config if chosen.model_type == base.config.model_type else AutoModel.from_config
    try:
        backbone = build(chosen, dtype=torch.float32)
    except Exception as error:  # transformers and torch raise several unrelated types
        raise ConfigError(f"No shadow can be built from these sizes: {error!s:.500}") from error
    if (
        backbone_config is not None
        or config.init == "random"
        or (config.init == "auto" and not _can_copy(base, config, backbone))
    ):
        return Built(backbone)
    try:
        return _copied(base, backbone, config)
    except ConfigError:
        if config.init == "base":
            raise
        return build_backbone(base, dataclasses.replace(config, init="random"), None)


def _copied(base: Anatomy, backbone: PreTrainedModel, config: ShadowConfig) -> Built:
    layers = config.init_layers or tuple(range(backbone.config.num_hidden_layers))
    if max(layers) >= len(base.blocks):
        raise ConfigError(f"init='base' copies blocks {list(layers)}, the base's are 0 to {len(base.blocks) - 1}.")
    narrowed = architectures.Narrowed(None, None)
    left = {id(p) for l, block in enumerate(base.blocks) if l not in layers for p in block.parameters()}
    read = [p for p in base.decoder.parameters() if id(p) not in left]
    with sharded.gathered(read), sharded.gathered(backbone.parameters(), to_change=True):
        if architectures.is_narrower(backbone.config, base.config):
            narrowed = architectures.prune_blocks(base, backbone, layers)
        else:
            architectures.copy_blocks(base, backbone, layers)
        architectures.scale_final_norm(backbone, config.constants.init_scale)
    return Built(backbone, narrowed.projection, narrowed.embed_projection, True)


def _can_copy(base: Anatomy, config: ShadowConfig, backbone: PreTrainedModel) -> bool:
    """Whether the shadow's blocks are as the base's first ones, whose weights are at hand, or neither's are."""
    given = {k for k, v in config.to_dict().items() if k.startswith("shadow_") and v is not None}
    depth = config.shadow_num_hidden_layers or 1
    if config.shadow != "mirror" or given - {"shadow_num_hidden_layers"} or depth > len(base.blocks):
        return False
    at_hand = not any(p.is_meta for block in base.blocks[:depth] for p in block.parameters())
    return architectures.is_cheap_to_mirror(base.config) and (at_hand or next(backbone.parameters()).is_meta)


def fresh_config(base: Anatomy, config: ShadowConfig) -> PretrainedConfig:
    """The configuration of a mirrored or dense backbone with the sizes that ``config`` asks for."""
    given = {k.removeprefix("shadow_"): v for k, v in config.to_dict().items() if k.startswith("shadow_")}
    sizes = {"num_hidden_layers": 1, **{k: v for k, v in given.items() if v is not None}}
    if config.shadow == "mirror" and architectures.is_cheap_to_mirror(base.config):
        return architectures.mirror_config(base.config, sizes, config.init_layers)
    return architectures.dense_config(base.config, sizes)


def _pretrained(base: Anatomy, path: str) -> Built:
    backbone, projection, head = load_pretrained(path)
    if not architectures.is_causal(backbone.config):
        raise BaseModelError(
            f"The pretrained shadow {path!r} ({backbone.config.model_type}) is no causal decoder: its states would know "
            "the tokens that they are to predict."
        )
    if not all(quantized.is_plain(p) for p in backbone.parameters()):
        raise BaseModelError(
            f"The pretrained shadow {path!r} is quantised and cannot be trained: dequantise it first "
            "(`model.dequantize()` of transformers), or take its original."
        )
    backbone.train()
    rows, needed = backbone.config.vocab_size, architectures.vocabulary_size(base.embeddings)
    used = check_vocabulary(path, base.model.name_or_path)
    if rows < needed and used is not None and used <= rows:  # the base has rows that are no tokens
        backbone.resize_token_embeddings(needed, mean_resizing=False)
    elif rows < needed:
        raise BaseModelError(
            f"The pretrained shadow {path!r} knows {rows} tokens, the base {needed}: they must share one tokenizer. "
            "Take a shadow of the base's family, or shadow='mirror'."
        )
    if projection is None and head is not None:
        if architectures.states_width(backbone.config) != base.config.hidden_size:
            projection = aligned(base, head)
        elif _reads_otherwise(base, head):
            warnings.warn(
                f"The heads of the pretrained shadow {path!r} and of the base read hidden states of one width each in their own "
                f"way: it begins as if it knew little. umbra pretrain --base {base.model.name_or_path or 'BASE'} --shadow {path} "
                "teaches it this base.",
                stacklevel=2,
            )
    return Built(backbone, projection)


@torch.no_grad()
def _reads_otherwise(base: Anatomy, head: Tensor) -> bool:
    """Whether a token's rows of the base's head and of a head (V, D) point elsewhere: a cosine below 0.5 in the mean."""
    if not _has_a_head_at_hand(base):
        return False
    weight = quantized.linear_weight(base.head, base.model.dtype)
    if weight.shape[1] != head.shape[1]:  # a head that reads something else than the states
        return False
    rows = min(len(weight), len(head), ROWS)
    return float(torch.cosine_similarity(weight[:rows].float().cpu(), head[:rows].float().cpu()).mean()) < 0.5


def _has_a_head_at_hand(base: Anatomy) -> bool:
    return not base.is_classifier and sharded.is_whole(base.head.weight) and not base.head.weight.is_meta


@torch.no_grad()
def aligned(base: Anatomy, head: Tensor) -> Tensor | None:
    """P (D, Ds), by which the base's head W says of a shadow's states what their own head says, as nearly as it can.

        P = argmin ‖W · P − head‖ = (Wᵀ · W)⁻¹ · Wᵀ · head        over the tokens that both have

    Args:
        head: (V, Ds).

    Returns:
        None where the base has no such head, or its weights are not here.
    """
    if not _has_a_head_at_hand(base):
        return None
    weight = quantized.linear_weight(base.head, base.model.dtype)
    rows, D = min(len(weight), len(head)), weight.shape[1]
    gram = torch.zeros(D, D, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(D, head.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, rows, ROWS):
        part = weight[start : min(start + ROWS, rows)].float()
        gram += part.T @ part
        cross += part.T @ head[start : min(start + ROWS, rows)].to(part.device)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross).float() / architectures.logit_factor(base.model.config)


def _has_the_bases_table(base: Anatomy, backbone: PreTrainedModel) -> bool:
    """Whether a pretrained shadow looks tokens up in the base's own table, up to bf16 and fp16: it was pretrained for this base."""
    mine: Any = backbone.get_input_embeddings()
    tables = (mine.weight, base.embeddings.weight)
    if not all(quantized.is_plain(table) and sharded.is_whole(table) for table in tables):
        return False
    if architectures.embedding_scale(mine) != architectures.embedding_scale(base.embeddings):
        return False
    theirs = base.embeddings.weight.detach()
    return mine.weight.shape == theirs.shape and all(
        torch.allclose(a.float(), b.to(a.device).float(), *ROUNDED)
        for a, b in zip(mine.weight.detach().split(ROWS), theirs.split(ROWS), strict=True)
    )


def _owns_embeddings(base: Anatomy, config: ShadowConfig) -> bool:
    own = config.is_pretrained if config.embeddings == "auto" else config.embeddings == "own"
    if own and base.merges_embeddings:
        raise BaseModelError(
            f"A shadow with embeddings of its own cannot see the images that {type(base.model).__name__} puts among its "
            "embeddings: set embeddings='base'."
        )
    return own
