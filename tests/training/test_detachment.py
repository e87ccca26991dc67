"""Training for the detached model: labels of the shadow's own, passing requests on, schedules, and no base at all."""

import json
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

import umbra
from support.runs import RECORDS, train_settings, write
from support.tiny import assert_same, backbone_of, gradients, make, partly_labelled, scramble, shadow_logits, tokens
from support.tokenizer import make_tokenizer
from umbra.base.loading import load_tokenizer
from umbra.cli import main
from umbra.data import ChatFormatter, Collator, encode_all
from umbra.errors import ConfigError, DataError
from umbra.evaluation.scores import Score
from umbra.method import kernels
from umbra.method.losses import IGNORED
from umbra.training.train import train

REMOTE = "[REMOTE]"


@pytest.fixture
def settings(tmp_path, base_folder):
    return train_settings(tmp_path, base_folder)


def cross_entropy(logits, labels):
    """Σ CE over the labels (B, T)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


# -- labels of the shadow's own ------------------------------------------------------------------------------------


def two_labels():
    """Ids (3, 9), the pair's labels, and the shadow's: the same, others, and none where the pair has some."""
    ids = tokens(3)
    labels = partly_labelled(ids)
    own = labels.clone()
    own[1] = IGNORED
    own[1, 4:6] = ids[1, 4:6]
    own[2, -2] = 5
    return ids, labels, own


@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("heads", [True, False])
def test_shadow_labels_train_shadow_path(skip_logits, fast, heads):
    model = make(train_heads=heads, auxiliary_loss_weight=0.7, distillation_weight=0.4)
    ids, labels, own = two_labels()
    attached, alone = model(ids).logits, shadow_logits(model, ids)
    count = int(((labels != IGNORED) | (own != IGNORED))[:, 1:].sum())
    task, shadow = cross_entropy(attached, labels) / count, cross_entropy(alone, own) / count
    both = ((labels == own) & (labels != IGNORED))[:, 1:]
    p, q = attached[:, :-1][both].detach().log_softmax(-1), alone[:, :-1][both].log_softmax(-1)
    distillation = F.kl_div(q, p, log_target=True, reduction="sum") / count
    (task + 0.7 * shadow + 0.4 * distillation).backward()
    expected = gradients(model)

    with nullcontext() if fast else kernels.reference():
        out = model.train()(ids, labels=labels, shadow_targets=own, skip_logits=skip_logits)
    out.loss.backward()
    torch.testing.assert_close(out.shadow_loss, shadow)
    torch.testing.assert_close(out.distillation_loss, distillation)
    assert_same(gradients(model), expected)


def test_equal_shadow_labels_change_nothing():
    model = make(auxiliary_loss_weight=0.7, distillation_weight=0.4).train()
    ids, labels, _ = two_labels()
    plain, told = model(ids, labels=labels), model(ids, labels=labels, shadow_targets=labels)
    torch.testing.assert_close(plain.loss, told.loss)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_shadow_only_reads_shadow_labels(skip_logits):
    model = make()
    ids, labels, own = two_labels()
    with model.shadow_only():
        out = model(ids, labels=labels, shadow_targets=own, skip_logits=skip_logits)
    expected = cross_entropy(shadow_logits(model, ids), own) / int((own[:, 1:] != IGNORED).sum())
    torch.testing.assert_close(out.loss, expected)
    assert (out.logits is None) == skip_logits


def test_distillation_weight_follows_schedule():
    model = make(distillation_weight=2.0, auxiliary_loss_weight=0.0).train()
    ids, labels, _ = two_labels()
    out = model(ids, labels=labels)
    with model.attached_only():
        task = model(ids, labels=labels).loss
    torch.testing.assert_close(out.loss, task + 2 * out.distillation_loss)


# -- without the base ----------------------------------------------------------------------------------------------


def test_detached_only_equals_training_detached_model(settings):
    """Against a loop of plain PyTorch over the stock model."""
    settings = {**settings, "detached_only": True, "per_device_train_batch_size": 24, "max_steps": 3, "dropout": 0.0,
                "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}  # fmt: skip
    fields = ("rank", "gate_rank", "alpha", "init", "auxiliary_loss_weight", "dropout")
    torch.manual_seed(settings["seed"])
    base = umbra.base.loading.load_base(settings["base"])
    edge = umbra.attach(base, umbra.ShadowConfig(**{k: settings[k] for k in fields})).detached().train()
    batch = Collator(0)(encode_all(RECORDS, load_tokenizer(settings["base"]), max_length=99))
    inside = [p for n, p in edge.model.named_parameters() if "embed" not in n]
    optimizer = torch.optim.AdamW(inside, lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        loss = edge(**batch).loss
        loss.backward()
        optimizer.step()
        edge.zero_grad()

    train(settings)
    trained = umbra.load(settings["output_dir"])
    expected = {n: p for n, p in edge.model.named_parameters() if "embed" not in n}
    for name, value in trained.shadow.backbone.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_detached_only_never_runs_base_blocks(settings, tmp_path, monkeypatch):
    blocks = type(umbra.base.loading.load_base(settings["base"]).model.layers[0])
    ran, forward = Counter(), blocks.forward

    def watch(self, *args, **options):
        ran[self.self_attn.layer_idx] += 1
        return forward(self, *args, **options)

    monkeypatch.setattr(blocks, "forward", watch)
    evaluated = write(tmp_path / "eval.jsonl", RECORDS[:6])
    metrics = train(
        {**settings, "detached_only": True, "eval_data": evaluated, "num_train_epochs": 6, "learning_rate": 1e-2}
    )
    # Once on one token, whether its head is plain; and once when it is attached, how large its channels are.
    assert max(ran[l] for l in range(4)) <= 2 < 30 < ran[4]
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_shadow_loss"])
    history = json.loads((tmp_path / "out/run.json").read_text())["history"]
    logged = [h["loss"] for h in history if "loss" in h]
    assert logged[-1] < logged[0] - 0.5
    couplings = umbra.load(tmp_path / "out").shadow.couplings
    assert all(not p.any() for n, p in couplings.named_parameters() if n.endswith("up.weight"))


def test_detached_only_trains_classifier_head(settings, tmp_path):
    data = write(
        tmp_path / "c.jsonl",
        [{"text": r["prompt"], "label": "even" if i % 2 else "odd"} for i, r in enumerate(RECORDS)],
    )
    train({**settings, "train_data": data, "detached_only": True, "auxiliary_loss_weight": 0.0, "learning_rate": 1e-2})
    heads = umbra.load(tmp_path / "out").shadow.heads
    assert not torch.equal(heads["shadow"].weight, heads["attached"].weight)


@pytest.mark.parametrize("every", [1, 3])
def test_detached_only_learns_shadow_labels(settings, tmp_path, every):
    """With marks its loss is the mean over its own labels, however long the answers of the pair are."""
    marked = [{**r, "completion": r["completion"] + "0" * 9, "escalate": i % 2 == 0} for i, r in enumerate(RECORDS)]
    settings = {
        **settings, "train_data": write(tmp_path / "m.jsonl", marked), "detached_only": True, "learning_rate": 0.0,
        "per_device_train_batch_size": 24, "max_steps": 60 if every > 1 else 1, "auxiliary_loss_every": every, "dropout": 0.0,
    }  # fmt: skip
    train(settings)
    history = json.loads((tmp_path / "out/run.json").read_text())["history"]
    logged = [h["loss"] for h in history if "loss" in h]
    examples = encode_all(marked, load_tokenizer(settings["base"]), max_length=99)
    batch = Collator(0)([e for e in examples if not (e.get("shadow_targets", e["labels"]) == IGNORED).all()])
    edge, own = umbra.load(tmp_path / "out").detached(), batch["shadow_targets"]
    logits = edge(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = float(cross_entropy(logits, own) / (own[:, 1:] != IGNORED).sum())
    assert sum(logged) / len(logged) == pytest.approx(expected, rel=1e-3 if every == 1 else 0.03)


def test_detached_only_refuses_label_smoothing(settings):
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.1"):
        train({**settings, "detached_only": True, "label_smoothing_factor": 0.1})


@pytest.mark.parametrize("words", ["<eos>", "\u2603"])
def test_unreadable_escalation_text_is_refused(settings, tmp_path, words):
    marked = write(tmp_path / "m.jsonl", [{**RECORDS[0], "escalate": True}])
    with pytest.raises(ConfigError, match="plain text"):
        train({**settings, "train_data": marked, "escalation": words})


def test_evaluation_normalises_each_path_by_its_labels():
    model, (ids, labels, own) = make(), two_labels()
    out = model(ids, labels=labels, shadow_targets=own)
    counts = [int((x[:, 1:] != IGNORED).sum()) for x in (labels, own)]
    torch.testing.assert_close(out.loss, cross_entropy(model(ids).logits, labels) / counts[0])
    torch.testing.assert_close(out.shadow_loss, cross_entropy(shadow_logits(model, ids), own) / counts[1])


def test_targets_of_wrong_shape_are_refused():
    model, (ids, labels, own) = make(), two_labels()
    with pytest.raises(ConfigError, match="of the labels' shape"):
        model(ids, labels=labels, shadow_targets=own[:, 1:])


def test_detached_only_refuses_distillation(settings):
    with pytest.raises(ConfigError, match="detached_only does not run"):
        train({**settings, "detached_only": True, "distillation_weight": 0.1})


# -- requests that are beyond the shadow ---------------------------------------------------------------------------


def test_marked_record_becomes_two_examples(base_folder):
    writer = ChatFormatter(load_tokenizer(base_folder))
    record = {"prompt": "1+1=", "completion": "2"}
    whole, passed = writer.encode_escalated(record, REMOTE)
    plain, other = writer.encode(record), writer.encode({**record, "completion": REMOTE})
    assert (
        whole["input_ids"].tolist() == plain["input_ids"].tolist()
        and whole["labels"].tolist() == plain["labels"].tolist()
    )
    assert (whole["shadow_targets"] == IGNORED).all() and (passed["labels"] == IGNORED).all()
    assert passed["input_ids"].tolist() == other["input_ids"].tolist()
    assert passed["shadow_targets"].tolist() == other["labels"].tolist()


def test_only_last_answer_of_conversation_escalates():
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns], "escalate": True}
    tokenizer = make_tokenizer()
    writer = ChatFormatter(tokenizer)
    whole, passed = writer.encode_escalated(record, REMOTE)

    def learned(example, key):
        return tokenizer.decode([t for t in example[key] if t != IGNORED])

    assert "two" in learned(whole, "labels") and "four" in learned(whole, "labels")
    assert "two" in learned(whole, "shadow_targets") and "four" not in learned(whole, "shadow_targets")
    assert "two" not in learned(passed, "shadow_targets") and REMOTE in learned(passed, "shadow_targets")
    assert not learned(passed, "labels")


def test_batches_carry_task_and_shadow_labels(base_folder):
    records = [RECORDS[0], {**RECORDS[1], "escalate": True}, {**RECORDS[2], "escalate": False}]
    examples = encode_all(records, load_tokenizer(base_folder), max_length=99)
    assert len(examples) == 4
    batch = Collator(0)(examples)
    assert batch["shadow_targets"].shape == batch["labels"].shape
    same = (batch["shadow_targets"] == batch["labels"]).all(-1)
    assert same.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "completion": "b", "escalate": "yes"}, "must be true or false"),
        ({"text": "a", "escalate": True}, "unknown column 'escalate'"),
        ({"text": "a", "label": "b", "escalate": True}, "unknown column 'escalate'"),
    ],
)
def test_invalid_escalation_marks_are_refused(settings, tmp_path, record, says):
    with pytest.raises(DataError, match=says):
        train({**settings, "train_data": write(tmp_path / "bad.jsonl", [record])})


def test_escalation_without_marks_is_refused(settings):
    with pytest.raises(DataError, match=r"no record of .* is marked"):
        train({**settings, "escalation": REMOTE})


@pytest.fixture
def escalating(settings, tmp_path):
    """A run on sums, of which those that begin with 3 or 4 are beyond the shadow."""
    marked = [{**r, "escalate": r["prompt"][0] in "34"} for r in RECORDS]
    settings |= {"train_data": write(tmp_path / "marked.jsonl", marked), "learning_rate": 2e-2, "num_train_epochs": 100,
                 "auxiliary_loss_weight": 1.0, "per_device_train_batch_size": 24, "dropout": 0.0}  # fmt: skip
    train(settings)
    return settings


def test_only_detached_model_escalates_marked_records(escalating, tmp_path, capsys):
    out = escalating["output_dir"]
    assert umbra.load(out).shadow_config.escalation == REMOTE
    assert main(["eval", out, escalating["train_data"], "--max_new_tokens", "12", "--json"]) == 0
    base, attached, detached, cascade = json.loads(capsys.readouterr().out)
    marked = sum(r["prompt"][0] in "34" for r in RECORDS)
    assert (base["escalated"], attached["escalated"]) == (0, 0)
    assert abs(detached["escalated"] - marked) <= 2
    assert main(["eval", out, escalating["train_data"], "--max_new_tokens", "3", "--modes", "detached", "--json"]) == 0
    [short] = json.loads(capsys.readouterr().out)
    assert short["escalated"] == detached["escalated"], "it is not cut off in the middle of that"
    assert cascade["mode"] == "cascade" and cascade["correct"] >= detached["correct"] and cascade["escalated"] is None
    assert detached["selective_accuracy"] == pytest.approx(detached["correct"] / (24 - detached["escalated"]))
    assert main(["eval", out, escalating["train_data"], "--modes", "detached"]) == 0
    assert "escalated" in capsys.readouterr().out

    assert main(["detach", out, str(tmp_path / "edge")]) == 0
    assert json.loads((tmp_path / "edge/generation_config.json").read_text())["escalation"] == REMOTE
    assert GenerationConfig.from_pretrained(tmp_path / "edge").escalation == REMOTE
    AutoModelForCausalLM.from_pretrained(tmp_path / "edge").generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("marked", ["some", "none", "all"])
def test_evaluation_loss_per_label_is_independent_of_batches(settings, tmp_path, marked, smoothing):
    """Rows that only the shadow learns from neither dilute it nor are left out of the shadow's."""
    chosen = {"some": "34", "none": "", "all": "01234"}[marked]
    records = [{**r, "escalate": r["prompt"][0] in "34"} for r in RECORDS]
    tested = [{**r, "escalate": r["prompt"][0] in chosen} for r in RECORDS[::3]]
    settings |= {
        "train_data": write(tmp_path / "marked.jsonl", records),
        "eval_data": write(tmp_path / "eval.jsonl", tested),
    }
    found = []
    for size in (1, 3, 16):
        out = str(tmp_path / f"out{size}")
        given = {"output_dir": out, "per_device_eval_batch_size": size, "label_smoothing_factor": smoothing}
        metrics = train({**settings, **given, "max_steps": 2})
        found.append(metrics["eval_loss"])
    model, tokenizer = umbra.load(out).eval(), make_tokenizer()
    sums = []
    for record in RECORDS[::3]:
        example = ChatFormatter(tokenizer).encode(record)
        ids, labels = (torch.as_tensor(example[k], dtype=torch.long)[None] for k in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        sums.append(
            (
                float(F.cross_entropy(logits, labels[0, 1:], reduction="sum", label_smoothing=smoothing)),
                int((labels[0, 1:] != -100).sum()),
            )
        )
    expected = sum(s for s, _ in sums) / sum(n for _, n in sums)
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_escalated_replies_are_scored():
    replies = [
        {"reply": r, "correct": c} for r, c in (("a", True), (" [REMOTE] ", False), ("b", False), ("[REMOTE]", False))
    ]
    score = Score.of("detached", replies, 1, 1.0, None, REMOTE)
    assert (score.correct, score.total, score.escalated, score.selective_accuracy) == (1, 4, 2, 0.5)
    assert score.selective_low < 0.5 < score.selective_high
    none = Score.of("detached", replies[1:2], 1, 1.0, None, REMOTE)
    assert (none.escalated, none.selective_accuracy) == (1, None)
    assert Score.of("base", replies, 1, 1.0).escalated is None


def test_custom_loss_trainers_receive_both_labels(tmp_path):
    """Label smoothing: the second pass reads the shadow's labels, the first never sees them."""
    model = make(auxiliary_loss_weight=0.5)
    scramble(model.shadow, 3)
    ids, labels, own = two_labels()
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    trainer = umbra.ShadowTrainer(model=model.train(), args=args)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels, "shadow_targets": own})
    loss.backward()
    found = backbone_of(gradients(model))
    with model.attached_only():
        first = trainer.label_smoother({"logits": model(ids).logits}, labels, shift_labels=True)
    with model.shadow_only():
        second = trainer.label_smoother({"logits": model(ids).logits}, own, shift_labels=True)
    (first + 0.5 * second).backward()
    assert_same(found, backbone_of(gradients(model)))
