"""TRL's trainers: λ is what the user set, packed equals unpacked, the reference is the bare base of the same model.

The shadow's own loss is recomputed from the *detached* model, a stock transformers model, by hand-written formulas.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import umbra
from support.tiny import assert_same, auxiliary, detached_gradients, gradients, make, step_gradients
from support.tokenizer import make_tokenizer

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

from support.ranks_trl import RUNS, gradients_of  # noqa: E402
from support.trl_runs import COMMON, LAMBDA, dpo, sft, sft_data, steps  # noqa: E402

pytestmark = [
    # TRL 1.16's own use of old names of transformers, and its options that 2.0 takes away
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`(label_smoothing_factor|compute_loss_func|return_outputs=True)`:FutureWarning"),
]


def batch_of(examples) -> dict[str, torch.Tensor]:
    """Right-padded, as one batch."""
    length = max(len(e["input_ids"]) for e in examples)
    pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    lists = [{**e, "attention_mask": [1] * len(e["input_ids"])} for e in examples]
    return {k: torch.tensor([e[k] + [p] * (length - len(e[k])) for e in lists]) for k, p in pad.items()}


# -- SFTTrainer --------------------------------------------------------------------------------------------------------


def log_probs(logits, labels):
    """(N,) of the labelled next tokens, and all their log-probabilities (N, V)."""
    wanted = labels[:, 1:] != -100
    all_of = F.log_softmax(logits[:, :-1][wanted].float(), -1)
    return all_of.gather(-1, labels[:, 1:][wanted][:, None])[:, 0], all_of


def cross_entropy(logits, labels):
    return -log_probs(logits, labels)[0].mean()


def dynamic(logits, labels):
    chosen = log_probs(logits, labels)[0]
    return -(chosen * chosen.exp().detach()).mean()


def smoothed(logits, labels):
    chosen, all_of = log_probs(logits, labels)
    return -(0.9 * chosen + 0.1 * all_of.mean(-1)).mean()


def squares(outputs, labels, num_items_in_batch=None):
    """A user's own loss function."""
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    chosen = log_probs(logits, labels)[0]
    return (chosen**2).sum() / (len(chosen) if num_items_in_batch is None else num_items_in_batch)


MODES = {
    "nll": ({}, cross_entropy),
    "dft": ({"loss_type": "dft"}, dynamic),
    "label smoothing": ({"label_smoothing_factor": 0.1}, smoothed),
    "own loss function": ({"compute_loss_func": squares}, squares),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.compat("Trainers", "TRL SFTTrainer, `with_shadow_loss`", "nll, dft, label smoothing, own loss function")
def test_sft_applies_one_objective_to_both_paths(tmp_path, mode, accumulation):
    """All gradients of a step equal those of L(attached) + λ · L(detached), each term written out by hand."""
    options, loss_of = MODES[mode]
    found, batch = {}, batch_of(sft_data())
    for weight in (LAMBDA, 0.0):
        model = make("llama", auxiliary_loss_weight=weight)
        found[weight] = step_gradients(sft(tmp_path, model, **steps(accumulation), **options))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = detached_gradients(model, lambda edge: loss_of(edge(**inputs).logits, batch["labels"]))
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=2e-3)
    loss_of(model.eval()(**inputs).logits, batch["labels"]).backward()
    assert_same(found[0.0], gradients(model))


@pytest.mark.parametrize(
    "layout", [{"padding_free": True}, {"packing": True, "max_length": 20}], ids=["padding_free", "packed"]
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.compat("Trainers", "TRL SFTTrainer, packed and padding-free", "equal to the unpacked run, shadow included")
def test_packed_equals_unpacked(tmp_path, name, layout):
    off, told = {"router_aux_loss_coef": 0.0} if name == "qwen3_moe" else {}, []
    padded = step_gradients(sft(tmp_path, make(name, auxiliary_loss_weight=LAMBDA), **off))
    model = make(name, auxiliary_loss_weight=LAMBDA)
    model.shadow.backbone.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs), with_kwargs=True)
    packed = step_gradients(sft(tmp_path, model, **layout, **off))
    assert len(told) == 2  # beside the base, and alone
    for kwargs in told:
        assert {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} <= kwargs.keys()
        assert len(kwargs["cu_seq_lens_q"]) == 9
    assert_same(packed, padded)


