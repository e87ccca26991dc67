"""Damaged, foreign and hostile adapter folders: refused by name, and nothing half loaded."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import umbra
from support.folders import (
    CARD,
    CONFIG,
    TENSOR,
    WEIGHTS,
    assert_same_model,
    contents,
    edit_config,
    hook_count,
)
from support.fuzz import limits
from support.tiny import VOCAB, make, make_base, scramble, tokens
from umbra import CheckpointError, UmbraError
from umbra.adapters.inspect import inspect
from umbra.files.folder import COMMITTED

# -- damage --------------------------------------------------------------------------------------------------------


def assert_refused(folder: Path, match: str) -> None:
    base = make_base()
    with pytest.raises(CheckpointError, match=match):
        umbra.load(folder, base=base)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_missing_file_is_named(saved, file):
    (saved / file).unlink()
    assert_refused(saved, file)


def test_missing_card_is_allowed(saved):
    (saved / CARD).unlink()
    umbra.load(saved, base=make_base())


@pytest.mark.parametrize("path", ["nowhere", "./owner/name", "adapter/README.md"])
def test_path_that_is_not_a_folder_is_named(saved, path):
    assert_refused(saved.parent / path, str(Path(path)))


def test_folder_in_place_of_file_is_refused(saved):
    for file in (WEIGHTS, CONFIG):
        (saved / file).unlink()
        (saved / file).mkdir()
        assert_refused(saved, file)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_weights_are_refused(saved, share):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: int(len(data) * share)])
    assert_refused(saved, WEIGHTS)


def header(values: dict) -> bytes:
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGES = {
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: random.Random(0).randbytes(len(data)),
    "noise after the header's size": lambda data: data[:8] + random.Random(0).randbytes(len(data) - 8),
    "an absurd header size": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "the largest header size": lambda data: b"\xff" * 8 + data[8:],
    "a header beyond the end": lambda data: len(data).to_bytes(8, "little") + data[8:],
    "offsets beyond the end": lambda _: header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
    "a shape that overflows": lambda _: header({"x": {"dtype": "F32", "shape": [2**40] * 2, "data_offsets": [0, 0]}}),
    "a git-lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
    "a pickle": lambda _: pickle.dumps({"x": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(saved, damage):
    (saved / WEIGHTS).write_bytes(DAMAGES[damage]((saved / WEIGHTS).read_bytes()))
    assert_refused(saved, WEIGHTS)


OTHER_TENSORS = {
    "missing": lambda w: {k: v for k, v in w.items() if k != TENSOR},
    "left over": lambda w: {**w, TENSOR + "s": w[TENSOR].clone()},
    "renamed": lambda w: {k.replace(TENSOR, TENSOR + "s"): v for k, v in w.items()},
    "of another shape": lambda w: {**w, TENSOR: w[TENSOR][:-1].contiguous()},
    "transposed": lambda w: {**w, TENSOR: w[TENSOR].T.contiguous()},
    "with one dimension more": lambda w: {**w, TENSOR: w[TENSOR][None]},
    "a scalar": lambda w: {**w, TENSOR: torch.tensor(1.0)},
    "of integers": lambda w: {**w, TENSOR: w[TENSOR].to(torch.int64)},
    "of truth values": lambda w: {**w, TENSOR: w[TENSOR] > 0},
}


@pytest.mark.parametrize("change", OTHER_TENSORS)
def test_unexpected_tensors_are_refused_by_name(saved, change):
    save_file(OTHER_TENSORS[change](load_file(saved / WEIGHTS)), saved / WEIGHTS)
    assert_refused(saved, rf"{WEIGHTS}.*{TENSOR}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300], ids=str)
def test_nonfinite_values_are_refused_by_tensor_name(saved, value):
    weights = load_file(saved / WEIGHTS)
    weights[TENSOR] = weights[TENSOR].double()
    weights[TENSOR][1, 2] = value
    save_file(weights, saved / WEIGHTS)
    edit_config(saved, sha256=None)
    assert_refused(saved, rf"{WEIGHTS}.*{TENSOR}.*finite")


def test_empty_weights_file_is_refused(saved):
    save_file({}, saved / WEIGHTS)
    assert_refused(saved, WEIGHTS)


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", "[]", "null", "3", '"UMBRA"', b"\xff\xfe\x00", '{"peft_type": "UMBRA"', "[" * 100_000],
    ids=lambda t: str(t)[:16],
)
def test_configuration_must_be_json_object(saved, text):
    (saved / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(saved, CONFIG)


@pytest.mark.parametrize("peft_type", ["LORA", None, 3, ...])
def test_adapter_of_another_method_is_refused(saved, peft_type):
    edit_config(saved, peft_type=peft_type)
    assert_refused(saved, f"{CONFIG}.*not written by Umbra")


@pytest.mark.parametrize("version", [0, 1, 99, "2", None, ...])
def test_unknown_format_version_is_refused(saved, version):
    edit_config(saved, format_version=version)
    assert_refused(saved, f"{CONFIG}.*format")


@pytest.mark.parametrize("key", ["shadow", "shadow_model_config", "base", "task_type"])
@pytest.mark.parametrize("value", [..., None, [], "x", 3], ids=str)
def test_missing_or_mistyped_entry_is_refused(saved, key, value):
    edit_config(saved, **{key: value})
    assert_refused(saved, CONFIG if key != "task_type" or value is ... else "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"rnk": 8},
        {"rank": 0},
        {"alpha": float("nan")},
        {"dialect": "other"},
        {"shadow": "mirror", "activation": "__import__('os')"},
        {"first_layer": "1"},
    ],
    ids=str,
)
def test_invalid_shadow_configuration_is_refused(saved, changes):
    shadow = json.loads((saved / CONFIG).read_text())["shadow"]
    edit_config(saved, shadow={**shadow, **changes})
    assert_refused(saved, rf"{CONFIG}.*{next(iter(changes))}" if len(changes) == 1 else CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "umbra_of_the_moon"},
        {"model_type": None},
        {"model_type": 3},
        {"model_type": "../llama"},
        {"hidden_size": "wide"},
        {"hidden_size": -32},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"head_dim": 7},
        {"layer_types": ["mystery"]},
        {"hidden_act": "os.system"},
    ],
    ids=str,
)
def test_unbuildable_shadow_model_is_refused(saved, changes):
    model = json.loads((saved / CONFIG).read_text())["shadow_model_config"]
    edit_config(saved, shadow_model_config={**model, **changes})
    base = make_base()
    with pytest.raises(UmbraError):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": []},
        {"weights": {"embeddings": "not base64!"}},
        {"weights": {"embeddings": ""}},
        {"weights": {"embeddings": "AAA="}},
        {"weights": {"embeddings": 3}},
    ],
    ids=str,
)
def test_damaged_fingerprint_is_refused(saved, changes):
    values = json.loads((saved / CONFIG).read_text())["base"]
    edit_config(saved, base={**values, **changes})
    base = make_base()
    with pytest.raises(UmbraError):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0


@pytest.mark.parametrize("value", [..., None, [], {}, {"id2label": None}, {"id2label": {"x": "y"}}], ids=str)
def test_damaged_classifier_entry_is_refused(tmp_path, value):
    make_base(classifier=True).save_pretrained(tmp_path / "base")
    make(classifier=True).save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", classifier=value)
    with pytest.raises(CheckpointError, match=CONFIG):
        umbra.load(tmp_path / "adapter", base=str(tmp_path / "base"))


# -- what only the digest tells ------------------------------------------------------------------------------------


def change_one_bit(saved):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-1001] ^= 1
    (saved / WEIGHTS).write_bytes(data)


def swap_two_tensors(saved):
    weights, other = load_file(saved / WEIGHTS), TENSOR.replace(".1.", ".2.")
    save_file({**weights, TENSOR: weights[other], other: weights[TENSOR]}, saved / WEIGHTS)


def change_alpha(saved):
    edit_config(saved, shadow={**json.loads((saved / CONFIG).read_text())["shadow"], "alpha": 0.51})


def change_an_activation(saved):
    edit_config(
        saved,
        shadow_model_config={**json.loads((saved / CONFIG).read_text())["shadow_model_config"], "hidden_act": "relu"},
    )


@pytest.mark.parametrize("change", [change_one_bit, swap_two_tensors, change_alpha, change_an_activation])
def test_a_change_of_the_output_is_refused_unless_it_was_intended(saved, change):
    with torch.no_grad():
        before = umbra.load(saved, base=make_base())(tokens()).logits
    change(saved)
    assert_refused(saved, f"{CONFIG}.*sha256")
    edit_config(saved, sha256=None)
    with torch.no_grad():
        assert not torch.equal(umbra.load(saved, base=make_base())(tokens()).logits, before)
    edit_config(saved, sha256=...)
    assert_refused(saved, f"{CONFIG}.*sha256")


# -- links ---------------------------------------------------------------------------------------------------------


def link_to(saved: Path, outside: Path) -> dict[str, bytes]:
    """Move the files of a folder to another and leave links, as the hub's cache does; what lies outside now."""
    outside.mkdir()
    for path in list(saved.iterdir()):
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
    return contents(outside)


