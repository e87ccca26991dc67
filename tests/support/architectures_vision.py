"""Tiny configurations of vision-language models, whose image towers have as many blocks as their decoders."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from support.architectures import Family
from support.architectures_hybrid import DELTA, DENSE
from support.tiny import scramble

IMAGE, VIDEO, START, END = 98, 97, 96, 95  # token ids
TOKENS = 4  # that one image becomes
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
CLIP = {**TOWER, "model_type": "clip_vision_model", "image_size": 8}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False}
LLAMA = {**DENSE, "model_type": "llama"}
QWEN_TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
AXES = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]


def qwen(model: str, tower: dict, **text) -> dict:
    """Return a configuration of a Qwen-VL model."""
    return {
        **QWEN_IDS, "text_config": {**DENSE, "model_type": f"{model}_text", "rope_parameters": AXES, **text},
        "vision_config": {**QWEN_TOWER, "model_type": f"{model}_vision", **tower},
    }  # fmt: skip


MERGED_TOWER = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("vision-language", qwen("qwen2_vl", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2})),
    "qwen2_5_vl": Family(
        "vision-language", qwen("qwen2_5_vl", {**MERGED_TOWER, "fullatt_block_indexes": [2], "window_size": 16})
    ),
    "qwen3_vl": Family(
        "vision-language",
        qwen("qwen3_vl", {**MERGED_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}, head_dim=8),
    ),
    "qwen3_5": Family(
        "vision-language",
        qwen("qwen3_5", {**MERGED_TOWER, "num_position_embeddings": 16}, **DELTA, head_dim=8,
             layer_types=["linear_attention", "full_attention", "linear_attention"]), "dense",
    ),
    "gemma3": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6, "layer_types": WINDOWED},
         "vision_config": SIGLIP, "mm_tokens_per_image": TOKENS, "image_token_index": IMAGE, "boi_token_index": START,
         "eoi_token_index": END},
    ),
    "paligemma": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "gemma", "head_dim": 8}, "vision_config": {**SIGLIP, "image_size": 8},
         "projection_dim": 32, "hidden_size": 32, "image_token_index": IMAGE},
    ),
    "llava": Family(
        "vision-language",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": IMAGE, "image_seq_length": TOKENS,
         "vision_feature_layer": -1},
    ),
    "llava_next": Family(
        "vision-language",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": IMAGE, "image_seq_length": TOKENS,
         "vision_feature_layer": -1, "image_grid_pinpoints": [[8, 8]]},
    ),
    "llava_onevision": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "qwen2"}, "vision_config": {**SIGLIP, "image_size": 8},
         "image_token_index": IMAGE, "video_token_index": VIDEO, "image_grid_pinpoints": [[8, 8]]},
    ),
    "mistral3": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "mistral", "head_dim": 8, "sliding_window": None},
         "vision_config": {**TOWER, "model_type": "pixtral", "image_size": 16}, "image_token_index": IMAGE,
         "spatial_merge_size": 2},
    ),
    "internvl": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "qwen2"},
         "vision_config": {**TOWER, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
         "image_token_id": IMAGE, "image_seq_length": TOKENS},
    ),
    "idefics3": Family(
        "vision-language",
        {"text_config": LLAMA, "vision_config": {**TOWER, "model_type": "idefics3_vision", "image_size": 16},
         "image_token_id": IMAGE, "scale_factor": 2},
    ),
    "smolvlm": Family(
        "vision-language",
        {"text_config": LLAMA, "vision_config": {**TOWER, "model_type": "smolvlm_vision", "image_size": 16},
         "image_token_id": IMAGE, "scale_factor": 2},
    ),
    "aya_vision": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "cohere2", "logit_scale": 0.25, "sliding_window": 6, "layer_types": WINDOWED},
         "vision_config": SIGLIP, "image_token_index": IMAGE, "downsample_factor": 2},
    ),
    "cohere2_vision": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "cohere2", "logit_scale": 0.25, "sliding_window": 6, "layer_types": WINDOWED},
         "vision_config": SIGLIP, "image_token_id": IMAGE, "downsample_factor": 2, "alignment_intermediate_size": 32},
    ),
    "llama4": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 48,
                         "num_local_experts": 2, "interleave_moe_layer_step": 2, "attention_chunk_size": 6},
         "vision_config": {**TOWER, "image_size": 16, "intermediate_size": 64, "projector_input_dim": 16,
                           "projector_output_dim": 16, "vision_output_dim": 16},
         "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}, "dense", "mixture of experts",
    ),
    "lfm2_vl": Family(
        "vision-language",
        {"text_config": {**DENSE, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"],
                         "block_multiple_of": 8},
         "vision_config": {**TOWER, "model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
         "image_token_id": IMAGE, "projector_hidden_size": 32, "downsample_factor": 2}, "dense", "short convolutions",
    ),
}  # fmt: skip


def pixels(*shape: int) -> torch.Tensor:
    """Return random pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


