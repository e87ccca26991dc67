"""Tokens that the base does not have: their rows are trained with the shadow, and carried by the adapter alone."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import umbra
from support.folders import CONFIG, WEIGHTS
from support.tiny import VOCAB, gradients, make, make_base, scramble, tokens
from support.tokenizer import make_tokenizer
from umbra.adapters.prompting import open_formatter
from umbra.base.architectures import locate
from umbra.cli import main
from umbra.deploy.convert import convert
from umbra.deploy.detach import write_detached

NEW = 2
BASES = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma": ("gemma3_text", {}),
    "gpt2": ("gpt2", {}),
    "moe": ("qwen3_moe", {}),
}
SHADOWS = {
    "base": {},
    "own": {"embeddings": "own"},
    "heads": {"train_heads": True},
    "own heads": {"embeddings": "own", "train_heads": True},
    "alone": {"auxiliary_loss_weight": 1.0, "distillation_weight": 0.5},
}
CASES = [(base, "base") for base in BASES] + [("untied", shadow) for shadow in SHADOWS if shadow != "base"]


def with_tokens(seed: int = 5) -> torch.Tensor:
    """(2, 12) token ids, the added ones among them."""
    ids = tokens(2, 12, seed=seed)
    ids[:, 3], ids[:, 7], ids[0, 9] = VOCAB, VOCAB + 1, VOCAB
    return ids


def resized(base: str = "untied", shadow: str = "base", **fields):
    name, options = BASES[base]
    model = make(name, base_options=options, **{**SHADOWS[shadow], **fields})
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCAB + NEW)
    return model


def trained(model, steps: int = 3):
    """After some steps of AdamW on sequences with the added tokens."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    model.train()
    for step in range(steps):
        ids = with_tokens(step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "shadow"), CASES)
def test_added_tokens_are_trained_saved_and_loaded_elsewhere(base, shadow, tmp_path):
    model, ids = resized(base, shadow), with_tokens()
    first = {n: p.detach().clone() for n, p in model.shadow.added_tokens.named_parameters()}
    own = [p.detach().clone()[:VOCAB] for p in (locate(model.base).embeddings.weight, locate(model.base).head.weight)]
    trained(model)
    for name, rows in model.shadow.added_tokens.named_parameters():
        moved = (rows - first[name]).flatten(1).norm(dim=-1) > 0
        assert bool(moved.all()) == rows.requires_grad, name
    assert model.shadow.added_tokens.embeddings.requires_grad
    model.save_pretrained(tmp_path / "a")
    name, options = BASES[base]
    found = umbra.load(tmp_path / "a", make_base(name, **options))
    with torch.no_grad():
        expected = model(ids).logits
        assert expected.shape[-1] == VOCAB + NEW
        assert torch.equal(found(ids).logits, expected)
        with model.shadow_only(), found.shadow_only():
            alone = model(ids).logits
            assert torch.equal(found(ids).logits, alone)
        torch.testing.assert_close(found.detached()(ids).logits, alone, rtol=1e-4, atol=1e-4)
        write_detached(found, tmp_path / "edge")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "edge")
        torch.testing.assert_close(stock(ids).logits, alone, rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, **options)
        assert torch.equal(found.generate(ids, **options), expected)
        assert torch.equal(found.generate(ids, **options, draft=3, assistant_confidence_threshold=0.0), expected)
    assert all(torch.equal(a, p.detach()[:VOCAB]) for a, p in zip(own, rows_of(model.base), strict=True))


def rows_of(base) -> list[torch.Tensor]:
    return [locate(base).embeddings.weight, locate(base).head.weight]


