"""Bases in 4, 8 and 16 bits: trained beside, generated with, saved, detached from and given back as a plain one."""

import copy
import functools
import json
import tempfile

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import umbra
from support.tiny import (
    CLASSIFIERS,
    assert_same,
    gradients,
    make_base,
    partly_labelled,
    scramble,
    shadow_logits,
    tokens,
)
from umbra.base import architectures, quantized
from umbra.deploy.detach import write_detached

SIZES = {"gpt2": {"n_embd": 64, "n_head": 4}}
LARGER = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs blocks of 64


def plain_base(name: str, seed: int = 0, **options):
    return make_base(name, seed, **SIZES.get(name, LARGER), **options)


@functools.cache
def folder(name: str, seed: int) -> tempfile.TemporaryDirectory:
    path = tempfile.TemporaryDirectory()
    plain_base(name, seed).save_pretrained(path.name)
    return path


def load(name: str, seed: int, quantisation, **options):
    return AutoModelForCausalLM.from_pretrained(folder(name, seed).name, quantization_config=quantisation, **options)


def bitsandbytes(name: str, seed: int, dtype: torch.dtype = torch.float32, **options):
    return load(name, seed, BitsAndBytesConfig(**options), dtype=dtype)


def torchao_int8(name: str, seed: int):
    from torchao.quantization import Int8WeightOnlyConfig

    return load(name, seed, TorchAoConfig(Int8WeightOnlyConfig()))


def torchao_embeddings(name: str, seed: int):
    """Every linear layer and the embedding table."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = plain_base(name, seed)
    quantize_(base, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear | nn.Embedding))
    return base


def torchao_int4(name: str, seed: int):
    return load(name, seed, TorchAoConfig(int4()))


def int4():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def torchao_everywhere(name: str, seed: int, **options):
    """Every linear layer, the head among them."""
    from torchao.quantization import quantize_

    base = plain_base(name, seed, **options)
    quantize_(base, int4())
    return base


def hqq(name: str, seed: int):
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    base, config = plain_base(name, seed), BaseQuantizeConfig(nbits=4, group_size=32)
    AutoHQQHFModel.quantize_model(base, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return base


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WAYS = {
    "bnb_int8": functools.partial(bitsandbytes, load_in_8bit=True),
    "bnb_nf4": functools.partial(bitsandbytes, **NF4),
    "bnb_nf4_nested_bf16": functools.partial(
        bitsandbytes, dtype=torch.bfloat16, **NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "torchao_int8": torchao_int8,
    "torchao_int8_embeddings": torchao_embeddings,
    "torchao_int4": torchao_int4,
    "torchao_int4_everywhere": torchao_everywhere,
    "hqq_int4": hqq,
}
NAMES = {
    "bnb_int8": "bitsandbytes 8-bit",
    "bnb_nf4": "bitsandbytes 4-bit",
    "bnb_nf4_nested_bf16": "bitsandbytes 4-bit",
    "torchao_int8": "torchao int8 weight-only",
    "torchao_int8_embeddings": "torchao int8 weight-only",
    "torchao_int4": "torchao int4 weight-only",
    "torchao_int4_everywhere": "torchao int4 weight-only",
    "hqq_int4": "HQQ 4-bit",
}
CASES = [(way, "llama") for way in WAYS] + [
    ("bnb_int8", "gpt2"),
    ("bnb_nf4", "gpt2"),
    ("torchao_int8_embeddings", "gemma3_text"),
]
cases = pytest.mark.parametrize(
    ("way", "name"),
    [pytest.param(*case, marks=pytest.mark.compat("Bases", NAMES[case[0]])) for case in CASES],
)
ROUGH = {"bnb_nf4_nested_bf16": 0.15}  # computes in bf16
EVAL_ROUGH = {"bnb_int8": 0.1, **ROUGH}  # quantises activations too, but not in training


@functools.cache
def master(way: str, name: str, seed: int):
    return WAYS[way](name, seed)


def quantised(way: str, name: str, seed: int = 0):
    """A base of its own, that has not run yet."""
    return copy.deepcopy(master(way, name, seed)).eval()


def attach(base, **fields):
    model = umbra.attach(base, umbra.ShadowConfig(**{"rank": 4, "alpha": 0.5, "dropout": 0.0, **fields}))
    scramble(model.shadow, 1, 0.2)
    return model.eval()


def weight_of(module: nn.Module) -> torch.Tensor | None:
    """(out, in) of a layer by its library's own means, or None if it has no weight."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if kind == "HQQLinear":
        return module.dequantize()
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Linear8bitLt":
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scale[:, None] / 127
    if weight is not None and type(weight.data) is not torch.Tensor:
        return weight.dequantize()
    return weight


