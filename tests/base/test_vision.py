"""Vision-language models: images pass through, and the shadow reads the embeddings into which they have been put."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import DynamicCache, TrainingArguments

import umbra
from support.architectures_vision import FAMILIES, IMAGE, SPECIAL, Batch, batch_of, build
from support.families import cast
from support.tiny import VOCAB, assert_same, gradients, scramble
from umbra.base import architectures

PADS = 4
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": SPECIAL, "eos_token_id": None, "pad_token_id": 0}
WORDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(4))


@dataclass
class Pair:
    """A base with a shadow, a batch with images, and what the base alone answered to it."""

    name: str
    model: umbra.ShadowModel
    batch: Batch
    logits: torch.Tensor
    at_first: torch.Tensor

    def run(self, **options):
        return self.model(self.batch.ids, **{**self.batch.told, **options})

    def generate(self, batch: Batch | None = None, **options) -> torch.Tensor:
        batch = batch or self.batch
        return self.model.generate(batch.ids, **batch.told, **{**GREEDY, **options})


@pytest.fixture(scope="module")
def pair(request) -> Pair:
    base, batch = build(request.param), batch_of(request.param)
    with torch.no_grad():
        logits = base(batch.ids, **batch.told).logits
        model = umbra.attach(base, umbra.ShadowConfig(rank=4, alpha=0.5, dropout=0.0)).eval()
        at_first = model(batch.ids, **batch.told).logits
    scramble(model.shadow)
    return Pair(request.param, model, batch, logits, at_first)


def check(column: str = ""):
    """A test of every family in turn, which fills a column of docs/reference/architectures.md."""
    names = [name for name, family in FAMILIES.items() if column not in family.skip]
    mark = pytest.mark.parametrize("pair", names, indirect=True, scope="module")
    return lambda test: pytest.mark.architecture(column)(mark(test)) if column else mark(test)


def first_state(pair: Pair, **options) -> torch.Tensor:
    """(B, T, D): s⁰ of a forward."""
    states = []
    handle = pair.model.shadow.register_forward_hook(lambda _, args, out: states.append(out))
    pair.run(**options)
    handle.remove()
    return states[0]


def text_only(name: str) -> dict[str, torch.Tensor]:
    """What a family must be told of `WORDS`, in which there is no image."""
    kinds = [key for key in batch_of(name).told if key.endswith("token_type_ids")]
    return {key: torch.zeros_like(WORDS) for key in kinds}


def shadow_loss(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), WORDS[:, 1:].reshape(-1))


# -- one pass over each family -------------------------------------------------------------------------------------


@check("attaches")
@torch.no_grad()
def test_attached_equals_base_at_initialisation(pair):
    """The blocks are the text decoder's, though the image tower has as many."""
    assert torch.equal(pair.at_first, pair.logits)
    assert (pair.run().logits - pair.logits).abs().max() > 1e-2
    located = architectures.locate(pair.model.base)
    assert located.config is pair.model.base.config.get_text_config(decoder=True)
    mirrored = type(pair.model.shadow.backbone) is type(located.decoder)
    assert ("mirror" if mirrored else "dense") == FAMILIES[pair.name].shadow


@check()
@torch.no_grad()
def test_shadow_reads_merged_embeddings(pair):
    """s⁰ is what its backbone makes of the embeddings that the decoder is given, images among them."""
    given = {}
    decoder = architectures.locate(pair.model.base).decoder
    handle = decoder.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    found = first_state(pair)
    handle.remove()
    merged, words = given["inputs_embeds"], pair.batch.ids != IMAGE
    table = pair.model.get_input_embeddings()(pair.batch.ids)
    assert (merged - table)[~words].abs().max() > 1e-2
    told = {"attention_mask": given["attention_mask"], "position_ids": given["position_ids"]}
    if not pair.model.shadow.shares_masks:
        told = {"attention_mask": pair.batch.told["attention_mask"]}
        if (positions := given["position_ids"]) is not None:
            told["position_ids"] = positions[0] if positions.ndim == 3 else positions
    expected = pair.model.shadow.backbone(inputs_embeds=merged, use_cache=False, **told).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = first_state(pair, pixel_values=torch.randn_like(pair.batch.told["pixel_values"]))
    moved = (found - other).abs().amax(-1)[0]
    assert moved[-1] > 1e-3
    if pair.name != "paligemma":  # whose text reads what follows, too
        assert moved[: words[0].long().argmin()].max() == 0