@pytest.mark.parametrize("base", BASES)
def test_added_row_gradients_equal_base_row_gradients(base):
    """Beside a base whose tables are trained as a whole, of which no other row has one here."""
    model, ids = resized(base), with_tokens()
    model.train()(ids, labels=ids).loss.backward()
    found = {k: v for k, v in gradients(model).items() if "added_tokens" in k}
    assert not any(p.grad is not None for p in model.base.parameters())
    other = resized(base)
    other.shadow.added_tokens.requires_grad_(False)
    tables = {"embeddings": locate(other.base).embeddings.weight}
    if not locate(other.base).is_tied:
        tables["head"] = locate(other.base).head.weight
    for table in tables.values():
        table.requires_grad_()
    other.train()(ids, labels=ids, skip_logits=False).loss.backward()
    assert found.keys() == {f"shadow.added_tokens.{name}" for name in tables}
    for name, table in tables.items():
        torch.testing.assert_close(found[f"shadow.added_tokens.{name}"], table.grad[VOCAB:], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_classifier_reads_added_tokens(tmp_path):
    model = make(classifier=True, base_options={"num_labels": 3})
    model.resize_token_embeddings(VOCAB + NEW)
    ids, labels = with_tokens(), torch.tensor([0, 2])
    with torch.enable_grad():
        model.train()(ids, labels=labels).loss.backward()
    found = gradients(model)["shadow.added_tokens.embeddings"]
    assert (found.norm(dim=-1) > 0).all()
    model.eval().shadow.added_tokens.embeddings.sub_(found)
    model.save_pretrained(tmp_path / "a")
    again = umbra.load(tmp_path / "a", make_base(classifier=True, num_labels=3))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_trainer_saves_resumes_and_loads_added_tokens(tmp_path):
    ids = [{"input_ids": r.tolist(), "labels": r.tolist()} for s in range(4) for r in with_tokens(s)]
    options = {
        "output_dir": str(tmp_path), "max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True,
        "learning_rate": 0.05, "lr_scheduler_type": "constant",
    }  # fmt: skip
    model = resized()
    umbra.ShadowTrainer(model, TrainingArguments(**options), train_dataset=ids).train()
    again = resized()
    umbra.ShadowTrainer(again, TrainingArguments(**options), train_dataset=ids).train(str(tmp_path / "checkpoint-2"))
    assert model.shadow.added_tokens.equals(again.shadow.added_tokens)
    assert not model.shadow.added_tokens.equals(resized().shadow.added_tokens)
    found = umbra.load(tmp_path / "checkpoint-4", make_base())
    assert found.shadow.added_tokens.equals(model.shadow.added_tokens)


def test_transformers_trainer_trains_added_tokens(tmp_path):
    ids = [{"input_ids": r.tolist(), "labels": r.tolist()} for r in with_tokens()]
    model = resized()
    before = copy.deepcopy(model.shadow.added_tokens)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=ids, processing_class=make_tokenizer()).train()
    assert not before.equals(model.shadow.added_tokens)
    assert umbra.load(tmp_path / "checkpoint-1", make_base()).shadow.added_tokens.equals(model.shadow.added_tokens)


def test_states_leaving_head_rows_untrained_are_refused():
    model = resized(auxiliary_loss_weight=0.0).train()
    with pytest.raises(umbra.StateError, match="added tokens"):
        model.base_model(with_tokens())
    model.shadow.added_tokens.requires_grad_(False)
    model.base_model(with_tokens())


def test_frozen_adapter_freezes_added_rows(tmp_path):
    trained(resized()).save_pretrained(tmp_path / "a")
    assert not any(p.requires_grad for p in umbra.load(tmp_path / "a", make_base()).parameters())
    found = umbra.load(tmp_path / "a", make_base(), trainable=True)
    assert found.shadow.added_tokens.is_trained
    trained(found)
    found.save_pretrained(tmp_path / "b")
    assert umbra.load(tmp_path / "b", make_base()).shadow.added_tokens.equals(found.shadow.added_tokens)


