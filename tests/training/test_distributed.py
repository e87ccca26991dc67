"""Two gloo processes: every engine gives the loss and the gradients of one process, and its checkpoints are anybody's."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

import umbra
from support import ranks
from support.folders import FILES, WEIGHTS, assert_same_weights, names
from support.pair import Pair
from support.tiny import assert_same, gradients, make, make_base, shadow_logits, tokens
from umbra.base.loading import load_base, load_tokenizer
from umbra.cli import main
from umbra.data import Collator, encode_all, read_records
from umbra.training.train import train

LAMBDA = 0.5
NARROW = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1}
MODELS = {
    "llama": {},
    "peft": {"dialect": "peft", "shadow_num_hidden_layers": 2},
    "gpt2": {"name": "gpt2"},
    "gemma3": {"name": "gemma3_text"},
    "moe": {"name": "qwen3_moe"},
    "narrow": {**NARROW, "shadow_head_dim": 8},
    "own_embeddings": {"embeddings": "own"},
    "trained_heads": {"train_heads": True},
    "scaled": {"input_scale": "measured"},
    "no_auxiliary": {"auxiliary_loss_weight": 0.0},
    "no_auxiliary_heads": {"train_heads": True, "auxiliary_loss_weight": 0.0},
}
WRAP = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
FSDP = {
    "full": {**WRAP, "state_dict_type": "FULL_STATE_DICT"},
    "sharded": {**WRAP, "state_dict_type": "SHARDED_STATE_DICT"},
    "ram_efficient": {**WRAP, "cpu_ram_efficient_loading": True},
    "checkpointed": {**WRAP, "activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def pair():
    processes = Pair()
    yield processes
    processes.stop()


def reference(cache={}, **options):  # noqa: B006 (a cache over the module)
    """`ranks.step` of one process."""
    key = json.dumps(options, sort_keys=True)
    if key not in cache:
        cache[key] = ranks.step(**options)
    return cache[key]


def assert_same_step(answers, expected, rtol=1e-4):
    for loss, found, *_ in answers:
        torch.testing.assert_close(loss, expected[0])
        assert_same(found, expected[1], rtol)


# -- one step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("ddp", marks=pytest.mark.compat("Distributed", "DDP", "no unused parameters to find")),
        pytest.param("blocks", marks=pytest.mark.compat("Distributed", "FSDP2, `fully_shard` per block")),
        pytest.param("root", marks=pytest.mark.compat("Distributed", "FSDP2, `fully_shard` of the whole model")),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_equal_one(pair, engine, model):
    """Rank 0 has 1 of 6 rows and the fewest labels: a mean per rank would show."""
    assert_same_step(pair(ranks.step, engine, **MODELS[model]), reference(**MODELS[model]))


@pytest.mark.parametrize("engine", ["ddp", "blocks"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.compat("Distributed", "Activation checkpointing inside the model", "both kinds, under DDP and FSDP2")
def test_model_checkpointing_equals_one_rank(pair, engine, reentrant):
    options = {"shadow_num_hidden_layers": 2}
    assert_same_step(pair(ranks.step, engine, inside=reentrant, **options), reference(**options))


@pytest.mark.parametrize("engine", ["none", "ddp", "blocks"])
@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
@pytest.mark.parametrize("before", [True, False], ids=["before_attach", "after_attach"])
@pytest.mark.compat(
    "Distributed",
    "Activation checkpointing around blocks",
    "`checkpoint_wrapper`, both kinds, before or after `attach`",
)
def test_block_checkpoint_wrappers_equal_one_rank(pair, engine, kind, before):
    run = ranks.step if engine == "none" else lambda *a, **k: pair(ranks.step, *a, **k)
    found = run(engine, wrapped_by=kind, before_attach=before)
    assert_same_step([found] if engine == "none" else found, reference())


def test_bfloat16_shards_equal_bfloat16_model(pair):
    """FSDP2's MixedPrecisionPolicy: float32 weights and gradients, computed as in a model of bfloat16."""
    model = make().train().bfloat16()
    loss = model(**ranks.share()).loss
    loss.backward()
    expected = gradients(model)
    for found_loss, found in pair(ranks.step, "bf16"):
        torch.testing.assert_close(found_loss, loss.detach().float(), rtol=2e-2, atol=0)
        for name, value in expected.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - value).norm() < 0.1 * value.norm(), name