@check("trains")
def test_training_step_gives_every_trainable_weight_a_gradient(pair):
    """No dead weight: every parameter of the shadow has a gradient other than 0, none of the base has one."""
    labels = pair.batch.ids.masked_fill(pair.batch.ids == IMAGE, -100)
    pair.model.train()
    loss = pair.run(labels=labels).loss
    loss.backward()
    pair.model.eval()
    assert loss.isfinite()
    assert all(p.grad is None for p in pair.model.base.parameters())
    assert [name for name, gradient in gradients(pair.model).items() if not gradient.any()] == []


@check("generates")
def test_cached_generation_equals_uncached(pair):
    """Greedy, a left-padded batch; from embeddings of the cache that transformers makes, and of a static one."""
    padded = batch_of(pair.name, PADS)
    uncached = pair.generate(padded, use_cache=False)
    assert uncached.shape[1] == padded.ids.shape[1] + GREEDY["max_new_tokens"]
    cached = pair.generate(padded, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, uncached)
    layers = cached.past_key_values.layers
    assert len(layers) == 4
    assert layers[-1].get_seq_length() == uncached.shape[1] - 1
    assert torch.equal(pair.generate(padded, cache_implementation="static"), uncached)


@check("left padding")
def test_left_padded_batch_equals_unpadded(pair):
    assert torch.equal(pair.generate(batch_of(pair.name, PADS))[:, PADS:], pair.generate())


@check()
def test_beam_search_equals_uncached(pair):
    """The image's features are repeated for each beam, not its pixels."""
    if pair.name == "llama4":
        with (
            pair.model.disable_adapter(),
            pytest.raises(ValueError, match="Image features and image tokens do not match"),
        ):
            pair.generate(num_beams=2)
        return
    assert torch.equal(pair.generate(num_beams=2), pair.generate(num_beams=2, use_cache=False))


@check("hidden states")
@torch.no_grad()
def test_hidden_states_have_base_shapes(pair):
    states = pair.run(output_hidden_states=True).hidden_states
    assert all(type(h) is torch.Tensor and h.shape == (*pair.batch.ids.shape, 32) for h in states)
    assert len(states) == len(architectures.locate(pair.model.base).blocks) + 1


@check("saves")
@torch.no_grad()
def test_loaded_adapter_equals_saved_one(pair, tmp_path):
    """The base found by its folder, too."""
    pair.model.base.save_pretrained(tmp_path / "base")
    pair.model.save_pretrained(tmp_path / "adapter")
    loaded = umbra.load(tmp_path / "adapter", base=str(tmp_path / "base"))
    found = loaded(pair.batch.ids, **pair.batch.told).logits
    torch.testing.assert_close(found, pair.run().logits, rtol=1e-5, atol=1e-5)


@check("detaches")
@torch.no_grad()
def test_detached_model_equals_shadow_path_on_text(pair):
    """A language model without a tower, whose loss on text is the shadow's own."""
    stock = pair.model.detached()
    assert all(not type(m).__module__.startswith("umbra") for m in stock.modules())
    assert architectures.is_text_only(stock.config)
    found = pair.model(WORDS, labels=WORDS, **text_only(pair.name)).shadow_loss
    torch.testing.assert_close(found, shadow_loss(stock(WORDS).logits), rtol=1e-5, atol=1e-5)


@check()
def test_disabled_adapter_equals_base(pair):
    with pair.model.disable_adapter():
        assert torch.equal(pair.run().logits, pair.logits)
        found = pair.generate()
    base = build(pair.name)
    assert torch.equal(found, base.generate(pair.batch.ids, **pair.batch.told, **GREEDY))


@check("unloads")
@torch.no_grad()
def test_unload_restores_base(pair):
    base = pair.model.unload()
    assert torch.equal(base(pair.batch.ids, **pair.batch.told).logits, pair.logits)
    hooks = [h for m in base.modules() for d in (m._forward_hooks, m._forward_pre_hooks) for h in d.values()]
    assert not any(type(h).__module__.startswith("umbra") for h in hooks)


# -- without Umbra -------------------------------------------------------------------------------------------------

