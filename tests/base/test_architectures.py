"""Every attention-only decoder family of transformers, from a tiny random configuration, in one pass of checks.

A check that is marked ``architecture`` is a column of docs/reference/architectures.md, each of its families a line.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import umbra
from support import tables
from support.families import IDS, MASK, PADDED, PADS, build, cast
from support.tables import ELSEWHERE, FAMILIES, REFUSED
from support.tiny import CONFIGS, DIALECTS, VOCAB, gradients, scramble
from umbra.base import architectures
from umbra.method import kernels
from umbra.method.head_inputs import HeadInputs

MASK[1, :PADS] = 0
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@dataclass
class Pair:
    """A base with a shadow, and what it answered before."""

    name: str
    model: umbra.ShadowModel
    logits: torch.Tensor
    at_first: torch.Tensor
    shapes: list[torch.Size]


@pytest.fixture(scope="module")
def pair(request) -> Pair:
    base = build(request.param)
    with torch.no_grad():
        logits, states = base(IDS).logits, base(IDS, output_hidden_states=True).hidden_states
        model = umbra.attach(base, umbra.ShadowConfig(rank=4, alpha=0.5, dropout=0.0)).eval()
        with kernels.reference():
            at_first = model(IDS).logits
        assert_close(model(IDS).logits, logits)
    scramble(model.shadow)
    return Pair(request.param, model, logits, at_first, [h.shape for h in states])


def names(column: str) -> list[str]:
    return [name for name, family in FAMILIES.items() if column not in family.skip]


def check(column: str):
    """A test of every family in turn, which fills a column of the page."""
    mark = pytest.mark.parametrize("pair", names(column), indirect=True, scope="module")
    return lambda test: pytest.mark.architecture(column)(mark(test))


def shadow_path(model: umbra.ShadowModel, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V): what training's one call of the head gives for s⁰."""
    plan = HeadInputs([(None, model.shadow.heads)], flatten=True, positions=torch.arange(1))

    def use_state(s0: torch.Tensor) -> None:
        plan.extra = architectures.head_input(model.base, s0.reshape(-1, s0.shape[-1]))

    batch = {"input_ids": ids, "inputs_embeds": None, "past_key_values": None}
    if architectures.takes_cache(model.base):
        batch["use_cache"] = False
    out = model.runner.run(batch, [(model.shadow, None)], plan, use_state)
    return out["logits"][0, plan.num_rows :].view(*ids.shape, -1)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def umbra_hooks(model) -> list:
    hooks = [h for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks) for h in d.values()]
    return [h for h in hooks if type(h).__module__.startswith("umbra")]


# -- one pass over each family -------------------------------------------------------------------------------------


@check("attaches")
def test_attached_equals_base_at_initialisation(pair):
    """In the form that the page names, without the base's embedding table among the shadow's weights."""
    assert torch.equal(pair.at_first, pair.logits)
    located, backbone = architectures.locate(pair.model.base), pair.model.shadow.backbone
    mirrored = type(backbone) is type(located.decoder)
    assert ("mirror" if mirrored else "dense") == FAMILIES[pair.name].shadow
    assert VOCAB not in {size for p in pair.model.shadow.parameters() for size in p.shape}
    with torch.no_grad():
        assert (pair.model(IDS).logits - pair.logits).abs().max() > 1e-3


@check("trains")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_training_step_gives_every_trainable_weight_a_gradient(pair, dialect):
    """No dead weight: every parameter of the shadow has a gradient other than 0, none of the base has one."""
    model = pair.model if dialect == "paper" else cast(build(pair.name), dialect=dialect)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    model.eval()
    assert loss.isfinite()
    assert all(p.grad is None for p in model.base.parameters())
    assert [name for name, gradient in gradients(model).items() if not gradient.any()] == []


@check("generates")
def test_cached_generation_equals_uncached(pair):
    """Greedy, a left-padded batch."""
    cached = pair.model.generate(PADDED, attention_mask=MASK, **GREEDY)
    assert torch.equal(cached, pair.model.generate(PADDED, attention_mask=MASK, **GREEDY, use_cache=False))
    assert cached.shape[1] > IDS.shape[1]


@check("left padding")
def test_left_padded_row_equals_row_alone(pair):
    batch = pair.model.generate(PADDED, attention_mask=MASK, **GREEDY)[1, PADS:]
    alone = pair.model.generate(IDS[1:, PADS:], **GREEDY)[0]
    assert torch.equal(batch[: len(alone)], alone[: len(batch)])


@check("hidden states")
@torch.no_grad()
def test_hidden_states_have_base_shapes(pair):
    """Plain tensors, as many and as wide as without a shadow."""
    states = pair.model(IDS, output_hidden_states=True).hidden_states
    assert all(type(h) is torch.Tensor for h in states)
    assert [h.shape for h in states] == pair.shapes
    assert len(states) == len(architectures.locate(pair.model.base).blocks) + 1


@check("saves")
@torch.no_grad()
def test_loaded_adapter_equals_saved_one(pair, tmp_path):
    pair.model.save_pretrained(tmp_path / "adapter")
    loaded = umbra.load(tmp_path / "adapter", base=build(pair.name))
    torch.testing.assert_close(loaded(IDS).logits, pair.model(IDS).logits, rtol=0, atol=1e-5)