# -- bases that have such rows already ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["untied", "tied"])
@torch.no_grad()
def test_adapter_rows_replace_base_rows_on_load(base, tmp_path):
    model = resized(base)
    scramble(model.shadow, 3)
    model.save_pretrained(tmp_path / "a")
    name, options = BASES[base]
    other = make_base(name, **options)
    torch.manual_seed(9)
    other.resize_token_embeddings(VOCAB + NEW, mean_resizing=False)
    before = copy.deepcopy(other.state_dict())
    found = umbra.load(tmp_path / "a", other)
    assert torch.equal(found(with_tokens()).logits, model(with_tokens()).logits)
    found.save_pretrained(tmp_path / "b")
    assert umbra.load(tmp_path / "b", make_base(name, **options)).base_fingerprint == model.base_fingerprint
    after = found.unload().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_unload_removes_added_rows(base, tmp_path):
    name, options = BASES[base]
    model = resized(base)
    scramble(model.shadow, 3)
    model.save_pretrained(tmp_path / "a")
    expected = make_base(name, **options)
    for one in (model, umbra.load(tmp_path / "a", make_base(name, **options))):
        one(with_tokens())
        plain = one.unload()
        state = plain.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in expected.state_dict().items())
        assert plain.config.vocab_size == VOCAB and locate(plain).is_tied == locate(expected).is_tied
        assert torch.equal(plain(tokens()).logits, expected(tokens()).logits)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_base_with_another_vocabulary_size_is_refused(tmp_path):
    resized().save_pretrained(tmp_path / "a")
    other = make_base()
    other.resize_token_embeddings(VOCAB + 7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(umbra.BaseModelError, match="vocab_size"):
        umbra.load(tmp_path / "a", other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@torch.no_grad()
def test_second_resize_of_resized_base_is_refused(tmp_path):
    """Case 52: the rows are the base's, which has to be the same one."""

    def base(seed):
        plain = make_base()
        torch.manual_seed(seed)
        plain.resize_token_embeddings(VOCAB + NEW, mean_resizing=False)
        return plain

    model = umbra.attach(base(0), umbra.ShadowConfig(rank=4))
    scramble(model.shadow)
    model.save_pretrained(tmp_path / "a")
    umbra.load(tmp_path / "a", base(0)).unload()
    for other in (base(1), make_base()):
        with pytest.raises(umbra.BaseModelError):
            umbra.load(tmp_path / "a", other)


@pytest.mark.parametrize("change", ["lacks", "misshapen", "more"])
def test_damaged_rows_are_refused_and_base_is_unchanged(change, tmp_path):
    from safetensors.torch import save_file

    resized().save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / WEIGHTS)
    name = "shadow.added_tokens.head"
    if change == "lacks":
        del weights[name]
    elif change == "misshapen":
        weights[name] = weights[name][:, :5].contiguous()
    else:
        weights["shadow.added_tokens.more"] = weights[name].clone()
    save_file(weights, tmp_path / "a" / WEIGHTS)
    base = make_base()
    with pytest.raises(umbra.CheckpointError):
        umbra.load(tmp_path / "a", base)
    assert base.config.vocab_size == VOCAB == len(base.get_input_embeddings().weight)


def test_digest_covers_added_rows(tmp_path):
    from safetensors.torch import save_file

    resized().save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / WEIGHTS)
    weights["shadow.added_tokens.head"] += 1
    save_file(weights, tmp_path / "a" / WEIGHTS)
    with pytest.raises(umbra.CheckpointError, match="sha256"):
        umbra.load(tmp_path / "a", make_base())


# -- several adapters --------------------------------------------------------------------------------------------------


def test_adapters_on_one_base_share_added_rows(tmp_path):
    trained(resized()).save_pretrained(tmp_path / "a")
    other = resized()
    trained(other, 1)
    other.save_pretrained(tmp_path / "b")
    make().save_pretrained(tmp_path / "plain")
    model, ids = umbra.load(tmp_path / "a", make_base()), with_tokens()
    expected = model(ids).logits
    for name in ("b", "plain"):
        with pytest.raises(umbra.BaseModelError, match=r"'default'|vocab_size"):
            model.load_adapter(tmp_path / name, name)
    model.load_adapter(tmp_path / "a", "again")
    assert torch.equal(model(ids, adapter_names=["again", "again"]).logits, expected)
    plain = make()
    with pytest.raises(umbra.BaseModelError, match=r"umbra\.load"):
        plain.load_adapter(tmp_path / "a", "a")
    assert plain.adapters == ["default"] and plain.config.vocab_size == VOCAB
    alone = umbra.load(tmp_path / "a", make_base())
    alone.load_adapter(tmp_path / "b", "default", replace=True)
    assert torch.equal(alone(ids).logits, umbra.load(tmp_path / "b", make_base())(ids).logits)