@torch.no_grad()
def dequantised(base: nn.Module, name: str):
    """A plain fp32 base of the same values."""
    plain = plain_base(name)
    for path, module in base.named_modules():
        weight, target = weight_of(module), plain.get_submodule(path)
        if weight is not None:
            is_turned = isinstance(target, Conv1D) and not isinstance(module, Conv1D)
            target.weight = nn.Parameter((weight.T if is_turned else weight).float().clone())
        if getattr(module, "bias", None) is not None:
            target.bias.copy_(module.bias)
    return plain


def parts(value) -> list:
    """The raw tensors and values of a state dict, those inside packed tensors included."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in parts(value[key])]
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        return [leaf for name in value.__tensor_flatten__()[0] for leaf in parts(getattr(value, name))]
    return [value.detach().clone() if isinstance(value, torch.Tensor) else value]


def assert_same_parts(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def step(model, ids, **options) -> dict[str, torch.Tensor]:
    model.train()(ids, labels=partly_labelled(ids), **options).loss.backward()
    model.eval()
    return gradients(model)


# -- training ------------------------------------------------------------------------------------------------------


@cases
def test_gradients_equal_dequantised_base(way, name):
    """Before and after an evaluation and a look at the state dict."""
    base, ids = quantised(way, name), tokens()
    expected = step(attach(dequantised(base, name)), ids)
    model = attach(base)
    assert_same(step(model, ids), expected, ROUGH.get(way, 1e-4))
    with torch.no_grad():
        model(ids)
    model.state_dict()
    assert_same(step(model, ids), expected, ROUGH.get(way, 1e-4))


@cases
@torch.no_grad()
def test_logits_equal_dequantised_base(way, name):
    base, ids = quantised(way, name), tokens()
    expected = attach(dequantised(base, name))(ids).logits
    difference = attach(base)(ids).logits - expected
    assert difference.norm() <= EVAL_ROUGH.get(way, 1e-4) * expected.norm()


@cases
def test_training_and_unload_leave_base_bits_unchanged(way, name):
    """A base that has run before, as in a comparison with what it will become."""
    base, ids = quantised(way, name), tokens()
    trainable = {n for n, p in base.named_parameters() if p.requires_grad}
    with torch.no_grad():
        logits = base(ids).logits
    model = attach(base).train()
    before = parts(base.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_parts(parts(base.state_dict()), before)
    found = model.eval().unload()
    assert found is base
    with torch.no_grad():
        assert torch.equal(base(ids).logits, logits)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("way", ["bnb_int8", "bnb_nf4", "torchao_int8", "torchao_int4", "hqq_int4"])
@pytest.mark.parametrize("kind", [Trainer, umbra.ShadowTrainer])
def test_trainers_train_on_quantised_base(way, kind, tmp_path):
    """transformers refuses to train a model that says it is quantised; this one's trained part is not."""
    model = attach(quantised(way, "llama"))
    before = {n: p.detach().clone() for n, p in model.shadow.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    kind(model=model, args=arguments, train_dataset=rows).train()
    assert all(not torch.equal(before[n], p) for n, p in model.shadow.named_parameters() if p.requires_grad)


# -- generating, moving --------------------------------------------------------------------------------------------


@cases
def test_cached_generation_equals_uncached(way, name):
    model, ids = attach(quantised(way, name)), tokens(2, 6)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)