@check("detaches")
@torch.no_grad()
def test_detached_model_equals_shadow_path(pair):
    """The stock model's logits are those that the auxiliary loss is computed from, scaled and capped alike."""
    stock = pair.model.detached()
    assert all(not type(m).__module__.startswith("umbra") for m in stock.modules())
    logits = stock(IDS).logits
    assert_close(logits, shadow_path(pair.model, IDS))
    out = pair.model(IDS, labels=IDS)
    assert_close(out.shadow_loss, F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), IDS[:, 1:].reshape(-1)))
    assert_close(out.logits, pair.model(IDS).logits)


@check("unloads")
@torch.no_grad()
def test_unload_restores_base(pair):
    base = pair.model.unload()
    assert torch.equal(base(IDS).logits, pair.logits)
    assert umbra_hooks(base) == []


@pytest.mark.architecture("dense shadow")
@pytest.mark.parametrize("name", [n for n in names("dense shadow") if FAMILIES[n].shadow == "mirror"])
@torch.no_grad()
def test_dense_shadow_detaches_exactly(name):
    """Constant scaling of the logits is folded into a Llama's head; a cap needs a class that has one."""
    model = cast(build(name), shadow="dense")
    assert_close(model.detached()(IDS).logits, shadow_path(model, IDS))


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


@pytest.fixture(scope="session")
def elsewhere(request, tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each collected family: logits in one process that cannot import Umbra, and those of the shadow path here."""
    root, expected = tmp_path_factory.mktemp("stock"), {}
    for item in request.session.items:
        if item.path.name == Path(__file__).name and "elsewhere" in getattr(item, "fixturenames", ()):
            model = cast(build(item.callspec.params["name"]))
            model.detached().save_pretrained(root / item.callspec.params["name"])
            with torch.no_grad():
                expected[item.callspec.params["name"]] = shadow_path(model, IDS)
    out = root.parent / "logits.safetensors"
    subprocess.run([sys.executable, "-c", READER, str(root), str(IDS.tolist()), str(out)], check=True)
    return {name: (logits, expected[name]) for name, logits in load_file(out).items()}


@pytest.mark.architecture("without Umbra")
@pytest.mark.parametrize("name", names("without Umbra"))
def test_detached_model_loads_without_umbra(name, elsewhere):
    found, expected = elsewhere[name]
    assert_close(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_channel_scale_can_be_measured(name):
    model = umbra.attach(build(name), umbra.ShadowConfig(rank=4, input_scale="measured"))
    for injection in model.shadow.couplings.injections.values():
        assert torch.isfinite(injection.channels).all() and float(injection.channels.std()) > 0


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.shadow == "mirror"])
def test_first_block_can_be_copied(name):
    """By default, without a word where that cannot be; so which those are is held here."""
    model = umbra.attach(build(name), umbra.ShadowConfig(rank=4))
    only_the_last_has_a_bias = name == "gpt_neox_japanese"
    assert model.shadow_config.init == ("random" if only_the_last_has_a_bias else "base")


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_family_explains_why(name):
    options, reason = REFUSED[name]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    with pytest.raises(umbra.BaseModelError, match=reason):
        umbra.attach(base)
    assert umbra_hooks(base) == []


def test_every_causal_family_is_listed():
    """Those of AutoModelForCausalLM: tested, refused, or tested elsewhere."""
    known = {family.model_type or name for name, family in tables.LISTED.items()} | REFUSED.keys() | ELSEWHERE.keys()
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - known - {"umbra"} == set()
    assert not {*REFUSED, *ELSEWHERE} & tables.LISTED.keys()


@torch.no_grad()
def test_pretrained_shadow_cannot_cap_logits(tmp_path):
    """Nor can it transform its states as ModernBERT does before its head."""
    AutoModel.from_config(AutoConfig.for_model("llama", **CONFIGS["llama"])).save_pretrained(tmp_path)
    for name, problem in (("gemma2", "caps its logits"), ("modernbert-decoder", "differently before the head")):
        model = cast(build(name), shadow=str(tmp_path))
        with pytest.raises(umbra.DetachError, match=problem):
            model.detached()


# -- classifiers of the families whose head does not read the decoder's states as they are ---------------------------


@pytest.mark.parametrize(
    ("name", "width"),
    [("opt-350m", None), ("opt-350m", 16), ("minicpm3", None), ("minicpm3", 16), ("modernbert-decoder", None)],
)
def test_classifier_equals_base_at_initialisation_and_trains(name, width):
    """The shadow's own loss is that of its detached form."""
    labels = torch.tensor([0, 1])
    options = {} if width is None else {"shadow_hidden_size": width}
    model = cast(build(name, classifier=True, num_labels=2, problem_type="single_label_classification"), **options)
    model.train()(IDS, labels=labels).loss.backward()
    assert [n for n, gradient in gradients(model.eval()).items() if not gradient.any()] == []
    with torch.no_grad():
        assert_close(model(IDS, labels=labels).shadow_loss, F.cross_entropy(model.detached()(IDS).logits, labels))


def test_narrow_shadow_reads_projected_embeddings():
    """OPT-350m's blocks are wider than its table and its head: both are bridged."""
    model = cast(build("opt-350m"), shadow_hidden_size=24, shadow_num_attention_heads=2)
    with torch.no_grad():
        assert_close(model.detached()(IDS).logits, shadow_path(model, IDS))


# -- the page ------------------------------------------------------------------------------------------------------


def test_architectures_page_lists_tested_families(request):
    if request.config.getoption("--write-tables"):
        return
    page = tables.ARCHITECTURES.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)) == tables.LISTED.keys(), "run `make tables`"
    assert set(re.findall(r"^- `(.+?)`:", page, re.MULTILINE)) == REFUSED.keys(), "run `make tables`"
    assert "fails" not in page