def test_load_follows_links_and_save_replaces_them(saved, tmp_path):
    before = link_to(saved, tmp_path / "outside")
    model = umbra.load(saved, base=make_base())
    scramble(model.shadow, seed=5)
    model.save_pretrained(saved)
    assert contents(tmp_path / "outside") == before
    assert not any(path.is_symlink() for path in saved.iterdir())
    assert_same_model(umbra.load(saved, base=make_base()), model)


def test_linked_commit_folder_is_not_moved(saved, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / CONFIG).write_text("precious")
    (saved / COMMITTED).symlink_to(tmp_path / "home")
    model = umbra.load(saved, base=make_base())
    with pytest.raises(CheckpointError, match="symbolic link"):
        model.save_pretrained(saved)
    assert contents(tmp_path / "home") == {CONFIG: b"precious"}


def test_pipe_in_place_of_file_does_not_block(saved):
    for file in (WEIGHTS, CONFIG):
        (saved / file).unlink()
        os.mkfifo(saved / file)
        assert_refused(saved, f"{file}.*no regular file")
        with pytest.raises(CheckpointError, match="no regular file"):
            inspect(str(saved))


# -- sizes ---------------------------------------------------------------------------------------------------------

SIZES = [
    ("shadow", "rank", 10**6), ("shadow", "gate_rank", 2**20), ("shadow", "rank", 10**12),
    ("shadow_model_config", "hidden_size", 2**40), ("shadow_model_config", "intermediate_size", 10**9),
    ("shadow_model_config", "num_hidden_layers", 10**9), ("shadow_model_config", "num_labels", 10**9),
    ("shadow_model_config", "head_dim", 10**8), ("shadow_model_config", "num_attention_heads", 10**7),
]  # fmt: skip


