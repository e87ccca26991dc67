"""Every argument that transformers' own models understand has the bare base's effect, or is refused by name."""

import copy
import inspect
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers.utils import TransformersKwargs

import umbra
from support.tiny import (
    CLASSIFIERS,
    CONFIGS,
    LLAMA_LIKE,
    VOCAB,
    assert_same,
    class_labels,
    gradients,
    make,
    randomise,
    tokens,
)

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}
MORE = {
    "mixtral": {**LLAMA_LIKE, **EXPERTS},
    "olmo": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "granitemoe": {**LLAMA_LIKE, **EXPERTS},
    "olmoe": {**LLAMA_LIKE, **EXPERTS, "num_experts": 4},
}
FAMILIES = {**CONFIGS, "qwen3_moe": {**CONFIGS["qwen3_moe"], "router_aux_loss_coef": 0.3}, **MORE}
families = pytest.mark.parametrize("name", FAMILIES)
CLASSIFYING = [n for n in FAMILIES if n not in ("olmo", "olmo2", "granitemoe", "olmoe")]
IDS = tokens(2, 9)
LABELS = torch.where(torch.arange(9) % 3 == 0, -100, IDS)
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0


def build(name: str, classifier: bool = False, **options):
    """A base that returns attentions."""
    config = AutoConfig.for_model(name, **{**FAMILIES[name], **options})
    config._attn_implementation = "eager"
    return randomise(config, classifier=classifier)


def pair(name: str, classifier: bool = False, **options):
    """A base, and a shadow without an effect beside a copy of it."""
    base = build(name, classifier, **options)
    return base, umbra.attach(copy.deepcopy(base), umbra.ShadowConfig(rank=2, dropout=0.0)).eval()


def values_of(model, name: str, classifier: bool):
    """What a call is given beside the tokens, to try the argument of this name; None where it has no sense here."""
    cut = torch.tensor([0, 4, 9], dtype=torch.int32)
    labels = {"labels": class_labels("single", 2) if classifier else LABELS}
    embeds = {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(IDS).detach()}
    images = {"encoder_hidden_states": torch.randn(2, 3, 32), "encoder_attention_mask": MASK[:, :3]}
    return {
        "input_ids": {},
        "attention_mask": {"attention_mask": MASK, **labels},
        "position_ids": {"position_ids": torch.arange(9)[None] * 2, **labels},
        "past_key_values": {"past_key_values": DynamicCache(config=model.config), "use_cache": True},
        "inputs_embeds": {**embeds, **labels},
        "labels": labels,
        "use_cache": {"use_cache": False},
        "logits_to_keep": {"logits_to_keep": 3},
        "num_items_in_batch": {"num_items_in_batch": 2 if classifier else 7, **labels},
        "shift_labels": {"labels": torch.full_like(IDS, -100), "shift_labels": torch.roll(LABELS, -1, 1)},
        "ignore_index": {"labels": LABELS.clamp(min=0), "ignore_index": 0},
        "output_hidden_states": {"output_hidden_states": True, **labels},
        "output_attentions": {"output_attentions": True, **labels},
        "output_router_logits": {"output_router_logits": True, "attention_mask": MASK, **labels},
        "return_dict": {"return_dict": False, "output_hidden_states": True, **labels},
        "is_causal": {"is_causal": False},
        "seq_idx": {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)},
        "token_type_ids": {"token_type_ids": IDS % 3},
        **{n: {n: images[n]} for n in images},
        **{n: {"cu_seq_lens_q": cut, "cu_seq_lens_k": cut} for n in ("cu_seq_lens_q", "cu_seq_lens_k")},
        **{n: {"max_length_q": 5, "max_length_k": 5} for n in ("max_length_q", "max_length_k")},
    }[name]  # fmt: skip


def outcome(model, given):
    try:
        with torch.no_grad():
            return model(**{"input_ids": IDS, **given})
    except (ValueError, TypeError, NotImplementedError) as error:
        return error


