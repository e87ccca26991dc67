"""What cannot be read is refused by name; damaged and hostile folders of others leave the base alone."""

import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import umbra
from support import peers
from support.folders import hook_count
from support.tiny import LLAMA_LIKE, make_base, tokens
from umbra import BaseModelError, CheckpointError, ConfigError, UmbraError
from umbra.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FILES = {
    "peft": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "shadow-peft": ("shadow_config.json", "shadow_adapter.safetensors", "shadow_adapter.pt"),
}
PACKAGES = pytest.mark.parametrize("package", FILES)


def write(package: str, folder: Path, classifier: bool = False, base: str = "llama", **fields) -> Path:
    """An adapter folder of the real package."""
    options = {"num_labels": 3} if classifier else {}
    build = peers.peft_model if package == "peft" else peers.shadow_peft_model
    peers.scramble_trained(
        build(make_base(base, classifier=classifier, **options), classifier, **fields)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {package: write(package, root / package) for package in FILES}


@pytest.fixture
def theirs(originals, package, tmp_path) -> Path:
    """A copy to damage."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in originals[package].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(folder: Path, **changes) -> Path:
    """Set keys of the configuration, whichever it is."""
    file = next(folder / config for config, _, _ in FILES.values() if (folder / config).exists())
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def assert_refused(folder: Path, *named: str, base=None, error: type = CheckpointError, **options) -> None:
    """An error that names all of ``named``; the base has no hook left and is trainable again."""
    base = make_base() if base is None else base
    with pytest.raises(error) as raised:
        umbra.load(folder, base=base, **options)
    for text in named:
        assert text in str(raised.value)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())


# -- damage ------------------------------------------------------------------------------------------------------------


def kinds(tensors: dict) -> list[str]:
    """One name of each kind: those that differ in their numbers only are one."""
    return sorted({re.sub(r"\d+", "#", name): name for name in tensors}.values())


@PACKAGES
def test_missing_tensor_is_named(theirs, package):
    """Each kind in turn; the dead weights too."""
    file = theirs / FILES[package][1]
    tensors = load_file(file)
    assert len(kinds(tensors)) > 12
    base = make_base()
    for name in kinds(tensors):
        save_file({k: v for k, v in tensors.items() if k != name}, file)
        assert_refused(theirs, name, file.name, "lacks", base=base)


@PACKAGES
def test_misshapen_tensor_is_named(theirs, package):
    file = theirs / FILES[package][1]
    tensors = load_file(file)
    base = make_base()
    for name in kinds(tensors)[::2]:
        for changed in (tensors[name][:-1], tensors[name].to(torch.int32)):
            save_file({**tensors, name: changed.contiguous()}, file)
            assert_refused(theirs, name, file.name, base=base)


@PACKAGES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_number_is_named(theirs, package, value):
    """In the dead weights too: the file is damaged."""
    file = theirs / FILES[package][1]
    tensors = load_file(file)
    base = make_base()
    for name in kinds(tensors):
        changed = tensors[name].clone()
        changed.view(-1)[-1] = value
        save_file({**tensors, name: changed}, file)
        assert_refused(theirs, name, file.name, "no finite numbers", base=base)


@PACKAGES
def test_leftover_tensor_is_named(theirs, package):
    file = theirs / FILES[package][1]
    save_file({**load_file(file), "surplus.weight": torch.zeros(2)}, file)
    assert_refused(theirs, "surplus.weight", file.name, "unknown")


@PACKAGES
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(theirs, package, share):
    file = theirs / FILES[package][1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    assert_refused(theirs, file.name)


@PACKAGES
def test_missing_file_is_named(theirs, package):
    config, weights, _ = FILES[package]
    (theirs / weights).unlink()
    assert_refused(theirs, weights)
    (theirs / config).unlink()
    assert_refused(theirs, "adapter_config.json is missing")


class Trap:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return (exec, ("import sys; sys.umbra_was_trapped = True",))


@PACKAGES
def test_pickle_is_never_opened(theirs, package):
    _, weights, pickled = FILES[package]
    (theirs / weights).unlink()
    (theirs / pickled).write_bytes(pickle.dumps(Trap()))
    assert_refused(theirs, pickled, "pickle", "safetensors")
    assert not hasattr(sys, "umbra_was_trapped")


@PACKAGES
@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"peft_type": "SHADOW", "r": "four"}', "[" * 100_000])
def test_damaged_configuration_is_refused(theirs, package, text):
    (theirs / FILES[package][0]).write_text(text)
    assert_refused(theirs)


WRONG_VALUES = {
    "peft": {
        "r": [0, -1, 2.5, True, 10**12], "shadow_alpha": ["x", None], "shadow_dropout": [1, -0.1, "x"], "shadow_model": [5, ""],
        "shadow_num_hidden_layers": [0, "2", 10**9], "shadow_hidden_size": [10**9, []], "share_embeddings": ["yes"],
        "target_modules": [5, [1], "(", "(a+)+$", ["nothing"], []], "modules_to_save": ["lm_head", [5]],
        "task_type": ["TOKEN_CLS", 5], "update_hidden_size": [10**9, "x"], "auxiliary_loss_weight": [-1, "x"],
        "exclude_modules": [7], "shadow_num_attention_heads": [3, 0], "shadow_intermediate_size": [10**9, 2.5],
    },
    "shadow-peft": {
        "injection_hidden_size": [0, "x", 10**12], "gate_hidden_size": [0, 10**12], "alpha": ["x"], "dropout": [1],
        "num_shadow_layers": [0, 10**9, "x"], "shadow_head_dim": [10**9, 3], "shadow_num_key_value_heads": [3],
        "modules_to_save": ["lm_head", [5], ["embed_tokens"]],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("package", "key", "value"),
    [(p, k, v) for p, keys in WRONG_VALUES.items() for k, values in keys.items() for v in values],
)
def test_wrong_value_is_named(theirs, package, key, value):
    edit(theirs, **{key: value})
    assert_refused(theirs, "shadow_" if key == "modules_to_save" and package != "peft" else FILES[package][0])


@PACKAGES
def test_unknown_key_with_value_is_refused(theirs, package):
    umbra.load(edit(theirs, new_option=None), base=make_base()).unload()
    assert_refused(edit(theirs, new_option=0.5), "new_option", FILES[package][0])


@PACKAGES
def test_another_base_is_detected_by_its_sizes(theirs, package):
    for base in (
        make_base(hidden_size=16),
        make_base(num_hidden_layers=3),
        make_base("gpt2"),
        make_base(classifier=True),
    ):
        if package == "shadow-peft" and not hasattr(base, "lm_head"):
            continue  # it writes no task: without trained heads, its adapters fit either kind of model
        assert_refused(theirs, base=base, error=UmbraError)


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A folder with a module that leaves a trace when it is imported; it can be imported."""
    code = "import sys\nsys.umbra_was_trapped = True\nclass Thing: pass\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "umbra_trap.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whether to run what it finds
    yield tmp_path / "code"
    assert not hasattr(sys, "umbra_was_trapped")
    assert "umbra_trap" not in sys.modules


def with_code(trap: Path, folder: Path, model_type: str, **options) -> Path:
    """A model whose configuration names the trap."""
    make_base(**options).save_pretrained(folder)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "umbra_trap.Thing")
    config = {**json.loads((folder / "config.json").read_text()), "auto_map": auto_map, "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "umbra_trap.py").write_bytes((trap / "umbra_trap.py").read_bytes())
    return folder


@pytest.mark.parametrize("package", ["peft"])
def test_classes_named_in_peft_config_are_ignored(theirs, trap):
    mapping = {"base_model_class": "Thing", "parent_library": "umbra_trap"}
    umbra.load(edit(theirs, auto_mapping=mapping, task_type=None), base=make_base()).unload()


@pytest.mark.parametrize("kind", ["llama", "umbra_trap"])
@pytest.mark.parametrize("package", ["peft"])
def test_explicit_shadow_cannot_import_code(theirs, trap, kind, tmp_path):
    """Its model type is known, and the code ignored; or it is unknown, and refused."""
    shadow = with_code(trap, tmp_path / "shadow", kind, num_hidden_layers=1)
    tensors = load_file(theirs / FILES["peft"][1])
    table = make_base().get_input_embeddings().weight.detach().clone()
    save_file({**tensors, "base_model.shadow_backbone.default.embed_tokens.weight": table}, theirs / FILES["peft"][1])
    edit(theirs, shadow_model=str(shadow))
    if kind == "llama":
        umbra.load(theirs, base=make_base()).unload()
        umbra.attach(make_base(), umbra.ShadowConfig(shadow=str(shadow)))
        return
    assert_refused(theirs, "umbra_trap")
    with pytest.raises(ConfigError, match="umbra_trap"):
        umbra.attach(make_base(), umbra.ShadowConfig(shadow=str(shadow)))


@pytest.mark.parametrize("package", ["peft"])
def test_base_cannot_import_code(theirs, trap, tmp_path):
    base = with_code(trap, tmp_path / "base", "umbra_trap")
    edit(theirs, base_model_name_or_path=str(base))
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(BaseModelError, match="base"):
            umbra.load(theirs, **options)


def write_projected(folder: Path, rows: int = 32, lost: str | None = None) -> None:
    """A projected shadow whose configuration names the trap."""
    backbone = make_base(hidden_size=16).model
    tensors = {f"shadow_model.{k}": v.contiguous() for k, v in backbone.state_dict().items()}
    tensors["shadow_hidden_projection.weight"] = torch.randn(rows, 16)
    save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors")
    values = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": backbone.config.to_dict()}
    values |= {"shadow_model_class": "umbra_trap:Thing", "shadow_model_config_class": "umbra_trap:Thing"}
    (folder / "config.json").write_text(json.dumps(values))


def test_projected_shadow_cannot_import_classes(trap, tmp_path):
    write_projected(tmp_path)
    umbra.attach(make_base(), umbra.ShadowConfig(shadow=str(tmp_path)))


@pytest.mark.parametrize("lost", ["shadow_hidden_projection.weight", "shadow_model.norm.weight", None])
def test_damaged_projected_shadow_is_refused(trap, tmp_path, lost):
    write_projected(tmp_path, 32 if lost else 30, lost)
    with pytest.raises(ConfigError, match=(lost or "projection").removeprefix("shadow_model.")):
        umbra.attach(make_base(), umbra.ShadowConfig(shadow=str(tmp_path)))


# -- what Umbra does not do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "fields", "named"),
    [
        ("peft", {"modules_to_save": ["embed_tokens"]}, "model.embed_tokens"),
        ("peft", {"modules_to_save": ["lm_head", "model.norm"]}, "model.norm"),
        ("shadow-peft", {"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_unsupported_checkpoint_is_named(package, fields, named, tmp_path):
    options = {"tie_word_embeddings": package == "shadow-peft"}
    build = peers.peft_model if package == "peft" else peers.shadow_peft_model
    build(make_base(**options), **fields).save_pretrained(tmp_path)
    assert_refused(tmp_path, named, base=make_base(**options))


@pytest.mark.parametrize("package", ["peft"])
def test_block_range_with_gap_is_refused_by_both_packages(theirs):
    names = [f"model.layers.{l}" for l in (1, 3)]
    with pytest.raises(AttributeError):
        peers.peft_model(make_base(), target_modules=names)(tokens())
    assert_refused(edit(theirs, target_modules=names), "[1, 3]", "contiguous")


@pytest.mark.parametrize(
    ("base", "options", "fields", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"shadow_num_hidden_layers": 2}, "scale_attn_by_inverse"),
        ("lfm2", {}, {}, "recurrent"),
    ],
)
def test_unsupported_mirror_is_named(base, options, fields, named, tmp_path):
    if base == "lfm2":
        config = AutoConfig.for_model(base, **LLAMA_LIKE, layer_types=["conv", "full_attention"] * 2)
        made = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    else:
        made = [make_base(base, **options) for _ in range(2)]
    peers.peft_model(made[0], **fields).save_pretrained(tmp_path)
    assert_refused(tmp_path, named, base=made[1], error=BaseModelError)


@pytest.mark.parametrize("package", ["shadow-peft"])
def test_explicit_shadow_path_is_required(theirs, tmp_path):
    with pytest.raises(CheckpointError, match="base="):
        umbra.load(theirs)
    build = peers.shadow_peft_model(make_base(), shadow=make_base(hidden_size=16, num_hidden_layers=1))
    build.save_pretrained(tmp_path / "explicit")
    assert_refused(tmp_path / "explicit", "shadow=")
    assert_refused(tmp_path / "explicit", "nowhere", shadow="./nowhere")


@pytest.mark.parametrize("package", ["peft"])
def test_shadow_may_be_given_only_once(theirs, saved):
    assert_refused(theirs, "shadow=", shadow="x", error=ConfigError)
    assert_refused(saved, "shadow=", shadow="x", error=ConfigError)


@PACKAGES
def test_inspect_suggests_next_step(theirs, package, capsys):
    assert main(["inspect", str(theirs)]) == 2
    assert "umbra convert" in capsys.readouterr().err
