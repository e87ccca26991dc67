"""The shadow network: a small decoder that runs in parallel with the base, and projections between their widths.

    s⁰ = projection(backbone(embed_projection(x)))        # x (B, T, D) → (B, T, Ds) → (B, T, D)

Both projections are linear maps without bias, and absent where the widths are equal. A detached shadow folds them into its
embeddings and its head.
"""

import dataclasses
import uuid
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from umbra.base import architectures, quantized, sharded
from umbra.base.added_tokens import AddedTokens
from umbra.base.architectures import Architecture
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, ConfigError
from umbra.method.core import Couplings
from umbra.shadow import input_scale
from umbra.shadow.backbone import build_backbone, has_base_embeddings, uses_own_embeddings

# Arguments of a forward that the shadow's backbone can receive.
BATCH_ARGUMENTS = (
    "attention_mask", "position_ids", "past_key_values", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "cache", "read_index", "write_index", "block_table", "is_causal",  # of continuous batching
)  # fmt: skip


class Shadow(nn.Module):
    """All trainable weights of a `ShadowModel`: backbone, projections, couplings, and trained heads if any.

    Args:
        base: the base's parts.
        config: resolved.
        backbone_config: of a saved shadow's backbone; None builds the backbone that ``config`` describes.
        device: of the weights; by default that of the base's embeddings.
    """

    def __init__(
        self,
        base: Architecture,
        config: ShadowConfig,
        backbone_config: PretrainedConfig | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if base.is_classifier and config.distillation_weight > 0:
            raise ConfigError(
                "distillation_weight is for language models: a classifier's shadow learns the labels alone."
            )
        self.config = config
        self.adapter_id = uuid.uuid4().hex
        self.classifier: dict[str, Any] = {}  # label names, where they differ from the base's configuration
        self.prompting: Any = (
            None  # an `umbra.adapters.prompting.Prompting`; None for the base's tokenizer and template
        )
        self.first_cache_layer = 0
        self.frozen_names: list[str] | None = None  # while it is frozen: the parameters that `unfreeze` trains again
        self.draft_tokens: list[int] | None = None  # the draft vocabulary; None for the whole one
        self.added_tokens: AddedTokens | None = None
        self._add_backbone(base, config, backbone_config)
        self.couplings = Couplings(len(base.blocks), base.config.hidden_size, config)

        device = torch.device(architectures.device_of(base.embeddings) if device is None else device)
        self.heads = nn.ModuleDict()
        self._add_heads(base, config, device)
        dtype = torch.float64 if base.model.dtype == torch.float64 else torch.float32
        # Beside a base without weights, which will come from rank 0 or from a file, it stays where it was made.
        self.to(device=None if device.type == "meta" else device, dtype=dtype)
        is_saved = backbone_config is not None  # its input scales are then in the file
        if config.input_scale == "measured" and not is_saved and device.type != "meta":
            input_scale.measure(base, self.couplings)

    def _add_backbone(self, base: Architecture, config: ShadowConfig, backbone_config: PretrainedConfig | None) -> None:
        """Build the backbone and the projections, and decide whose embeddings it reads."""
        self.owns_embeddings = uses_own_embeddings(base, config)
        if backbone_config is not None and not self.owns_embeddings:
            backbone_config.vocab_size = architectures.vocabulary_size(base.embeddings)
        built = build_backbone(base, config, backbone_config)
        self.backbone = built.backbone
        if config.init == "auto":
            self.config = config = dataclasses.replace(config, init="base" if built.is_copied else "random")
        chooses = config.embeddings == "auto" and backbone_config is None
        if self.owns_embeddings and chooses and has_base_embeddings(base, self.backbone):
            self.config, self.owns_embeddings = dataclasses.replace(config, embeddings="base"), False
        if not self.owns_embeddings:
            architectures.remove_embeddings(self.backbone)
            self.backbone.config.vocab_size = architectures.vocabulary_size(base.embeddings)
        elif config.is_pretrained:
            self.backbone.get_input_embeddings().requires_grad_(False)
        self.place(architectures.cache_depth(base))
        self.shares_masks = architectures.shares_masks(base.decoder, self.backbone)

        E, width = architectures.table_width(base.embeddings), architectures.states_width(self.backbone.config)
        D = base.config.hidden_size
        needs_map = width != E and not self.owns_embeddings
        self.embed_projection = nn.Linear(E, width, bias=False) if needs_map else None
        self.projection = nn.Linear(width, D, bias=False) if width != D else None
        if built.projection is not None:
            self._init_projection(built.projection)
        if built.embed_projection is not None:
            self._init_embed_projection(built.embed_projection, base)

    def _add_heads(self, base: Architecture, config: ShadowConfig, device: torch.device) -> None:
        """Copy the base's head for both paths, where it is trained.

        Raises:
            BaseModelError: the head's weights are partitioned or offloaded.
        """
        if not (base.is_classifier if config.train_heads is None else config.train_heads):
            return
        if sharded.is_partitioned(base.embeddings.weight):
            raise BaseModelError(
                "ZeRO-3 has partitioned this base already, and train_heads copies its head: load the base before "
                "TrainingArguments(deepspeed=…) are made, or use FSDP2 or ZeRO-2."
            )
        if base.head.weight.is_meta and device.type != "meta":
            raise BaseModelError(
                "train_heads copies the base's head, whose weights are offloaded: load the base without offloading, or set "
                "train_heads to false."
            )
        self.heads.update(
            {path: quantized.trainable_copy(base.head, base.model.dtype) for path in ("attached", "shadow")}
        )
        is_trained = config.auxiliary_loss_weight > 0 or config.distillation_weight > 0
        self.heads["shadow"].requires_grad_(is_trained)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, table: nn.Module, **batch: Any) -> Tensor:
        """Return the initial state s⁰ (B, T, D), in the shadow's dtype.

        Args:
            input_ids: (B, T); read by a shadow with its own embeddings.
            inputs_embeds: (B, T, D) of the base; looked up in ``table`` where None.
            table: the base's input embeddings.
            batch: any of `BATCH_ARGUMENTS`.

        Raises:
            BaseModelError: a shadow with its own embeddings received only ``inputs_embeds``.
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
        has_no_graph = torch.is_grad_enabled() and not x.requires_grad and not torch.compiler.is_compiling()
        if has_no_graph and self.backbone.is_activation_checkpointing:
            x = x.detach().requires_grad_()  # reentrant checkpointing needs it; that is never compiled
        return self._project(self.backbone(inputs_embeds=x, **batch).last_hidden_state)

    def _init_projection(self, projection: Tensor) -> None:
        """Initialize the projection with a map (D, Ds)."""
        needed = None if self.projection is None else tuple(self.projection.weight.shape)
        if self.projection is None or tuple(projection.shape) != needed:
            raise ConfigError(
                f"The pretrained shadow brings a projection of shape {tuple(projection.shape)}, needed is {needed}."
            )
        with torch.no_grad():
            self.projection.weight.copy_(projection)

    @torch.no_grad()
    def _init_embed_projection(self, projection: Tensor, base: Architecture) -> None:
        """Initialize the embedding projection with a map (Ds, D), or apply the map to the shadow's own table."""
        if self.embed_projection is not None:
            self.embed_projection.weight.copy_(projection)
        else:
            table = self.backbone.get_input_embeddings()
            weight = architectures.weight_of(table)
            ratio = architectures.embedding_scale(base.embeddings) / architectures.embedding_scale(table)
            weight.copy_(architectures.embedding_rows(base.embeddings).float() @ projection.T.to(weight.device) * ratio)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.projection is None else self.projection(x)

    @property
    def cache_layers(self) -> range:
        """The layers of the shared cache that hold this shadow's keys."""
        return range(self.first_cache_layer, self.first_cache_layer + self.backbone.config.num_hidden_layers)

    def resize(self, base: Architecture) -> None:
        """Resize tables and heads to the base's number of tokens; rows of existing tokens stay unchanged.

        New rows of trained heads are copied from the base, those of an own table initialized by transformers.

        Args:
            base: its parts, after resizing.
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
        for path, head in () if base.is_classifier else list(self.heads.items()):
            weight = architectures.weight_of(head)
            resized = quantized.copy_without_hooks(base.head).to(device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                for new, old in zip(resized.parameters(), head.parameters(), strict=True):
                    new[: len(old)] = old[: len(new)]
            self.heads[path] = resized.requires_grad_(weight.requires_grad)

    def place(self, first_cache_layer: int) -> None:
        """Move to other layers of the shared cache."""
        architectures.shift_layer_indices(self.backbone, first_cache_layer - self.first_cache_layer)
        self.first_cache_layer = first_cache_layer

    def freeze(self) -> None:
        """Freeze all weights, until `unfreeze`."""
        if self.frozen_names is None:
            self.frozen_names = [name for name, p in self.named_parameters() if p.requires_grad]
        self.requires_grad_(False)

    def unfreeze(self) -> None:
        """Train the weights that were trained before `freeze`."""
        for name in self.frozen_names or ():
            self.get_parameter(name).requires_grad_()
        self.frozen_names = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def parts(self) -> dict[str, int]:
        """Return the number of parameters of each part that has any."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        return {name: n for name, n in counts.items() if n}