def assert_same_output(found, expected):
    """Each value of the base's output is in ours, a tuple's at the same place."""
    if isinstance(expected, tuple):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        elif isinstance(value, tuple):
            for one, other in zip(found[name], value, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        else:
            assert found[name].get_seq_length() == value.get_seq_length()


@pytest.mark.parametrize(
    ("name", "classifier"), [*((n, False) for n in FAMILIES), *((n, True) for n in CLASSIFYING)],
    ids=lambda v: v if isinstance(v, str) else ("classifier" if v else "lm"),
)  # fmt: skip
def test_every_argument_acts_as_in_base_or_is_refused(name, classifier):
    base, model = pair(name, classifier, **(CLASSIFIERS["single"] if classifier else {}))
    own = {"adapter_names", "shadow_targets", "skip_logits"}
    taken = {p.name for p in inspect.signature(base.forward).parameters.values() if p.kind is not p.VAR_KEYWORD}
    ours = set(inspect.signature(model.forward).parameters) - own - {"kwargs"}
    honoured = set()
    for argument in sorted(
        taken | ours | {"return_dict", "shift_labels", "ignore_index", *TransformersKwargs.__annotations__}
    ):
        given = values_of(base, argument, classifier)
        if "past_key_values" in given:
            expected = outcome(base, given)
            found = outcome(model, {**given, "past_key_values": DynamicCache(config=model.config)})
        else:
            expected, found = outcome(base, given), outcome(model, given)
        if isinstance(found, umbra.ConfigError):
            assert argument in str(found)
        elif isinstance(expected, Exception):
            assert type(found) is type(expected), argument
        else:
            assert not isinstance(found, Exception), (argument, found)
            assert_same_output(found, expected)
            honoured.add(argument)
    assert {"attention_mask", "position_ids", "labels", "num_items_in_batch", "return_dict"} <= honoured
    assert classifier or {"shift_labels", "ignore_index"} <= honoured


# -- in training ---------------------------------------------------------------------------------------------------

TRAINED = {"dropout": 0.0, "auxiliary_loss_weight": 0.5}
forms = pytest.mark.parametrize("fast", [True, False], ids=["fused", "plain"])


def run(model, fast: bool, **given):
    """Loss, shadow's loss and every gradient."""
    with nullcontext() if fast else umbra.method.kernels.reference():
        out = model(input_ids=IDS, **given)
        out.loss.backward()
    return {"loss": out.loss.detach(), "shadow": out.shadow_loss.detach(), **gradients(model)}


@forms
@pytest.mark.parametrize("given", [{}, {"num_items_in_batch": 5}, {"skip_logits": False}], ids=str)
@pytest.mark.parametrize("distils", [0.0, 0.3], ids=["", "distilled"])
def test_shift_labels_train_both_paths(fast, given, distils):
    model = make(**TRAINED, distillation_weight=distils, train_heads=True).train()
    expected = run(model, fast, labels=LABELS, **given)
    shifted = torch.roll(LABELS, -1, 1)
    shifted[:, -1] = -100
    assert_same(run(model, fast, labels=torch.full_like(IDS, -100), shift_labels=shifted, **given), expected)


def test_shift_labels_evaluate_on_each_path():
    model, shifted = make(**TRAINED), torch.roll(LABELS, -1, 1)
    shifted[:, -1] = -100
    for context, given in (
        (model.shadow_only, {}),
        (model.attached_only, {}),
        (nullcontext, {"adapter_names": ["default", None]}),
    ):
        with context(), torch.no_grad():
            expected = model(input_ids=IDS, labels=LABELS, **given).loss
            found = model(input_ids=IDS, labels=torch.full_like(IDS, -100), shift_labels=shifted, **given).loss
        torch.testing.assert_close(found, expected)


@families
def test_training_outputs_equal_base_outputs(name):
    base, model = pair(name)
    given = {"labels": LABELS, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    given |= {"output_router_logits": True} if "moe" in name or name == "mixtral" else {}
    expected, found = base.train()(IDS, **given), model.train()(IDS, **given)
    assert found.logits is None
    task = found.loss - model.shadow_config.auxiliary_loss_weight * found.shadow_loss
    torch.testing.assert_close(task, expected.loss, rtol=1e-4, atol=1e-5)
    for kind in ("hidden_states", "attentions", "router_logits"):
        if expected.get(kind) is not None:
            assert_same_output({kind: found[kind]}, {kind: expected[kind]})


def test_router_loss_reaches_shadow():
    """Its weight times the load-balancing loss, by finite differences of the bare base's own formula."""
    found = {}
    for asked in (True, False):
        model = make("qwen3_moe", **TRAINED).train()
        out = model(IDS, labels=LABELS, output_router_logits=asked)
        out.loss.backward()
        found[asked] = gradients(model)
        weighted = out.loss.detach()
        found[asked, "loss"] = weighted
    model = make("qwen3_moe", **TRAINED).train()
    aux = model(IDS, labels=LABELS, output_router_logits=True).aux_loss
    aux.backward()
    coefficient = model.base.router_aux_loss_coef
    expected = {
        n: g + coefficient * a for (n, g), a in zip(found[False].items(), gradients(model).values(), strict=True)
    }
    assert_same(found[True], expected)
    torch.testing.assert_close(found[True, "loss"], found[False, "loss"] + coefficient * aux.detach())


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize(
    ("typo", "near"), [("atention_mask", "attention_mask"), ("label", "labels"), ("position_id", "position_ids")]
)
def test_unknown_argument_suggests_nearest(classifier, typo, near):
    model = make(classifier=classifier)
    for context in (nullcontext, model.disable_adapter, model.shadow_only):
        with context(), pytest.raises(umbra.ConfigError, match=f"'{typo}'.*'{near}'"):
            model(input_ids=IDS, **{typo: IDS})
    if not classifier:
        with pytest.raises(umbra.ConfigError, match=f"'{typo}'"):
            model.base_model(input_ids=IDS, **{typo: IDS})


@forms
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_any_integer_label_dtype_is_accepted(fast, trains, dtype):
    model = make(**TRAINED).train(trains)
    classifier = make(classifier=True, base_options=CLASSIFIERS["single"]).train(trains)
    with nullcontext() if fast else umbra.method.kernels.reference():
        torch.testing.assert_close(model(IDS, labels=LABELS.to(dtype)).loss, model(IDS, labels=LABELS).loss)
        classes = torch.tensor([2, 1])
        torch.testing.assert_close(classifier(IDS, labels=classes.to(dtype)).loss, classifier(IDS, labels=classes).loss)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS, labels=LABELS.to(dtype)).loss, model(IDS, labels=LABELS).loss)