@pytest.mark.parametrize(
    ("plugin", "options", "units"),
    [
        (WRAP, {}, 8),
        (WRAP, {"base_options": {"tie_word_embeddings": True}}, 8),
        (WRAP, {"name": "gpt2"}, 8),
        ({**WRAP, "cpu_ram_efficient_loading": False}, {}, 8),
        ({**WRAP, "reshard_after_forward": False}, {"train_heads": True}, 8),
        ({**WRAP, "activation_checkpointing": True}, {}, 13),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1_000_000}, {}, 3),
        ({"auto_wrap_policy": "NO_WRAP"}, {}, 3),
    ],
    ids=["blocks", "tied", "tied_gpt2", "no_meta", "kept", "checkpointed", "size", "none"],
)
@pytest.mark.compat("Distributed", "FSDP2 by accelerate", "its wrapping policies, its activation checkpointing")
def test_accelerate_wrap_policies_equal_one_rank(pair, plugin, options, units):
    """Units: 4 blocks of the base, 1 of the shadow, the embeddings, the head (with tied embeddings in it), the model."""
    answers = pair(ranks.accelerated, plugin, **options)
    assert_same_step(answers, reference(**options))
    assert answers[0][2] == units


def test_size_wrap_policy_fails_as_with_base(pair):
    """accelerate 1.15 hands torch's fully_shard the list of the blocks, which has no forward."""
    plugin = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1000}
    for bare in (False, True):
        with pytest.raises(AssertionError, match="fully_shard does not support containers"):
            pair(ranks.accelerated, plugin, bare=bare)