@cases
@torch.no_grad()
def test_model_can_be_moved_and_cast(way, name):
    """To a device nothing changes; another dtype casts the shadow, and packed weights stay packed."""
    base, ids = quantised(way, name), tokens()
    model = attach(base)
    logits, packed = model(ids).logits, [m for m in base.modules() if quantized.is_packed(m)]
    assert packed
    assert torch.equal(model.to("cpu")(ids).logits, logits)
    model.to(torch.bfloat16)
    assert all(quantized.is_packed(m) for m in packed)
    assert {p.dtype for p in model.shadow.parameters()} == {torch.bfloat16}


# -- saving and loading --------------------------------------------------------------------------------------------


@cases
@torch.no_grad()
def test_adapter_loads_onto_requantised_base(way, name, tmp_path):
    ids, model = tokens(), attach(quantised(way, name))
    model.save_pretrained(tmp_path)
    assert "quant_method" not in (tmp_path / "adapter_config.json").read_text()
    loaded = umbra.load(tmp_path, base=quantised(way, name))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@cases
def test_base_is_recognised_in_any_precision(way, name, tmp_path):
    """An adapter that was trained beside a quantised base serves beside the plain one, and the other way round."""
    attach(quantised(way, name)).save_pretrained(tmp_path / "quantised")
    attach(plain_base(name)).save_pretrained(tmp_path / "plain")
    for half in (torch.float32, torch.bfloat16):
        umbra.load(tmp_path / "quantised", base=plain_base(name).to(half))
    umbra.load(tmp_path / "plain", base=quantised(way, name))
    other = quantised(way, name, seed=1)
    for path in ("quantised", "plain"):
        with pytest.raises(umbra.BaseModelError, match="Wrong base"):
            umbra.load(tmp_path / path, base=other)
        umbra.load(tmp_path / path, base=other, allow_other_base=True).unload()


@cases
@torch.no_grad()
def test_base_differing_only_in_blocks_is_refused(way, name, tmp_path):
    """All that can still be read as it lies is equal: only the packed weights differ."""
    attach(quantised(way, name)).save_pretrained(tmp_path)
    other = quantised(way, name, seed=1)
    same = dict(quantised(way, name).named_parameters())
    for path, p in other.named_parameters():
        if quantized.is_plain(p):
            p.copy_(same[path])
    if way == "torchao_int8_embeddings":
        other.set_input_embeddings(quantised(way, name).get_input_embeddings())
    with pytest.raises(umbra.BaseModelError, match="other quantised weights"):
        umbra.load(tmp_path, base=other)


# -- the shadow of a quantised base --------------------------------------------------------------------------------


@cases
@torch.no_grad()
def test_shadow_is_not_marked_as_quantised(way, name):
    model = attach(quantised(way, name))
    for config in (model.config, model.shadow.backbone.config, model.detached().config):
        assert not {"quantization_config", "_is_quantized"} & config.__dict__.keys()
    assert not getattr(model, "is_quantized", False)
    assert all(quantized.is_plain(p) and p.dtype == torch.float32 for p in model.shadow.parameters())


@cases
@pytest.mark.parametrize("fields", [{}, {"shadow_hidden_size": 32}], ids=["mirror", "narrow"])
@torch.no_grad()
def test_detached_model_is_stock(way, name, fields, tmp_path):
    model, ids = attach(quantised(way, name), **fields), tokens()
    write_detached(model, tmp_path / "edge")
    assert "quantization_config" not in json.loads((tmp_path / "edge" / "config.json").read_text())
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "edge", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(quantized.is_plain(p) for p in stock.parameters())
    rough = 5e-2 if way in ROUGH else 1e-4
    torch.testing.assert_close(stock(ids).logits, shadow_logits(model, ids).float(), rtol=rough, atol=rough)
    assert stock.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@cases
@torch.no_grad()
def test_copied_blocks_are_dequantised(way, name):
    base = quantised(way, name)
    plain = dequantised(base, name)
    found, expected = (umbra.attach(b, umbra.ShadowConfig(init="base")).shadow.backbone for b in (base, plain))
    rough = 1e-2 if way in ROUGH else 1e-4
    for (key, a), (_, b) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=rough, atol=rough, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.compat("Bases", "torchao int4 weight-only")