def test_shared_added_rows_are_frozen_and_saved_with_each_adapter(tmp_path):
    model = trained(resized())
    model.add_adapter(umbra.ShadowConfig(rank=2), "second")
    scramble(model.adapter("second"), 8)
    model.set_adapter("second")
    assert not model.shadow.added_tokens.is_trained
    before = copy.deepcopy(model.shadow.added_tokens)
    trained(model)
    assert before.equals(model.shadow.added_tokens)
    model.save_pretrained(tmp_path / "second")
    ids = with_tokens()
    assert torch.equal(umbra.load(tmp_path / "second", make_base())(ids).logits, model(ids).logits)


# -- more and fewer ----------------------------------------------------------------------------------------------------


def test_trained_rows_survive_second_resize():
    model = trained(resized())
    rows = {n: p.detach().clone() for n, p in model.shadow.added_tokens.named_parameters()}
    model.resize_token_embeddings(VOCAB + 5)
    assert all(torch.equal(p[:NEW], rows[n]) for n, p in model.shadow.added_tokens.named_parameters())
    assert len(model.shadow.added_tokens.embeddings) == 5 and model.shadow.added_tokens.is_trained
    model.resize_token_embeddings(VOCAB)
    assert model.shadow.added_tokens is None
    assert torch.equal(model(tokens()).logits[..., :VOCAB], model(tokens()).logits)


@torch.no_grad()
def test_unload_restores_original_rows_after_resize(tmp_path):
    resized().save_pretrained(tmp_path / "a")
    other = make_base()
    other.resize_token_embeddings(VOCAB + NEW, mean_resizing=False)
    before = copy.deepcopy(other.state_dict())
    model = umbra.load(tmp_path / "a", other)
    model.resize_token_embeddings(VOCAB + 5)
    after = model.unload().state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


# -- other embeddings and heads ----------------------------------------------------------------------------------------


def another(part: str, before: torch.nn.Module, rows: int) -> torch.nn.Module:
    """A table or head like ``before`` with random rows from ``rows`` on."""
    module = copy.deepcopy(before)
    module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    module.weight.data[rows:].normal_()
    return module


@pytest.mark.parametrize("way", ["set", "assigned"])
@pytest.mark.parametrize("part", ["embeddings", "head"])
def test_added_rows_move_to_replaced_embeddings_and_heads(part, way, tmp_path):
    model, ids = trained(resized()), with_tokens()
    expected, known = model(ids).logits, model.base_fingerprint
    before = locate(model.base).embeddings if part == "embeddings" else locate(model.base).head
    after = another(part, before, VOCAB)
    if way == "assigned":
        setattr(*((model.base.model, "embed_tokens") if part == "embeddings" else (model.base, "lm_head")), after)
    else:
        (model.set_input_embeddings if part == "embeddings" else model.set_output_embeddings)(after)
    assert torch.equal(model(ids).logits, expected) and model.base_fingerprint == known
    assert not before._forward_hooks.keys() & after._forward_hooks.keys() or not before._forward_pre_hooks
    model.train()(ids, labels=ids).loss.backward()
    assert {"shadow.added_tokens.embeddings", "shadow.added_tokens.head"} < gradients(model).keys()
    model.eval().save_pretrained(tmp_path / "a")
    assert torch.equal(umbra.load(tmp_path / "a", make_base())(ids).logits, expected)
    plain = model.unload()
    assert plain.config.vocab_size == VOCAB and not after._forward_hooks and not after._forward_pre_hooks