@pytest.mark.compat(
    "Distributed", "bf16 mixed precision", "accelerate's, under DDP and FSDP2; FSDP2's MixedPrecisionPolicy"
)
def test_accelerate_bfloat16_equals_bfloat16_model(pair):
    """Near the step in float32, with float32 weights."""
    loss, expected = reference()
    for found_loss, found, _ in pair(ranks.accelerated, WRAP, mixed_precision="bf16"):
        torch.testing.assert_close(found_loss, loss, rtol=1e-2, atol=0)
        for name, value in expected.items():
            assert found[name].dtype == torch.float32
            assert torch.cosine_similarity(found[name].flatten(), value.flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("engine", ["ddp", "blocks"])
def test_inactive_adapter_is_ignored(pair, engine):
    assert_same_step(pair(ranks.step, engine, resting=True), reference())


@pytest.mark.parametrize("scale", ["none", "measured"])
@pytest.mark.parametrize("empty", [False, True], ids=["loaded", "meta"])
@pytest.mark.compat(
    "Distributed", "RAM-efficient loading", "rank 1 holds the base without weights; FSDP2 hands them out"
)
def test_ram_efficient_loading_equals_one_rank(pair, tmp_path, empty, scale):
    given = {"auxiliary_loss_weight": LAMBDA, "input_scale": scale}
    make(**given).save_pretrained(tmp_path)
    assert_same_step(pair(ranks.ram_efficient, str(tmp_path), empty), reference(**given))


@pytest.mark.parametrize("engine", ["none", "blocks"], ids=["whole", "sharded"])
@pytest.mark.compat("Distributed", "Saving and generating on several ranks", "a sharded model, too")
def test_all_ranks_may_save_and_generate(pair, tmp_path, engine):
    """Both call save_pretrained; the folder is whole, and written by one of them."""
    model = make()
    expected = model.generate(tokens(2, ranks.LENGTH), max_new_tokens=6, do_sample=False)
    for found in pair(ranks.saved_and_generated, tmp_path, engine):
        assert torch.equal(found, expected)
    assert_same_weights(umbra.load(tmp_path, make_base()), model)
    assert names(tmp_path) == FILES


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, ranks.fit(folder, **RUN)


RUN = {"auxiliary_loss_weight": LAMBDA, "arguments": {"num_train_epochs": 2}}
ENGINES = {
    "ddp": {},
    "ddp_accumulated": {"accumulate": 4},
    **{f"fsdp_{name}": {"fsdp": config} for name, config in FSDP.items()},
    "fsdp_accumulated": {"fsdp": WRAP, "accumulate": 4},
}


def history(log, key):
    return [(h[key], h.get(key.replace("loss", "shadow_loss"))) for h in log if key in h]


def assert_same_run(found, expected, shadow=True):
    """Every logged loss of the task and of the shadow, in training and evaluation, and the weights in the end."""
    for key in ("loss", "eval_loss"):
        mine, theirs = history(found["log"], key), history(expected["log"], key)
        assert len(mine) == len(theirs) > 0
        for a, b in zip(mine, theirs, strict=True):
            assert a == pytest.approx(b if shadow else (b[0], None), abs=1e-5)
    assert_same(found["weights"], expected["weights"])


@pytest.mark.parametrize("engine", ENGINES)
def test_two_rank_run_equals_single_run(pair, alone, tmp_path, engine):
    """The same global batches; what one rank has written is loaded alone and answers alike."""
    first, second = pair(ranks.fit, tmp_path, **ENGINES[engine], **RUN)
    assert_same_run(first, alone[1])
    assert_same_run(second, alone[1])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in alone[0].iterdir()}
    single = {p.name for p in (alone[0] / "checkpoint-2").iterdir()} - {"rng_state.pth"}
    assert {p.name for p in (tmp_path / "checkpoint-2").iterdir()} == single | {"rng_state_0.pth", "rng_state_1.pth"}
    loaded = umbra.load(tmp_path, make_base())
    torch.testing.assert_close(loaded(tokens(2, ranks.LENGTH)).logits, first["logits"])


@pytest.mark.parametrize("state", ["full", "sharded"])
@pytest.mark.compat(
    "Distributed", "transformers Trainer on several ranks", "DDP and FSDP2, full and sharded state dicts"
)
def test_transformers_trainer_runs_sharded(pair, alone, tmp_path, state):
    """A full state dict makes it write the adapter; a sharded checkpoint is merged by accelerate and saved then."""
    found, _ = pair(ranks.fit, tmp_path, kind="plain", fsdp=FSDP[state], **RUN)
    assert_same_run(found, alone[1], shadow=False)
    if state == "sharded":
        from accelerate.utils import merge_fsdp_weights

        merge_fsdp_weights(str(tmp_path / "checkpoint-4/pytorch_model_fsdp_0"), str(tmp_path / "merged"))
        model = make()
        model.load_state_dict(load_file(tmp_path / "merged/model.safetensors"))
        model.save_pretrained(tmp_path)
    loaded = umbra.load(tmp_path, make_base())
    torch.testing.assert_close(loaded(tokens(2, ranks.LENGTH)).logits, found["logits"])


@pytest.fixture(scope="module")
def begun(pair, alone, tmp_path_factory):
    """The folder of a run under an engine."""
    folders = {"one_process": alone[0]}

    def run(engine):
        if engine not in folders:
            folders[engine] = tmp_path_factory.mktemp(engine)
            pair(ranks.fit, folders[engine], **({"fsdp": WRAP} if engine == "fsdp" else {}), **RUN)
        return folders[engine]

    return run