@pytest.mark.parametrize(("part", "key", "size"), SIZES, ids=str)
def test_absurd_sizes_are_refused_before_allocation(saved, part, key, size):
    values = json.loads((saved / CONFIG).read_text())[part]
    edit_config(saved, **{part: {**values, key: size}}, sha256=None)
    with limits():
        assert_refused(saved, str(saved))


def test_a_shared_table_has_the_bases_rows_whatever_the_file_says(saved):
    """Nothing of that size is built, for the shadow reads the base's own table."""
    values = json.loads((saved / CONFIG).read_text())["shadow_model_config"]
    edit_config(saved, shadow_model_config={**values, "vocab_size": 10**12}, sha256=None)
    with limits():
        model = umbra.load(saved, base=make_base())
    expected = make()
    expected.shadow.adapter_id = model.shadow.adapter_id
    assert_same_model(model, expected)
    assert model.detached()(tokens()).logits.shape[-1] == VOCAB


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", WEIGHTS])
def test_pickle_is_never_opened(saved, file):
    marker = saved.parent / "unpickled"
    (saved / WEIGHTS).unlink()
    (saved / file).write_bytes(pickle.dumps(Marker(marker)))
    assert_refused(saved, WEIGHTS)
    assert not marker.exists()
    pickle.loads((saved / file).read_bytes()).close()
    assert marker.exists(), "the trap itself must work"


def test_code_named_in_file_is_not_run(saved):
    marker = saved.parent / "imported"
    (saved / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    model = json.loads((saved / CONFIG).read_text())["shadow_model_config"]
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "auto_mapping": {"base": "evil"}}
    edit_config(saved, shadow_model_config={**model, **code}, sha256=None, **code)
    umbra.load(saved, base=make_base())
    assert not marker.exists()
