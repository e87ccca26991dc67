"""``umbra train``: what is learned, logged, saved, resumed and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import umbra
from support.runs import RECORDS, losses, same, train_settings, weights, write
from umbra.cli import main
from umbra.training.train import ShadowTrainer, train


@pytest.fixture
def settings(tmp_path, base_folder):
    return train_settings(tmp_path, base_folder)


def test_cpu_is_used_without_accelerator(settings):
    """Even in bf16, which transformers refuse on a CPU that they were not told of."""
    del settings["use_cpu"]
    train({**settings, "bf16": True, "max_steps": 1})
    assert len(losses(settings["output_dir"])) == 1


def test_both_losses_fall_and_adapter_is_written(settings):
    metrics = train({**settings, "num_train_epochs": 6, "learning_rate": 3e-3})
    history = losses(settings["output_dir"])
    assert history[-1][0] < history[0][0] - 0.4
    assert history[-1][1] < history[0][1] - 0.4
    assert metrics["global_step"] == len(history) == 36
    model = umbra.load(settings["output_dir"], trainable=True)
    assert metrics["trainable_parameters"] == sum(p.numel() for p in model.shadow.parameters() if p.requires_grad)
    assert not (set(os.listdir(settings["output_dir"])) & {"model.safetensors", "training_args.bin"})


def test_logged_loss_is_task_plus_lambda_times_shadow(settings):
    """At one step with lr 0 the logged values can be recomputed."""
    train({**settings, "learning_rate": 0.0, "num_train_epochs": 1, "dropout": 0.0, "per_device_train_batch_size": 24})
    (loss, shadow_loss), *_ = losses(settings["output_dir"])
    from umbra.base.loading import load_tokenizer
    from umbra.data import Collator, encode_all

    model = umbra.load(settings["output_dir"]).eval()
    examples = encode_all(RECORDS, load_tokenizer(settings["base"]), max_length=99)
    out = model(**Collator(0)(examples))
    assert shadow_loss == pytest.approx(float(out.shadow_loss), abs=1e-4)
    assert loss == pytest.approx(float(out.loss + 0.5 * out.shadow_loss), abs=1e-4)


def test_evaluation_reports_task_and_shadow_loss(settings, tmp_path):
    metrics = train(
        {**settings, "eval_data": write(tmp_path / "eval.jsonl", RECORDS[:6]), "per_device_eval_batch_size": 6}
    )
    from umbra.base.loading import load_tokenizer
    from umbra.data import Collator, encode_all

    model = umbra.load(settings["output_dir"]).eval()
    out = model(**Collator(0)(encode_all(RECORDS[:6], load_tokenizer(settings["base"]), max_length=99)))
    assert metrics["eval_loss"] == pytest.approx(float(out.loss), abs=1e-4)
    assert metrics["eval_shadow_loss"] == pytest.approx(float(out.shadow_loss), abs=1e-4)


def test_accumulated_batches_equal_large_batch(settings):
    large = {**settings, "dropout": 0.0, "per_device_train_batch_size": 8, "max_grad_norm": 0.0, "optim": "sgd"}
    train({**large, "output_dir": settings["output_dir"] + "-large"})
    train({**large, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    assert same(weights(settings["output_dir"]), weights(settings["output_dir"] + "-large"), 1e-5)
    for a, b in zip(losses(settings["output_dir"]), losses(settings["output_dir"] + "-large"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_interrupted_run_resumes_identically(settings, monkeypatch):
    """Dropout on, so that the random state must come back too."""
    values = {**settings, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    train({**values, "output_dir": settings["output_dir"] + "-whole"})
    step = ShadowTrainer.training_step

    def fail(self, *args, **options):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(ShadowTrainer, "training_step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(values)
    monkeypatch.undo()
    train(values)
    assert losses(settings["output_dir"]) == losses(settings["output_dir"] + "-whole")
    assert same(weights(settings["output_dir"]), weights(settings["output_dir"] + "-whole"))


def test_killed_process_resumes_from_last_whole_checkpoint(settings):
    values = {**settings, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    flags = [f"--{k}={v}" for k, v in values.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "umbra", "train", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.time() + 120
    while not os.path.exists(f"{settings['output_dir']}/checkpoint-3/trainer_state.json"):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(f"{settings['output_dir']}/adapter_model.safetensors")
    metrics = train(values)
    assert metrics["global_step"] == 18
    train({**values, "output_dir": settings["output_dir"] + "-whole"})
    assert same(weights(settings["output_dir"]), weights(settings["output_dir"] + "-whole"))


def test_truncated_checkpoint_is_not_resumed(settings):
    values = {**settings, "save_strategy": "steps", "save_steps": 2}
    train(values)
    out = settings["output_dir"]
    expected = weights(out)
    os.remove(f"{out}/run.json")
    os.remove(f"{out}/adapter_config.json")
    last = max((p for p in os.listdir(out) if p.startswith("checkpoint-")), key=lambda p: int(p.split("-")[1]))
    os.remove(f"{out}/{last}/trainer_state.json")
    train(values)
    assert same(weights(out), expected)


@pytest.mark.parametrize("has_state", [True, False])
def test_foreign_checkpoints_are_left_alone(settings, has_state):
    theirs = Path(settings["output_dir"]) / "checkpoint-500"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_text("weights")
    if has_state:
        (theirs / "trainer_state.json").write_text("{}")
    with pytest.raises(umbra.CheckpointError, match="holds checkpoint-500 of something else"):
        train(settings)
    assert (theirs / "model.safetensors").read_text() == "weights" and not (theirs.parent / "run.json").exists()


def test_save_strategy_may_be_no(settings, tmp_path, capsys):
    """To YAML that is False."""
    (tmp_path / "train.yaml").write_text(
        "\n".join(f"{k}: {json.dumps(v)}" for k, v in settings.items()) + "\nsave_strategy: no\nmax_steps: 1\n"
    )
    assert main(["train", str(tmp_path / "train.yaml"), "--logging_strategy", "no"]) == 0
    asked = json.loads(Path(settings["output_dir"], "run.json").read_text())["asked"]
    assert (asked["save_strategy"], asked["logging_strategy"]) == ("no", "no")


def test_seed_covers_classifier_head(settings, tmp_path):
    data = write(tmp_path / "c.jsonl", [{"text": r["prompt"], "label": i % 2} for i, r in enumerate(RECORDS)])
    heads = []
    for out, seed in (("one", 7), ("two", 7), ("three", 8)):
        train({**settings, "train_data": data, "output_dir": str(tmp_path / out), "seed": seed, "max_steps": 1})
        heads.append({k: v for k, v in weights(tmp_path / out).items() if "heads.attached" in k})
    assert same(heads[0], heads[1]) and not same(heads[0], heads[2], 1e-2)


def test_finished_run_is_reused(settings, monkeypatch):
    first = train(settings)
    monkeypatch.setattr("umbra.training.train.load_base", None)
    assert train(settings) == first


def test_best_checkpoint_is_loaded_completely(settings, tmp_path):
    """The best is called the one of highest loss, which is the first and not the last."""
    values = {
        **settings, "eval_data": write(tmp_path / "eval.jsonl", RECORDS[:4]), "learning_rate": 3e-2, "num_train_epochs": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True, "save_total_limit": 9,
    }  # fmt: skip
    metrics = train(values)
    with open(f"{settings['output_dir']}/run.json") as file:
        evaluations = [h["eval_loss"] for h in json.load(file)["history"] if "eval_loss" in h]
    assert metrics["eval_loss"] == pytest.approx(max(evaluations), abs=1e-5)
    assert evaluations[0] == max(evaluations) > evaluations[2] + 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_base_has_float32_shadow(settings, dtype):
    train({**settings, "dtype": dtype, "num_train_epochs": 4, "learning_rate": 3e-3})
    history = losses(settings["output_dir"])
    assert history[-1][0] < history[0][0]
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights(settings["output_dir"]).values())


def test_bf16_autocast_trains(settings):
    train({**settings, "bf16": True, "num_train_epochs": 3, "learning_rate": 3e-3})
    history = losses(settings["output_dir"])
    assert history[-1][0] < history[0][0]


def test_gradient_checkpointing_changes_no_weight(settings):
    train(settings)
    other = settings["output_dir"] + "-checkpointed"
    train({**settings, "output_dir": other, "activation_checkpointing": True})
    assert same(weights(settings["output_dir"]), weights(other), 1e-6)


@pytest.mark.parametrize(
    ("label", "head"),
    [(lambda i: "ab"[i % 2], 2), (lambda i: i / 7, 1), (lambda i: ["x", "y"] if i % 2 else ["z"], 3)],
    ids=["single", "regression", "multi"],
)
def test_classifier_trains_both_heads_but_not_base_head(settings, tmp_path, label, head):
    records = [{"text": "ab"[i % 2] * (1 + i // 8), "label": label(i)} for i in range(24)]
    data = write(tmp_path / "classes.jsonl", records)
    values = {**settings, "train_data": data, "eval_data": data, "num_train_epochs": 10, "learning_rate": 1e-2}
    metrics = train(values if head != 1 else {**values, "problem_type": "regression"})
    history = losses(settings["output_dir"])
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < history[0][1]
    saved = weights(settings["output_dir"])
    assert saved["shadow.heads.attached.weight"].shape == saved["shadow.heads.shadow.weight"].shape == (head, 32)
    if head == 2:
        assert metrics["eval_accuracy"] > 0.9
    model = umbra.load(settings["output_dir"])
    assert not torch.equal(model.base_head.weight, saved["shadow.heads.attached.weight"])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"learning_rat": 1}, umbra.ConfigError, "Did you mean 'learning_rate'"),
        ({"rnk": 1}, umbra.ConfigError, "Did you mean 'rank'"),
        ({"train_data": ""}, umbra.ConfigError, "train_data is missing"),
        ({"output_dir": ""}, umbra.ConfigError, "output_dir is missing"),
        ({"rank": 0}, umbra.ConfigError, "rank must be an integer of at least 1"),
        ({"max_length": 1}, umbra.ConfigError, "max_length"),
        ({"dtype": "float31"}, umbra.UmbraError, "float31"),
        ({"save_strategy": "sometimes"}, umbra.ConfigError, "sometimes"),
        ({"train_data": "/nowhere.jsonl"}, umbra.DataError, "nowhere.jsonl"),
        ({"base": "/no/such/base"}, umbra.BaseModelError, "/no/such/base"),
    ],
)
def test_invalid_settings_are_refused_early(settings, change, error, says):
    with pytest.raises(error, match=says):
        train({**settings, **change})
    assert not os.path.exists(settings["output_dir"]) or not os.listdir(settings["output_dir"])


def test_folder_with_other_files_is_refused(settings):
    train(settings)
    with pytest.raises(umbra.CheckpointError, match=r"holds another run \(rank: 4 → 5\)"):
        train({**settings, "rank": 5})
    before = weights(settings["output_dir"])
    os.remove(f"{settings['output_dir']}/run.json")
    with pytest.raises(umbra.CheckpointError, match="already holds another adapter"):
        train(settings)
    assert same(weights(settings["output_dir"]), before)
    train({**settings, "rank": 5, "overwrite": True})
    assert weights(settings["output_dir"])["shadow.couplings.injections.1.down.weight"].shape[0] == 5


WRONG = {
    "two losses": {"distillation_weight": 0.5, "label_smoothing_factor": 0.1},
    "no evaluation data": {"eval_strategy": "epoch"},
    "no such file": {"train_data": "nowhere.jsonl"},
    "resuming from elsewhere": {"resume_from_checkpoint": "elsewhere"},
    "in place of the base": {"output_dir": None},
}


@pytest.mark.parametrize("form", WRONG)
def test_failed_start_overwrites_nothing(settings, form):
    train(settings)
    before, wrong = weights(settings["output_dir"]), {**settings, **WRONG[form], "overwrite": True}
    if form == "in place of the base":
        wrong["output_dir"] = settings["base"]
    with pytest.raises(umbra.UmbraError):
        train(wrong)
    assert same(weights(settings["output_dir"]), before)
    assert train(settings)["global_step"] == 6, "and the finished run is still known as such"


def test_tilde_expands_to_home_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train({**settings, "output_dir": "~/run"})
    assert not (tmp_path / "~").exists()
    assert {"run.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "home" / "run").iterdir()}


def test_record_longer_than_positions_is_refused(settings, tmp_path):
    data = write(tmp_path / "long.jsonl", [{"prompt": "a" * 200, "completion": "b"}])
    with pytest.raises(umbra.ConfigError, match="the base has positions for 128: set max_length to at most 128"):
        train({**settings, "train_data": data})
    assert not os.path.exists(settings["output_dir"])


def test_stdout_is_only_json(settings, capsys):
    flags = [x for k, v in settings.items() if k != "disable_tqdm" for x in (f"--{k}", str(v))]
    assert main(["train", *flags, "--json", "--max_length", "30"]) == 0
    assert json.loads(capsys.readouterr().out)["global_step"] == 6


@pytest.mark.parametrize("classifier", [False, True])
def test_transformers_trainer_resumes_and_loads_best(tmp_path, classifier, monkeypatch):
    """Nothing of ours but the model: trained heads are in every checkpoint, resuming is exact."""
    from transformers import Trainer, TrainingArguments

    from support.tiny import class_labels, make, tokens

    ids = tokens(12, 8)
    labels = class_labels("single", 12) if classifier else ids
    data = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]
    options = {"base_options": {"num_labels": 3}, "classifier": True} if classifier else {}

    def trainer(name, **more):
        arguments = TrainingArguments(
            str(tmp_path / name), num_train_epochs=2, per_device_train_batch_size=2, save_steps=2, logging_steps=1,
            learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True, **more,
        )  # fmt: skip
        return Trainer(make("llama", dropout=0.1, **options), arguments, train_dataset=data, eval_dataset=data)

    whole = trainer("whole")
    whole.train()
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))
    assert same(whole.model.shadow.state_dict(), again.model.shadow.state_dict())
    curve = [h["loss"] for h in whole.state.log_history if "loss" in h]
    assert [h["loss"] for h in again.state.log_history if "loss" in h] == curve

    best = trainer(
        "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    best.train()
    found = weights(best.state.best_model_checkpoint)
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same({k.removeprefix("shadow."): v for k, v in found.items()}, best.model.shadow.state_dict())


def test_run_of_earlier_version_is_recognised(settings):
    """What its file does not mention had the default then; what differs from it is another run."""
    first = train(settings)
    file = f"{settings['output_dir']}/run.json"
    with open(file) as opened:
        held = json.load(opened)
    held["asked"] |= {"channel_scale": held["asked"].pop("input_scale"), "backbone_rate": 1.0, "update": "gated"}
    held["asked"] |= held["asked"].pop("constants")
    del held["asked"]["auxiliary_loss_every"], held["asked"]["init_scale"]
    with open(file, "w") as opened:
        json.dump(held, opened)
    assert train(settings) == first
    with pytest.raises(umbra.CheckpointError, match=r"another run \(auxiliary_loss_every: 1 → 2\)"):
        train({**settings, "auxiliary_loss_every": 2})


def test_save_steps_enables_checkpoints(settings):
    train({**settings, "save_steps": 2, "max_steps": 5, "save_total_limit": None})
    assert {p.name for p in Path(settings["output_dir"]).glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
    }


def test_changed_data_is_another_run(settings, tmp_path):
    given = {**settings, "train_data": write(tmp_path / "own.jsonl", RECORDS), "max_steps": 1}
    found = train(given)
    write(tmp_path / "own.jsonl", RECORDS[:-1])
    with pytest.raises(umbra.CheckpointError, match=r"another content of .*own"):
        train(given)
    write(tmp_path / "own.jsonl", RECORDS)
    assert train(given) == found
    (tmp_path / "own.jsonl").unlink()
    assert train(given) == found


def test_eval_steps_enables_evaluation(settings, tmp_path):
    train({**settings, "eval_data": write(tmp_path / "eval.jsonl", RECORDS[:4]), "eval_steps": 2, "max_steps": 4})
    with open(f"{settings['output_dir']}/run.json") as file:
        assert [h["step"] for h in json.load(file)["history"] if "eval_loss" in h][:2] == [2, 4]


def test_unavailable_optimizer_leaves_finished_run(settings, capsys):
    train({**settings, "max_steps": 1})
    before = weights(settings["output_dir"])
    with pytest.raises(umbra.ConfigError, match="galore"):
        train({**settings, "max_steps": 1, "overwrite": True, "optim": "galore_adamw", "optim_target_modules": ["x"]})
    assert same(weights(settings["output_dir"]), before)
    train({**settings, "max_steps": 1})
    assert "nothing was trained" in capsys.readouterr().err


def test_one_gpu_is_used_without_a_launcher(tmp_path, monkeypatch):
    """Of several that are visible, transformers would take all, by DataParallel."""
    from transformers import TrainingArguments

    from umbra.training.runs import make_arguments

    def two(self):
        self._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two))
    assert make_arguments(tmp_path, {})._n_gpu == 1


def test_fsdp_accepts_true(tmp_path):
    from umbra.options import TrainOptions
    from umbra.training.runs import sort_settings

    _, _, rest = sort_settings(
        {"output_dir": str(tmp_path), "fsdp": True, "resume_from_checkpoint": True}, TrainOptions, (), "here"
    )
    assert rest == {"output_dir": str(tmp_path), "fsdp": True} or rest == {"fsdp": True}
    with pytest.raises(umbra.ConfigError, match="fsdp"):
        sort_settings({"output_dir": str(tmp_path), "fsdp": 3}, TrainOptions, (), "here")


def test_best_evaluation_is_saved_immediately(settings, tmp_path):
    given = {"eval_data": write(tmp_path / "eval.jsonl", RECORDS[:4]), "eval_steps": 3, "max_steps": 6}
    train({**settings, **given, "load_best_model_at_end": True, "save_total_limit": None})
    assert {p.name for p in Path(settings["output_dir"]).glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