@pytest.mark.parametrize("after", ["one_process", "ddp", "fsdp"])
@pytest.mark.parametrize("before", ["one_process", "ddp", "fsdp"])
@pytest.mark.compat("Distributed", "Resuming on another number of ranks", "one process, DDP, FSDP2, in any order")
def test_run_resumes_under_another_engine(pair, alone, begun, tmp_path, before, after):
    """From the middle of the run; optimizer state, schedule and data order come with it."""
    options = {"resume": str(begun(before) / "checkpoint-2"), **RUN}
    if after == "one_process":
        found = ranks.fit(tmp_path, **options)
    else:
        found = pair(ranks.fit, tmp_path, **({"fsdp": WRAP} if after == "fsdp" else {}), **options)[0]
    assert_same_run(found, alone[1])


@pytest.mark.parametrize("kind", ["umbra", "plain"])
@pytest.mark.parametrize("ranks_and_steps", [(1, 1), (2, 4)], ids=["1_rank", "2_ranks_4_steps"])
@pytest.mark.compat(
    "Distributed", "λ is what was set", "measured through the gradient, on 2 ranks × 4 accumulation steps"
)
def test_effective_lambda_is_independent_of_ranks(pair, tmp_path, kind, ranks_and_steps):
    """From one step of plain SGD on the whole data: (g(λ) − g(0)) · g_aux / g_aux · g_aux."""
    count, accumulate = ranks_and_steps
    data = ranks.examples()
    ids, labels = torch.stack([e["input_ids"] for e in data]), torch.stack([e["labels"] for e in data])
    model = make(auxiliary_loss_weight=1.0)
    start = {k: v.clone() for k, v in model.shadow.state_dict().items()}
    shadow = shadow_logits(model, ids)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(shadow, labels[:, 1:].flatten()).backward()
    auxiliary = {k: p.grad for k, p in model.shadow.named_parameters() if p.grad is not None}

    def gradient(weight):
        options = {
            "kind": kind, "rows": len(data), "accumulate": accumulate, "auxiliary_loss_weight": weight,
            "arguments": {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "save_strategy": "no"},
        }  # fmt: skip
        found = ranks.fit(tmp_path, **options) if count == 1 else pair(ranks.fit, tmp_path, **options)[0]
        return {k: start[k] - found["weights"][k] for k in auxiliary}

    with_it, without = gradient(LAMBDA), gradient(0.0)
    dot = sum(((with_it[k] - without[k]) * auxiliary[k]).sum() for k in auxiliary)
    assert float(dot / sum(g.square().sum() for g in auxiliary.values())) == pytest.approx(LAMBDA, rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.compat("Distributed", "DeepSpeed ZeRO-2 and ZeRO-3", "with `umbra.ShadowTrainer`; tested on CPU over gloo")
def test_deepspeed_run_equals_single_run(pair, alone, tmp_path, stage, accumulate):
    """accelerate keeps DeepSpeed from CPUs; let by, it runs there. Its checkpoints resume; the adapter is whole."""
    pytest.importorskip("deepspeed")
    first, _ = pair(ranks.fit, tmp_path, zero=stage, accumulate=accumulate, **RUN)
    loaded = umbra.load(tmp_path, make_base())
    torch.testing.assert_close(loaded(tokens(2, ranks.LENGTH)).logits, first["logits"])
    first["weights"] = loaded.shadow.state_dict()
    assert_same_run(first, alone[1])
    if accumulate == 1:
        again, _ = pair(ranks.fit, tmp_path / "again", zero=stage, resume=str(tmp_path / "checkpoint-2"), **RUN)
        again["weights"] = umbra.load(tmp_path / "again", make_base()).shadow.state_dict()
        assert_same_run(again, alone[1])


# -- launched ----------------------------------------------------------------------------------------------------------


def launch(*arguments):
    """What a user types; the launcher offers several CPU processes only as --multi_gpu."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "-m", "umbra", *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def settings(tmp_path, base_folder):
    records = [{"prompt": f"{a}+{b}=", "completion": str(a + b) * (1 + b % 3)} for a in range(5) for b in range(4)]
    for file, part in (("train", records), ("eval", records[:8])):
        (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return {
        "base": base_folder, "train_data": f"{tmp_path}/train.jsonl", "eval_data": f"{tmp_path}/eval.jsonl",
        "output_dir": str(tmp_path / "out"), "rank": 4,
        "alpha": 1.0, "auxiliary_loss_weight": LAMBDA, "dropout": 0.0, "learning_rate": 1e-2, "logging_steps": 1,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True,
    }  # fmt: skip


@pytest.mark.compat(
    "Distributed", "`accelerate launch -m umbra train`", "two processes equal one with the same global batch"
)
def test_torchrun_trains(settings, tmp_path):
    """The losses and weights of one process; every line and file once; the same command again is answered from the run."""
    alone = {**settings, "output_dir": str(tmp_path / "alone"), "disable_tqdm": True}
    expected = train(alone)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}))
    done = launch("train", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    runs = {k: json.loads((tmp_path / k / "run.json").read_text()) for k in ("out", "alone")}
    for key in ("loss", "eval_loss"):
        pairs = zip(history(runs["out"]["history"], key), history(runs["alone"]["history"], key), strict=True)
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in pairs)
    assert_same(load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "alone" / WEIGHTS))
    assert names(tmp_path / "out") == names(tmp_path / "alone")
    assert done.stdout.count("trainable_parameters") == 1
    assert done.stdout.count("'train_loss'") == 1
    assert done.stdout.count("'learning_rate'") == expected["global_step"]
    assert done.stderr.count(f" 0/{expected['global_step']} [00:00<?") == 1
    assert (
        train({**settings, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}) == runs["out"]["metrics"]
    )


def test_zero3_partitioned_base_trains(pair, settings, tmp_path):
    """The fingerprint is of the whole base, the folder is whole; a copy of missing heads is refused."""
    pytest.importorskip("deepspeed")
    with pytest.raises(AssertionError, match="ZeRO-3 has partitioned this base already"):
        pair(
            ranks.train_with_zero3,
            {**settings, "train_heads": True, "use_cpu": False, "output_dir": str(tmp_path / "no")},
        )
    found, _ = pair(ranks.train_with_zero3, {**settings, "use_cpu": False, "per_device_eval_batch_size": 4})
    model = umbra.load(settings["output_dir"]).eval()
    examples = encode_all(read_records(settings["eval_data"], "train"), load_tokenizer(settings["base"]), max_length=99)
    with torch.no_grad():
        out = model(**Collator(0)(examples))
    assert found["eval_loss"] == pytest.approx(float(out.loss), abs=1e-4)
    assert found["eval_shadow_loss"] == pytest.approx(float(out.shadow_loss), abs=1e-4)


def test_partitioned_base_reads_as_whole(pair, settings, tmp_path):
    """Copied blocks and measured channels; nothing is learned at a rate of 0."""
    pytest.importorskip("deepspeed")
    more = {"init": "base", "input_scale": "measured", "learning_rate": 0.0, "use_cpu": False}
    pair(ranks.train_with_zero3, {**settings, **more, "output_dir": str(tmp_path / "still")})
    found = umbra.load(tmp_path / "still").shadow
    whole = umbra.attach(load_base(settings["base"]), found.config).shadow.state_dict()
    read = {k: v for k, v in found.state_dict().items() if k.startswith("backbone.") or k.endswith(".channels")}
    assert any(k.endswith(".channels") for k in read)
    for key, value in read.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-6)
    assert all(float(v.std()) > 0 for k, v in read.items() if k.endswith(".channels"))


def test_invalid_configuration_is_reported_once(settings, tmp_path):
    """By rank 0, in one line; what follows is the launcher's own report."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "rnk": 4}))
    done = launch("train", str(file))
    assert done.returncode != 0
    assert done.stderr.count("umbra: error:") == 1
    assert "Did you mean 'rank'?" in done.stderr
    assert "src/umbra/" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_error_on_one_rank_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("umbra.cli.PATIENCE", 0)
    assert main(["train", "--rnk", "4"]) == 2
    assert capsys.readouterr().err.count("umbra: error:") == 1
