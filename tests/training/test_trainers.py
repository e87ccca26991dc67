"""Who trains, and what: transformers' Trainer with and without label smoothing, a plain loop, pipelines.

The shadow's own loss is recomputed from the detached model, a stock transformers model.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments, pipeline

import umbra
from support.tiny import (
    CLASSIFIERS,
    assert_same,
    auxiliary,
    class_labels,
    detached_gradients,
    gradients,
    make,
    shadow_logits,
    step_gradients,
    tokens,
)
from support.tokenizer import make_tokenizer

LAMBDA = 0.5


def examples(n: int = 8) -> list[dict]:
    """Sequences of one length, of which each carries another number of labels."""
    ids = tokens(n, 9)
    return [{"input_ids": row, "labels": torch.where(torch.arange(9) > i % 5, row, -100)} for i, row in enumerate(ids)]


def batch_of(data) -> dict[str, torch.Tensor]:
    return {k: torch.stack([e[k] for e in data]) for k in data[0]}


def trainer_of(kind, tmp_path, model, data, steps: int, **options):
    """One optimizer step on all of ``data``, in so many micro-batches."""
    extra = {k: options.pop(k) for k in ("compute_loss_func",) if k in options}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=len(data) // steps, gradient_accumulation_steps=steps, use_cpu=True,
        num_train_epochs=1, max_grad_norm=0.0, report_to="none", disable_tqdm=True, save_strategy="no", optim="sgd",
        logging_steps=1, **options,
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=data, eval_dataset=data, **extra)


def chosen(logits, labels):
    """(N, V) log-probabilities where the next token is labelled, and (N,) of those tokens."""
    wanted = labels[:, 1:] != -100
    logps = F.log_softmax(logits[:, :-1][wanted], -1)
    return logps, logps.gather(-1, labels[:, 1:][wanted][:, None])[:, 0]


def cross_entropy(logits, labels):
    return -chosen(logits, labels)[1].mean()


def smoothed(logits, labels):
    logps, right = chosen(logits, labels)
    return -(0.9 * right + 0.1 * logps.mean(-1)).mean()


def squares(outputs, labels, num_items_in_batch=None):
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    right = chosen(logits, labels)[1]
    return (right**2).sum() / (len(right) if num_items_in_batch is None else num_items_in_batch)


class OwnLoss(Trainer):
    """A user's trainer that asks the model for its loss and for its logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = out.loss + 0.1 * squares(out, inputs["labels"], num_items_in_batch)
        return (loss, out) if return_outputs else loss


def mixed(logits, labels):
    return cross_entropy(logits, labels) + 0.1 * squares(logits, labels)