@pytest.mark.parametrize("accumulation", [1, 8])
def test_base_router_loss_is_counted_once(tmp_path, accumulation):
    """An MoE base has TRL's load-balancing loss, its dense shadow has none: λ is that of the shadow's cross-entropy."""
    found, batch = {}, batch_of(sft_data())
    for weight in (LAMBDA, 0.0):
        model = make("qwen3_moe", auxiliary_loss_weight=weight)
        trainer = sft(tmp_path, model, **steps(accumulation))
        assert trainer.aux_loss_enabled
        found[weight] = step_gradients(trainer)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = detached_gradients(model, lambda edge: cross_entropy(edge(**inputs).logits, batch["labels"]))
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=2e-3)


def test_trl_trains_trained_heads(tmp_path):
    """TRL multiplies by the head's weights itself: they must be those of the path that runs."""
    model = make("llama", auxiliary_loss_weight=LAMBDA, train_heads=True)
    found, batch = step_gradients(sft(tmp_path, model)), batch_of(sft_data())
    model.train()
    model(**batch).loss.backward()
    expected = gradients(model)
    assert {"shadow.heads.attached.weight", "shadow.heads.shadow.weight"} <= expected.keys()
    assert_same(found, expected)


def test_second_pass_leaves_metrics_unchanged(tmp_path):
    """Accuracy, entropy and token counts are the attached model's; the shadow's loss stands beside the loss."""
    logs = {}
    for weight in (LAMBDA, 0.0):
        model = make("llama", auxiliary_loss_weight=weight)
        trainer = sft(
            tmp_path, model, eval_dataset=sft_data(), learning_rate=0.0, **steps(2), per_device_eval_batch_size=4
        )
        trainer.train()
        trainer.evaluate()
        trained, _, evaluated = trainer.state.log_history
        logs[weight] = {**trained, **evaluated}
    ours, plain = logs[LAMBDA], logs[0.0]
    timing = [k for k in ours if "runtime" in k or "per_second" in k or "flos" in k or "mfu" in k]
    differing = {k for k in ours if k not in timing and ours[k] != pytest.approx(plain.get(k, float("nan")), rel=1e-4)}
    assert differing == {"loss", "grad_norm", "shadow_loss", "eval_shadow_loss"}
    assert ours["loss"] == pytest.approx(plain["loss"] + LAMBDA * ours["shadow_loss"], rel=1e-4)
    assert ours["eval_shadow_loss"] == pytest.approx(ours["shadow_loss"], rel=0.1)
    batch = batch_of(sft_data())
    with torch.no_grad():
        edge = model.detached()(**{k: batch[k] for k in ("input_ids", "attention_mask")})
    assert ours["shadow_loss"] == pytest.approx(float(cross_entropy(edge.logits, batch["labels"])), rel=1e-4)


