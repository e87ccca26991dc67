"""Peculiarities of model families: data only, by the names of transformers.

The other modules of this package read it: a family that would need a line of code elsewhere needs an entry here instead.
"""

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

CLASSIFIER_NAMES = ("score", "classifier")
UNPACKED = {"gguf"}  # formats that transformers dequantizes where it has no kernel for them
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
INTERMEDIATE_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # logits ← c · tanh(logits / c)
LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier")  # logits ← f · logits
LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # logits ← logits / f
MULTIPLYING_DIVISORS = {"hyperclovax"}  # families in which LOGIT_DIVISORS multiply
DIVIDED_STATES = {
    "inkling_text",
    "minicpm3",
}  # families that divide the input of the head by LOGIT_DIVISORS, not its logits
# Vision-language models that scale or cap their logits as the language model of their text tower does; others do not.
SCALING_TOWERS = {"gemma3n", "gemma4", "gemma4_unified", "paligemma", "granite4_vision"}
# Rotary position embeddings that do not depend on the length of the text.
FIXED_ROPES = {"default", "linear", "yarn", "llama3", "proportional", "mrope"}
ROUTER_LOSS_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")  # of a model or its configuration
COMPUTED = ("layer_types", "layers_block_type", "kv_sharing_modes", "num_hidden_layers")
# Text towers of vision-language models without a language model of the same family, and the family equivalent on text.
TEXT_TWINS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "emu3_text_model": "llama",
}
BLOCK_COUNTS = ("decoder_layers", "num_layers", "num_hidden_layers")  # the first that a configuration has
LAYER_INDICES = ("layer_idx", "layer_id")  # names of an attention module's index in the cache
PER_LAYER = ("layer_types", "attention_layers", "mlp_layer_types", "layer_rope_theta", "no_rope_layers")
EMBEDDING_WIDTH = "word_embed_proj_dim"  # width of the table and of the head, where it differs from the blocks'
# Modules between the decoder's states and the head, where one of them exists.
BEFORE_HEAD = {"opt": ("model.decoder.project_out",), "modernbert-decoder": ("lm_head", "head")}
OTHER_INPUTS = ("decoder_layers", "vision_config")  # fields of a decoder with cross-attention, or with towers inside
STREAMS = "its blocks exchange several streams at once, where a shadow corrects one hidden state (B, T, D)"
SKIPS = "it skips its blocks of cross-attention where there is no image"
OWN_CACHE = (
    "it keeps its state in {} instead of a Cache of transformers, in which the shadow's keys would have no place"
)
ENCODER = (
    "it is encoder-only, or an encoder run as a decoder; a shadow needs a causal decoder, such as Llama, Qwen3, "
    "Gemma 3, Mistral or GPT-2"
)
DECODER_HALVES = {"bart", "mbart", "mvp"}  # decoders that AutoModelForMaskedLM lists as well
# Families to which the method does not apply, with the reason.
UNFIT = {
    **{name: ENCODER for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES if name not in DECODER_HALVES},
    "bert-generation": ENCODER,
    "blt": "its tokens are bytes, its blocks work on patches of them, and a shadow's states fit neither alone",
    "cpmant": "it puts a prompt before the tokens, so that its hidden states are longer than its input",
    "deepseek_v4": STREAMS,
    "git": "it puts features of images before the tokens, so that its hidden states are longer than its input",
    "hrm_text": "it runs the same blocks several times in one forward",
    "hy_v4": STREAMS,
    "mllama": SKIPS,
    "mllama_text_model": SKIPS,
    "moshi": "it speaks in several codebooks at once",
    "prophetnet": "its hidden states hold several predicted streams behind one another",
    "qwen4_exp": STREAMS,
    "qwen4_exp_text": STREAMS,
    "reformer": "its reversible blocks exchange two streams and hash the sequence into buckets",
    "rwkv": OWN_CACHE.format("a list of tensors"),
    "xlnet": "its hidden states are (T, B, D), and see what follows them",
    "xlstm": OWN_CACHE.format("an xLSTMCache"),
}

# Wrappers of a model, and adapters in it, by the names of classes or packages, with the solution.
SHARDED = "attach to the model before it is wrapped or sharded, and wrap the ShadowModel that attach() returns"
WRAPPERS = {
    "OptimizedModule": "torch.compile has wrapped it; attach to the model itself, and compile the ShadowModel",
    "DataParallel": SHARDED,
    "DistributedDataParallel": SHARDED,
    "FullyShardedDataParallel": SHARDED,
    "FSDPModule": SHARDED,
    "ShadowModel": "it has a shadow; add_adapter(…) puts another beside it, unload() gives the base back",
}
WRAPPING_PACKAGES = {
    "peft": "a PEFT adapter is around it or in it; merge_and_unload() that, and attach to what it returns"
}