def test_tied_table_is_not_replaced_alone():
    model = trained(resized("tied"))
    before = model.get_input_embeddings()
    with pytest.raises(umbra.BaseModelError, match="tied"):
        model.set_input_embeddings(another("embeddings", before, VOCAB))
    assert model.get_input_embeddings() is before
    model.base.model.embed_tokens = another("embeddings", before, VOCAB)
    with pytest.raises(umbra.BaseModelError, match="tied"):
        model(with_tokens())


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_fingerprint_uses_current_embeddings_and_head(base, tmp_path):
    name, options = BASES[base]
    model = make(name, base_options=options)
    known = model.base_fingerprint
    model.base.get_input_embeddings().weight.data[5] += 1
    model.set_output_embeddings(another("head", locate(model.base).head, 0))
    model.resize_token_embeddings(VOCAB + NEW)
    assert model.base_fingerprint["weights"] != known["weights"] and model.base_fingerprint["vocab_size"] == VOCAB
    other = make(name, base_options=options)
    other.base.resize_token_embeddings(VOCAB + NEW)
    assert other.base_fingerprint["vocab_size"] == VOCAB + NEW
    other.save_pretrained(tmp_path / "a")
    with pytest.raises(umbra.BaseModelError, match="vocab_size"):
        umbra.load(tmp_path / "a", make_base(name, **options))


def test_half_precision_base_trains_added_rows_in_float32(tmp_path):
    model = make()
    model.base.bfloat16()
    model.resize_token_embeddings(VOCAB + NEW)
    trained(model).save_pretrained(tmp_path / "a")
    assert model.shadow.added_tokens.embeddings.dtype == torch.float32
    found, ids = umbra.load(tmp_path / "a", make_base().bfloat16()), with_tokens()
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_copied_model_has_separate_added_rows():
    model, ids = trained(resized()), with_tokens()
    twin = copy.deepcopy(model)
    before = twin(ids).logits
    scramble(model.shadow.added_tokens, 4)
    assert torch.equal(twin(ids).logits, before) and not torch.equal(model(ids).logits, before)


def test_compiled_model_reads_current_rows():
    model, ids = resized(), with_tokens()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for seed in (3, 4):
            scramble(model.shadow.added_tokens, seed)
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


# -- with a tokenizer --------------------------------------------------------------------------------------------------


def test_extended_tokenizer_survives_train_detach_export(tmp_path, base_folder, capsys):
    from umbra.base.loading import load_base

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<spare{i}>" for i in range(VOCAB - len(tokenizer))] + ["<call>", "<end>"])
    model = umbra.attach(load_base(base_folder), umbra.ShadowConfig(rank=2))
    with pytest.raises(umbra.ConfigError, match=r"resize_token_embeddings\(101\)"):
        model.save_pretrained(tmp_path / "a", tokenizer=tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    ids = torch.tensor([tokenizer("a<call>b<end>c")["input_ids"]])
    assert ids.max() == VOCAB + 1
    trained(model)
    model.save_pretrained(tmp_path / "a", tokenizer=tokenizer)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base"]["vocab_size"] == VOCAB
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "added_tokens" in capsys.readouterr().out
    found = umbra.load(tmp_path / "a")
    assert open_formatter(found).tokenizer("<call>")["input_ids"] == [VOCAB]
    assert (
        main(["export", str(tmp_path / "a"), "--to", "hf", "--out", str(tmp_path / "hf"), "--max_new_tokens", "2"]) == 0
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad(), model.shadow_only():
        torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["peft", "shadow-peft"])
def test_formats_without_added_rows_are_refused(form, tmp_path):
    model = resized(dialect={"peft": "peft", "shadow-peft": "paper"}[form], alpha=0.1)
    with pytest.raises(umbra.CheckpointError, match="added"):
        convert(model, tmp_path / "a", form)