@pytest.mark.compat(
    "Trainers", "TRL: resumed equals uninterrupted, the best is loaded", "trained heads in every checkpoint"
)
def test_trl_resumes_exactly_and_loads_best(tmp_path):
    def trainer(name, **more):
        options = {
            "save_strategy": "steps",
            "save_steps": 1,
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            **steps(4),
            **more,
        }
        model = make("llama", dropout=0.1, train_heads=True, auxiliary_loss_weight=LAMBDA)
        return sft(tmp_path / name, model, num_train_epochs=4, eval_dataset=sft_data(), **options)

    def state(trainer):
        return trainer.model.shadow.state_dict()

    whole = trainer("whole")
    whole.train()
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, value in state(whole).items():
        assert torch.equal(value, state(again)[name]), name
    best = trainer(
        "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = umbra.load(best.state.best_model_checkpoint, make("llama").unload())
    for name, value in state(best).items():
        assert torch.equal(value, saved.shadow.state_dict()[name]), name
    assert not torch.equal(saved.shadow.heads["attached"].weight, saved.base_head.weight)


# -- the trap: a trainer that does not know of the shadow ---------------------------------------------------------------


def test_unmodified_trl_trainer_names_with_shadow_loss(tmp_path):
    arguments = trl.SFTConfig(str(tmp_path), max_length=None, **COMMON)

    def trainer(model):
        return trl.SFTTrainer(model, arguments, train_dataset=sft_data(), processing_class=make_tokenizer())

    with pytest.raises(umbra.StateError, match=r"umbra\.with_shadow_loss.*auxiliary_loss_weight=0"):
        trainer(make("llama", auxiliary_loss_weight=LAMBDA)).train()
    found = step_gradients(trainer(make("llama", auxiliary_loss_weight=0.0)))
    expected = step_gradients(sft(tmp_path, make("llama", auxiliary_loss_weight=0.0)))
    assert_same(found, expected)


# -- DPOTrainer --------------------------------------------------------------------------------------------------------


def sequence_log_probs(model, batch):
    """(2B,) of chosen and rejected completions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = F.log_softmax(logits[:, :-1].float(), -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (logps * batch["completion_mask"][:, 1:]).sum(-1)


def preference_loss(logps, reference, beta=0.1):
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), reference.chunk(2)
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """TRL would load a reference model by the base's name."""

    def refuse(*_, **__):
        raise AssertionError("a second copy of the base")

    for module in ("dpo_trainer", "grpo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.create_model_from_path", refuse)


def tables_alive() -> set[int]:
    """Addresses of all tensors that have the shape of the base's embeddings."""
    import gc

    gc.collect()
    return {
        t.data_ptr() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.shape == (99, 32)
    }


@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.compat(
    "Trainers", "TRL DPOTrainer, `with_shadow_loss`", "the reference is the bare base, without a second copy"
)
def test_dpo_applies_one_objective_to_both_paths(tmp_path, accumulation, nothing_is_loaded):
    """Against the sigmoid loss written out, with the bare base (a model apart) as the reference of both."""
    found = {}
    for weight in (LAMBDA, 0.0):
        model = make("llama", auxiliary_loss_weight=weight)
        trainer = dpo(tmp_path, model, **steps(accumulation))
        found[weight] = step_gradients(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        reference = sequence_log_probs(make("llama").unload(), batch)
    expected = detached_gradients(model, lambda e: preference_loss(sequence_log_probs(e, batch), reference))
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=5e-3)
    preference_loss(sequence_log_probs(model.eval(), batch), reference).backward()
    assert_same(found[0.0], gradients(model), rtol=1e-3)


def test_dpo_reference_is_bare_base(tmp_path, nothing_is_loaded):
    model = make("llama", auxiliary_loss_weight=LAMBDA, train_heads=True)
    trainer = dpo(tmp_path, model, learning_rate=1.0)
    trainer.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        expected = sequence_log_probs(make("llama").unload(), batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    found = trainer.ref_model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ahead = dpo(tmp_path, make("llama"), precompute_ref_log_probs=True).train_dataset
    stored = torch.tensor([*ahead["ref_chosen_logps"], *ahead["ref_rejected_logps"]])
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainer_of", ["dpo", "grpo"])
def test_only_one_base_copy_exists(tmp_path, trainer_of):
    """TRL could load another by the base's name: no tensor of the embeddings' shape comes into being."""
    before = tables_alive()
    model = make("llama", auxiliary_loss_weight=LAMBDA)
    trainer = {"dpo": dpo, "grpo": grpo}[trainer_of](tmp_path, model, **steps(4))
    step_gradients(trainer)
    weights = {model.base_head.weight.data_ptr(), model.get_input_embeddings().weight.data_ptr()}
    assert len(weights) == 2
    assert tables_alive() - before <= weights
    assert not list(trainer.ref_model.parameters())


def test_synchronised_reference_model_is_refused(tmp_path):
    with pytest.raises(umbra.ConfigError, match="sync_ref_model"):
        dpo(tmp_path, make("llama"), sync_ref_model=True)


# -- GRPOTrainer -------------------------------------------------------------------------------------------------------

PROMPTS = [{"prompt": p} for p in ("2+2=", "say a", "b", "why not")]


def grpo(tmp_path, model, **options):
    def reward(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    settings = {
        "max_completion_length": 5, "num_generations": 2, "beta": 0.1, "loss_type": "grpo", "shuffle_dataset": False, **COMMON,
    }  # fmt: skip
    return umbra.with_shadow_loss(trl.GRPOTrainer)(
        model=model, reward_funcs=reward, args=trl.GRPOConfig(str(tmp_path), **{**settings, **options}),
        train_dataset=Dataset.from_list(PROMPTS), processing_class=make_tokenizer(),
    )  # fmt: skip


def completion_log_probs(model, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    n = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -n - 1 : -1].float()
    return F.log_softmax(logits, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def policy_loss(model, reference, batches, beta=0.1):
    """GRPO on its first policy: the ratio is 1, its gradient that of the log-probability; TRL weighs the KL by it too."""
    total = 0.0
    for batch in batches:
        logps, mask = completion_log_probs(model, batch), batch["completion_mask"]
        with torch.no_grad():
            ref = completion_log_probs(reference, batch)
        divergence = torch.exp(ref - logps) - (ref - logps) - 1
        ratio = torch.exp(logps - logps.detach())
        per_token = ratio * (beta * divergence - batch["advantages"][:, None])
        total = total + ((per_token * mask).sum(-1) / mask.sum(-1)).mean() / len(batches)
    return total


@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.compat(
    "Trainers", "TRL GRPOTrainer, `with_shadow_loss`", "the reference is the bare base, without a second copy"
)
def test_grpo_applies_one_objective_to_both_paths(tmp_path, accumulation, nothing_is_loaded):
    """The policy's samples teach the shadow too: the same advantages, the same reference."""
    found, settings = {}, {**steps(accumulation), "steps_per_generation": accumulation}
    for weight in (LAMBDA, 0.0):
        model = make("llama", auxiliary_loss_weight=weight)
        trainer = grpo(tmp_path, model, **settings)
        found[weight] = step_gradients(trainer)
    assert trainer.beta == trainer.args.beta == 0.1
    batches, reference = trainer._buffered_inputs, make("llama").unload()
    assert any(bool((b["advantages"] != 0).any()) for b in batches)
    expected = detached_gradients(model, lambda edge: policy_loss(edge, reference, batches))
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=5e-3)
    policy_loss(model.eval(), reference, batches).backward()
    assert_same(found[0.0], gradients(model), rtol=1e-3)


def test_grpo_shadow_ratio_uses_shadow_policy(tmp_path):
    """Reused samples carry log-probabilities of the attached policy: they clip its ratio, not the shadow's."""
    found = {}
    for weight in (LAMBDA, 0.0):
        model = make("llama", auxiliary_loss_weight=weight)
        trainer = grpo(tmp_path, model, **steps(1), steps_per_generation=1)
        step_gradients(trainer)
        (batch,) = trainer._buffered_inputs
        with torch.no_grad():
            old = completion_log_probs(model.eval(), batch) + 0.5
        model.train()
        trainer.compute_loss(model, {**batch, "old_per_token_logps": old}).backward()
        found[weight] = gradients(model)
    reference = make("llama").unload()
    expected = detached_gradients(model, lambda edge: policy_loss(edge, reference, [batch]))
    assert_same(auxiliary(found[LAMBDA], found[0.0], LAMBDA), expected, rtol=5e-3)


def test_grpo_trains_over_several_generations(tmp_path):
    """Samples drawn while training, reused over two iterations, logged, with gradient checkpointing switched off and on."""
    model = make("llama", auxiliary_loss_weight=LAMBDA)
    trainer = grpo(tmp_path, model, num_iterations=2, num_train_epochs=2, **steps(2), activation_checkpointing=True)
    before = copy.deepcopy(model.shadow.state_dict())
    trainer.train()
    assert any(not torch.equal(v, before[k]) for k, v in model.shadow.state_dict().items())
    shadow = [entry["shadow_loss"] for entry in trainer.state.log_history if "shadow_loss" in entry]
    assert len(shadow) == trainer.state.global_step > 1
    assert model.is_activation_checkpointing


# -- two ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.compat(
    "Trainers", "TRL on 2 ranks (DDP), `with_shadow_loss`", "SFT, label smoothing, DPO: gradients of one process"
)
def test_two_ranks_equal_one(tmp_path):
    """Two forwards before a backward under DDP, with accumulation, trained heads and a reference."""
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), *sys.path])
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(here / "support" / "ranks_trl.py"), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in RUNS:
        assert_same(load_file(tmp_path / f"{name}.safetensors"), gradients_of(name, tmp_path, 1), rtol=5e-4)


@pytest.mark.parametrize("trainer_class", [int, torch.nn.Module, "SFTTrainer"])
def test_non_trainer_class_is_refused(trainer_class):
    with pytest.raises(umbra.ConfigError, match="with_shadow_loss needs a subclass of transformers' Trainer"):
        umbra.with_shadow_loss(trainer_class)


def test_model_without_shadow_is_refused(tmp_path):
    with pytest.raises(umbra.ConfigError, match="trains a ShadowModel, got LlamaForCausalLM"):
        sft(tmp_path, make("llama").unload())