ways = {
    "Trainer": (Trainer, {}, cross_entropy),
    "ShadowTrainer": (umbra.ShadowTrainer, {}, cross_entropy),
    "label smoothing": (umbra.ShadowTrainer, {"label_smoothing_factor": 0.1}, smoothed),
    "own loss function": (umbra.with_shadow_loss(Trainer), {"compute_loss_func": squares}, squares),
    "own compute_loss": (umbra.with_shadow_loss(OwnLoss), {}, mixed),
}


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.compat("Trainers", "transformers Trainer, `with_shadow_loss`", "label smoothing, own loss function")
def test_trainer_applies_configured_lambda(tmp_path, way, steps):
    """All gradients of a step equal those of L(attached) + λ · L(detached), each term written out by hand."""
    kind, options, loss_of = ways[way]
    found, batch = {}, batch_of(examples())
    for weight in (LAMBDA, 0.0):
        model = make("llama", auxiliary_loss_weight=weight)
        found[weight] = step_gradients(trainer_of(kind, tmp_path, model, examples(), steps, **options))
    expected = detached_gradients(model, lambda edge: loss_of(edge(batch["input_ids"]).logits, batch["labels"]))
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=2e-3)
    loss_of(model.eval()(batch["input_ids"]).logits, batch["labels"]).backward()
    assert_same(found[0.0], gradients(model))


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.compat("Trainers", "a plain PyTorch loop", "`num_items_in_batch` where gradients accumulate")
def test_plain_loop_applies_configured_lambda(steps):
    data, found = examples(), {}
    items = int((batch_of(data)["labels"][:, 1:] != -100).sum())
    for weight in (LAMBDA, 0.0):
        model = make("llama", auxiliary_loss_weight=weight).train()
        for start in range(0, 8, 8 // steps):
            model(**batch_of(data[start : start + 8 // steps]), num_items_in_batch=items).loss.backward()
        found[weight] = gradients(model)
    batch = batch_of(data)
    expected = detached_gradients(model, lambda edge: cross_entropy(edge(batch["input_ids"]).logits, batch["labels"]))
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=2e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_classifier_label_smoothing_reaches_both_heads(tmp_path, steps):
    """Both heads learn from the smoothed labels."""
    ids, labels = tokens(8, 9), class_labels("single", 8)
    data = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]
    found = {}
    for weight in (LAMBDA, 0.0):
        model = make("llama", classifier=True, base_options=CLASSIFIERS["single"], auxiliary_loss_weight=weight)
        trainer = trainer_of(umbra.ShadowTrainer, tmp_path, model, data, steps, label_smoothing_factor=0.1)
        if weight == 0:  # nothing trains the shadow's head
            model.shadow.heads["shadow"].requires_grad_(False)
        found[weight] = step_gradients(trainer)
    head = found[LAMBDA].pop("shadow.heads.shadow.weight")

    def loss_of(edge):
        return F.cross_entropy(edge(ids).logits, labels, label_smoothing=0.1)

    expected = detached_gradients(model, loss_of)
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=2e-3)
    edge = model.detached()
    loss_of(edge).backward()
    torch.testing.assert_close(head, LAMBDA * edge.score.weight.grad, rtol=1e-3, atol=1e-6)


def test_smoothed_losses_are_logged_for_both_paths(tmp_path):
    model = make("llama", auxiliary_loss_weight=LAMBDA)
    trainer = trainer_of(
        umbra.ShadowTrainer, tmp_path, model, examples(), 2, label_smoothing_factor=0.1, learning_rate=0.0,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    metrics, batch = trainer.evaluate(), batch_of(examples())
    with torch.no_grad():
        task = float(smoothed(model.eval()(batch["input_ids"]).logits, batch["labels"]))
        shadow = float(smoothed(model.detached()(batch["input_ids"]).logits, batch["labels"]))
    assert metrics["eval_loss"] == pytest.approx(task, rel=1e-4)
    assert metrics["eval_shadow_loss"] == pytest.approx(shadow, rel=1e-4)
    logged = trainer.state.log_history[0]
    assert logged["shadow_loss"] == pytest.approx(shadow, rel=1e-4)
    assert logged["loss"] == pytest.approx(task + LAMBDA * shadow, rel=1e-4)


# -- the trap: a loss computed elsewhere --------------------------------------------------------------------------------


def test_loss_from_logits_warns_about_missing_shadow_loss(tmp_path):
    model, ids = make("llama", auxiliary_loss_weight=LAMBDA), tokens()
    model.train()
    with pytest.warns(
        UserWarning, match=r"shadow's own .*auxiliary_loss_weight=0\.5.* out\. .*umbra\.with_shadow_loss"
    ):
        model(ids)
    with pytest.warns(UserWarning, match=r"umbra\.with_shadow_loss"):
        trainer_of(Trainer, tmp_path, model, examples(), 1, label_smoothing_factor=0.1).train()
    classifier = make("llama", classifier=True, base_options=CLASSIFIERS["single"]).train()
    with pytest.warns(UserWarning, match=r"umbra\.with_shadow_loss"):
        classifier(ids)


def test_complete_loss_gives_no_warning():
    model, ids = make("llama", auxiliary_loss_weight=LAMBDA), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(ids)
        model.train()(ids, labels=ids)
        with torch.no_grad():
            model(ids)
            model.generate(ids, max_new_tokens=2, do_sample=False)
        with model.disable_adapter(), torch.enable_grad():
            model(ids)
        with model.attached_only():
            model(ids)
        make("llama", auxiliary_loss_weight=0.0).train()(ids)


# -- one path alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("train_heads", [False, True])
def test_shadow_only_equals_detached_model(name, train_heads):
    model, ids = make(name, train_heads=train_heads), tokens()
    edge = model.detached()
    with torch.no_grad(), model.shadow_only():
        out = model(ids, labels=ids)
        hidden = model.base_model(ids).last_hidden_state
        by_hand = model.get_output_embeddings()(hidden)
    expected = edge(ids, labels=ids)
    for logits in (out.logits, by_hand, shadow_logits(model, ids)):
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-4)
    with model.attached_only(), torch.no_grad():
        attached = model(ids, labels=ids)
        by_hand = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
    torch.testing.assert_close(attached.logits, model(ids).logits)
    torch.testing.assert_close(by_hand, attached.logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter(), torch.no_grad():
        bare = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        torch.testing.assert_close(bare, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_shadow_only_logits_are_capped():
    """The head runs within the base's own forward, whatever that does to logits."""
    model = make("gemma3_text", base_options={"final_logit_softcapping": 2.0})
    with torch.no_grad(), model.shadow_only():
        logits = model(tokens()).logits
    assert 1.9 < float(logits.abs().max()) <= 2
    torch.testing.assert_close(logits, model.detached()(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_shadow_only_skips_base_and_its_cache():
    model, ids = make("llama"), tokens()
    cache = model(ids, use_cache=True).past_key_values
    with model.shadow_only():
        with pytest.raises(umbra.StateError, match=r"use detached\(\)"):
            model(ids, past_key_values=cache)
        with pytest.raises(umbra.StateError, match="outside the forward"):
            model.base(ids)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_generation_in_training_equals_evaluation(name):
    """As GRPO samples: in training mode, with a cache, which a forward for training has none of."""
    model, ids = make(name), tokens(2, 5)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.train()
    lengths = []
    model.shadow.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert lengths == [5, *[1] * 7]
    assert model.training
    assert model(ids, labels=ids).past_key_values is None


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.compat("Trainers", "transformers `pipeline`", "text-generation, text-classification")
def test_pipelines_run(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer, model = make_tokenizer(), make("llama")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = generate("say a", max_new_tokens=5, do_sample=False, return_full_text=False)
    ids = tokenizer("say a", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)

    classifier = make("llama", classifier=True, base_options={"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}})
    classify = pipeline("text-classification", model=classifier, tokenizer=tokenizer, top_k=None)
    found = {f["label"]: f["score"] for f in classify(["say a"])[0]}
    with torch.no_grad():
        scores = classifier(ids).logits.softmax(-1)[0]
    assert found == pytest.approx(dict(zip("abc", scores.tolist(), strict=True)), abs=1e-5)
    assert "is not supported" not in caplog.text


@pytest.mark.parametrize("kind", [Trainer, umbra.ShadowTrainer])
@pytest.mark.parametrize("alone", [False, True])
def test_packed_rows_are_evaluated_separately(tmp_path, kind, alone):
    """Without a mask, positions tell where a sequence begins; a cache would let each see those before it."""
    model, parts = make().eval(), [tokens(1, 5, seed=1)[0], tokens(1, 7, seed=2)[0]]
    sums, count = 0.0, 0
    with model.shadow_only() if alone else nullcontext(), torch.no_grad():
        for ids in parts:
            sums += float(cross_entropy(model(ids[None]).logits, ids[None])) * (len(ids) - 1)
            count += len(ids) - 1
    ids = torch.cat(parts)
    labels = ids.clone()
    labels[[0, 5]] = -100
    row = {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(len(p)) for p in parts])}
    trainer = trainer_of(kind, tmp_path, model, [row], 1)
    with model.shadow_only() if alone else nullcontext():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(sums / count, rel=1e-5)


@pytest.mark.parametrize("classifier", [False, True])
def test_shadow_loss_is_separate_tensor(classifier):
    """Trainer multiplies the loss by the number of ranks in place."""
    model, ids = make(classifier=classifier), tokens()
    with model.shadow_only():
        out = model(ids, labels=torch.tensor([0, 1]) if classifier else ids)
    before = float(out.shadow_loss)
    with torch.no_grad():
        out.loss *= 3
    assert float(out.shadow_loss) == before and float(out.loss) == pytest.approx(3 * before)


@pytest.mark.parametrize("before", [None, 5])
def test_classifier_pools_before_trainer_padding(before):
    """As transformers' and TRL's trainers do it: on the model's configuration."""
    ids = tokens(2)
    ids[1, 6:] = 7
    found = []
    for pad in (before, 7):
        model = make(classifier=True, base_options={"num_labels": 3, "pad_token_id": pad})
        model.config.get_text_config().pad_token_id = 7
        with torch.no_grad():
            out = model(input_ids=ids, labels=torch.tensor([0, 2]))
            with model.shadow_only():
                alone = model(input_ids=ids).logits
            with model.disable_adapter():
                bare = model(input_ids=ids).logits
        found.append((out.logits, out.shadow_loss, alone, bare))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dialect", ["paper", "peft"])
@pytest.mark.parametrize("fast", [True, False])
def test_dropout_disabled_in_modules_is_off(dialect, fast):
    """TRL's trainers set p = 0, and keep the model in training."""
    model, ids = make(dialect=dialect, dropout=0.4).train(), tokens(3, 11)
    with nullcontext() if fast else umbra.method.kernels.reference():
        one, other = (model(input_ids=ids).logits for _ in range(2))
        assert not torch.equal(one, other)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0
        one, other = (model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(one, other)


def test_second_training_counts_steps_anew(tmp_path):
    """Of which the first has left some that were not logged."""
    model, data, logged = make(auxiliary_loss_weight=LAMBDA), examples(12), []
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", optim="sgd", learning_rate=0.0, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = umbra.ShadowTrainer(model=model, args=arguments, train_dataset=data)
    for _ in range(2):
        trainer.train()
        logged.append([h["shadow_loss"] for h in trainer.state.log_history if "shadow_loss" in h])
    assert len(logged[0]) == 1
    assert logged[1] == pytest.approx(logged[0])


def test_old_log_prob_objectives_exclude_shadow(tmp_path):
    """RLOO's: of a ratio to the pair's own, the shadow would learn nothing."""

    class OldPolicy(OwnLoss):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            given = {k: v for k, v in inputs.items() if k != "old_logps"}
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)

    kind, model, data = umbra.with_shadow_loss(OldPolicy), make(auxiliary_loss_weight=LAMBDA), examples()
    batch = {**batch_of(data), "old_logps": torch.zeros(len(data))}
    trainer = trainer_of(kind, tmp_path, model, data, 1)
    with pytest.raises(umbra.ConfigError, match="old_logps"):
        trainer.compute_loss(model.train(), batch)
    without = trainer_of(kind, tmp_path, make(auxiliary_loss_weight=0.0), data, 1)
    without.compute_loss(without.model.train(), batch)


def test_trainer_without_labels_evaluates_escalating_shadow(tmp_path):
    """Its loss is its own, of no label."""

    class Unlabelled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"])
            return (outputs.logits.square().mean(), outputs) if return_outputs else outputs.logits.square().mean()

    model, batch = make(auxiliary_loss_weight=LAMBDA, escalation="[REMOTE]"), {"input_ids": tokens(4, 9)}
    trainer = trainer_of(umbra.with_shadow_loss(Unlabelled), tmp_path, model.eval(), examples(), 1)
    assert trainer.compute_loss(model, batch) > 0