GRID = torch.tensor([[1, 4, 4]] * 2)
QWEN = lambda: {"pixel_values": pixels(32, 96), "image_grid_thw": GRID}  # noqa: E731
ONE = lambda size: lambda: {"pixel_values": pixels(2, 3, size, size)}  # noqa: E731
SEVERAL = lambda size, **more: lambda: {"pixel_values": pixels(2, 1, 3, size, size), **more}  # noqa: E731
PARTS = lambda: {"pixel_values": pixels(2, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * 2)}  # noqa: E731
PATCHES = lambda: {  # noqa: E731
    "pixel_values": pixels(2, 16, 48), "spatial_shapes": torch.tensor([[4, 4]] * 2),
    "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
}  # fmt: skip

# The images of a batch of two rows, one in each, as each model's processor would give them.
IMAGES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"], QWEN),
    **dict.fromkeys(["gemma3", "internvl", "aya_vision", "cohere2_vision", "llama4"], ONE(16)),
    **dict.fromkeys(["paligemma", "llava"], ONE(8)),
    **dict.fromkeys(["llava_next", "llava_onevision"], PARTS),
    **dict.fromkeys(["idefics3", "smolvlm"], SEVERAL(16)),
    "mistral3": lambda: {"pixel_values": pixels(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)},
    "lfm2_vl": PATCHES,
}
LONGER = {"llava_next": 10, "llava_onevision": 10}  # tokens of an image with its newlines
TYPED = ("gemma3", "paligemma")  # token_type_ids mark images
GRIDDED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")  # mm_token_type_ids do


@dataclass
class Batch:
    """Two rows with an image between words, and the model's other inputs for them."""

    ids: torch.Tensor
    told: dict[str, torch.Tensor]


def batch_of(name: str, pad: int = 0) -> Batch:
    """Return a family's batch, with ``pad`` padding tokens on the left."""
    words = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(3))
    image = torch.full((2, LONGER.get(name, TOKENS)), IMAGE)
    edge = torch.tensor([[START], [START]]), torch.tensor([[END], [END]])
    ids = torch.cat([torch.zeros(2, pad, dtype=torch.long), words[:, :3], edge[0], image, edge[1], words[:, 3:]], dim=1)
    told = {"attention_mask": (ids != 0).long(), **IMAGES[name]()}
    kinds = (ids == IMAGE).long()
    if name in TYPED:
        told["token_type_ids"] = kinds
    if name in GRIDDED:
        told["mm_token_type_ids"] = kinds
    return Batch(ids, told)


SPECIAL = [95, 96, 97, 98]  # tokens that stand for images and their edges, which a random model must not generate


def build(name: str):
    """Return a tiny random base of a family, frozen, in eval mode."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **family.config), dtype=torch.float32)
    scramble(model, 0, 0.15)
    model.tie_weights()
    return model.eval().requires_grad_(False)