@pytest.mark.parametrize("classifier", [False, True], ids=["lm", "classifier"])
@pytest.mark.parametrize("train_heads", [False, True], ids=["frozen_head", "trained_heads"])
def test_quantised_head_is_supported(classifier, train_heads):
    """Trained copies of it are plain; a frozen one passes gradients on; detached it is plain."""
    options = CLASSIFIERS["single"] if classifier else {}
    base, ids = torchao_everywhere("llama", 0, classifier=classifier, **options), tokens()
    located = architectures.locate(base)
    assert quantized.is_packed(located.head)
    weight = located.head.weight.dequantize()
    model = umbra.attach(base, umbra.ShadowConfig(rank=4, train_heads=train_heads))
    for head in model.shadow.heads.values():
        assert torch.equal(head.weight, weight)
    scramble(model.shadow.couplings)
    out = model.train()(ids, labels=torch.tensor([0, 2]) if classifier else ids)
    out.loss.backward()
    assert set(gradients(model)) == {f"shadow.{n}" for n, p in model.shadow.named_parameters() if p.requires_grad}
    assert torch.equal(architectures.locate(model.eval().detached()).head.weight, weight)


def test_quantised_pretrained_shadow_is_refused(tmp_path):
    quantised("bnb_nf4", "llama").save_pretrained(tmp_path)
    with pytest.raises(umbra.BaseModelError, match="quantised"):
        umbra.attach(plain_base("llama"), umbra.ShadowConfig(shadow=str(tmp_path)))


# -- 16 bits -------------------------------------------------------------------------------------------------------

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
halves = pytest.mark.parametrize("half", HALVES)
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "mistral", "gpt2"]


def direction(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The cosine between two sets of gradients."""
    a, b = (torch.cat([g[n].flatten().float() for n in expected]) for g in (found, expected))
    return float(torch.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "half",
    [pytest.param(h, marks=pytest.mark.compat("Bases", f"{h} base, float32 shadow")) for h in HALVES],
)
def test_half_precision_base_is_supported(name, half, tmp_path):
    ids, dtype = tokens(), HALVES[half]
    expected = step(attach(plain_base(name)), ids)
    model = attach(plain_base(name).to(dtype))
    found = step(model, ids)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert direction(found, expected) > 0.98
    model.save_pretrained(tmp_path)
    loaded = umbra.load(tmp_path, base=plain_base(name).to(dtype))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    umbra.load(tmp_path, base=plain_base(name))
    assert {p.dtype for p in model.unload().parameters()} == {dtype}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "half", [pytest.param(h, marks=pytest.mark.compat("Bases", f"autocast to {h}")) for h in HALVES]
)
def test_autocast_trains_in_half_precision(name, half):
    """In training and in cached decoding, over a float32 base and over one of that type."""
    ids, dtype = tokens(), HALVES[half]
    expected = step(attach(plain_base(name)), ids)
    for base in (plain_base(name), plain_base(name).to(dtype)):
        model = attach(base)
        with torch.autocast("cpu", dtype):
            out = model.train()(ids, labels=partly_labelled(ids))
            model.eval()
            model.generation_config.eos_token_id = None
            assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
        out.loss.backward()
        found = gradients(model)
        assert all(g.dtype == torch.float32 for g in found.values())
        assert direction(found, expected) > 0.99


@pytest.mark.compat(
    "Bases", "GradScaler", "unscaled gradients are those of the plain step; overflowing steps are skipped"
)
@pytest.mark.parametrize("half_base", [False, True], ids=["autocast", "fp16_base"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_grad_scaler_trains(name, half_base):
    ids = tokens()
    model = attach(plain_base(name).to(torch.float16 if half_base else torch.float32))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.SGD(trained, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def scaled_loss():
        with torch.autocast("cpu", torch.float16, enabled=not half_base):
            return scaler.scale(model.train()(ids, labels=partly_labelled(ids)).loss)

    expected = step(attach(plain_base(name)), ids)
    scaled_loss().backward()
    scaler.unscale_(optimizer)
    before = [p.detach().clone() for p in trained]
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert direction(gradients(model), expected) > 0.99

    scaler.update(1e30)
    scaled_loss().backward()
    before = [p.detach().clone() for p in trained]
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