WRONG = {
    "float": (LABELS.float(), "integers"),
    "bool": (LABELS > 0, "integers"),
    "too large": (LABELS.clamp(min=VOCAB), f"0 to {VOCAB - 1}.* got {VOCAB}"),
    "negative": (torch.where(LABELS == -100, -7, LABELS), "got -7"),
    "shorter": (LABELS[:, :-1], "shape"),
    "flat": (LABELS.flatten(), "shape"),
}


@pytest.mark.parametrize("form", WRONG)
@pytest.mark.parametrize("trains", [True, False])
def test_wrong_labels_are_refused_with_their_value(form, trains):
    labels, message = WRONG[form]
    model = make(**TRAINED).train(trains)
    with pytest.raises(umbra.ConfigError, match=message):
        model(IDS, labels=labels)
    with pytest.raises(umbra.ConfigError, match=message):
        model(IDS, labels=LABELS, shift_labels=labels)


def test_labels_with_shift_labels_are_refused():
    model = make(**TRAINED)
    for context in (nullcontext, model.shadow_only):
        with context(), pytest.raises(umbra.ConfigError, match="shift_labels"):
            model(IDS, labels=LABELS, shadow_targets=LABELS, shift_labels=LABELS)


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([0.0, 1.0]), torch.tensor([-1, 0])])
def test_invalid_classes_are_refused(labels):
    model = make(classifier=True, base_options=CLASSIFIERS["single"])
    for trains in (True, False):
        with pytest.raises(umbra.ConfigError, match="labels must"):
            model.train(trains)(IDS, labels=labels)


def test_configuration_output_flags_are_honoured():
    base, model = pair("qwen3_moe")
    for one in (base, model):
        one.config.output_hidden_states = one.config.output_router_logits = True
    assert_same_output(model(IDS, labels=LABELS), base(IDS, labels=LABELS))
    model.config.return_dict = False
    assert_same_output(model(IDS, labels=LABELS), base(IDS, labels=LABELS, return_dict=False))