READER = """
import sys
sys.modules["umbra"] = None  # an import of it fails from here on
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids, logits = torch.tensor(eval(sys.argv[2])), {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    with torch.no_grad():
        logits[path.name] = AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits.contiguous()
save_file(logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def elsewhere(request, tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each collected family: the loss in one process that cannot import Umbra, and the shadow's own here."""
    root, expected = tmp_path_factory.mktemp("stock"), {}
    for item in request.session.items:
        if "elsewhere" in getattr(item, "fixturenames", ()) and item.module is request.module:
            name = item.callspec.params["name"]
            model = cast(build(name))
            model.detached().save_pretrained(root / name)
            with torch.no_grad():
                expected[name] = model(WORDS, labels=WORDS, **text_only(name)).shadow_loss
    out = root.parent / "vision.safetensors"
    subprocess.run([sys.executable, "-c", READER, str(root), str(WORDS.tolist()), str(out)], check=True)
    return {name: (shadow_loss(logits), expected[name]) for name, logits in load_file(out).items()}


@pytest.mark.architecture("without Umbra")
@pytest.mark.parametrize("name", FAMILIES)
def test_detached_model_loads_without_umbra(name, elsewhere):
    torch.testing.assert_close(*elsewhere[name], rtol=1e-5, atol=1e-5)


# -- further -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_channel_scale_can_be_measured(name):
    model = umbra.attach(build(name), umbra.ShadowConfig(rank=4, input_scale="measured"))
    for injection in model.shadow.couplings.injections.values():
        assert torch.isfinite(injection.channels).all() and float(injection.channels.std()) > 0


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal_plain(name, reentrant):
    """Loss and gradients are those without it."""
    model, batch = cast(build(name)).train(), batch_of(name)
    plain = model(batch.ids, labels=batch.ids, **batch.told).loss
    plain.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    loss = model(batch.ids, labels=batch.ids, **batch.told).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
@torch.no_grad()
def test_chunked_logits_equal_full_forward(name):
    """The image first, then words, in a cache that the user holds."""
    model, batch = cast(build(name), shadow_num_hidden_layers=2), batch_of(name)
    cache, first = DynamicCache(config=model.config), batch.ids.shape[1] - 3
    whole = model(batch.ids, use_cache=False, **batch.told).logits
    told = {k: v[:, :first] if v.shape == batch.ids.shape else v for k, v in batch.told.items()}
    model(batch.ids[:, :first], past_key_values=cache, use_cache=True, **told)
    rest = model(batch.ids[:, first:], past_key_values=cache, use_cache=True).logits
    assert len(cache.layers) == 5
    torch.testing.assert_close(rest, whole[:, first:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava"])
@torch.no_grad()
def test_mixed_batch_equals_each_row_with_its_adapter(name):
    model, batch = cast(build(name)), batch_of(name)
    model.add_adapter(umbra.ShadowConfig(rank=4, alpha=0.5, shadow="dense"), "second")
    scramble(model.adapter("second"), 5)
    rows = []
    for row, adapter in enumerate(["default", "second"]):
        model.set_adapter(adapter)
        rows.append(model(batch.ids, **batch.told).logits[row])
    mixed = model(batch.ids, **batch.told, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(mixed, torch.stack(rows), rtol=1e-4, atol=1e-4)
    assert (rows[0] - rows[1]).abs().max() > 1e-2


def test_unknown_argument_is_refused():
    model, batch = cast(build("llava")), batch_of("llava")
    with pytest.raises(ValueError, match="pixel_valves"):
        model.generate(batch.ids, pixel_valves=batch.told["pixel_values"], max_new_tokens=1)


def test_own_embeddings_are_refused_for_images():
    with pytest.raises(umbra.BaseModelError, match="embeddings='base'"):
        umbra.attach(build("llava"), umbra.ShadowConfig(embeddings="own"))


def test_trainer_keeps_image_columns(tmp_path):
    """Their columns are arguments of the base, not of the model around it."""
    model, batch, seen = cast(build("qwen2_vl")), batch_of("qwen2_vl"), []
    row = {"input_ids": batch.ids[0], "labels": batch.ids[0], "comment": 1}
    images = {k: v for k, v in batch.told.items() if k != "attention_mask"}
    assert "pixel_values" in images

    def collate(rows):
        assert "comment" not in rows[0]
        told = {k: v for k, v in batch.told.items() if k in rows[0]}
        return {"input_ids": batch.ids, "labels": batch.ids, **told}

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=1,
    )
    trainer = umbra.ShadowTrainer(model=model, args=arguments, train_dataset=[{**row, **images}], data_collator=collate)
    model.base.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    assert images.keys() <= seen[-1].keys()
