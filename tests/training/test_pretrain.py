"""``umbra pretrain``: what is learned, from which text, how it goes on after a kill, and what comes out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

import umbra
from support.runs import NARROW, TEXT, pretrain_settings
from support.tiny import LLAMA_LIKE, make, make_base, randomise, tokens
from support.tokenizer import make_tokenizer
from umbra.cli import main
from umbra.data import ChatFormatter
from umbra.method import divergences as divergence
from umbra.method.divergences import KINDS, teacher_log_probs
from umbra.model import causal_lm
from umbra.training import pretrain, stages
from umbra.training.train import train


@pytest.fixture
def settings(tmp_path, base_folder):
    return pretrain_settings(tmp_path, base_folder)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_stages_improve_metrics_and_write_stock_model(settings, tmp_path):
    found = pretrain.pretrain({**settings, "stages": "distillation,next_token", "max_steps": 30})
    start, distilled, taught = found["start"], found["1-distillation"], found["2-next_token"]
    assert distilled["divergence"] < 0.8 * start["divergence"]
    assert distilled["agreement"] > start["agreement"]
    assert taught["cross_entropy"] < distilled["cross_entropy"] < start["cross_entropy"] + 0.5
    stock = AutoModelForCausalLM.from_pretrained(settings["output_dir"]).eval()
    model = umbra.attach(
        umbra.base.loading.load_base(settings["base"]), umbra.ShadowConfig(shadow=settings["output_dir"])
    ).eval()
    assert not model.shadow.owns_embeddings, "the table is the base's own"
    ids = tokens(2)
    with torch.no_grad(), model.shadow_only():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    text = json.loads((tmp_path / "out" / "run.json").read_text())
    assert text["metrics"] == found
    assert "| 2-next_token |" in (tmp_path / "out" / "README.md").read_text()
    assert pretrain.pretrain({**settings, "stages": "distillation,next_token", "max_steps": 30}) == found


def test_metrics_match_their_formulas(settings):
    model = make()
    blocks = tokens(3, 12).numpy()
    found = pretrain.measure(model, blocks, 2)
    ids = torch.as_tensor(blocks)
    with torch.no_grad():
        with model.shadow_only():
            z = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        with model.disable_adapter():
            t = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    assert found["cross_entropy"] == pytest.approx(float(F.cross_entropy(z, ids[:, 1:].flatten())), rel=1e-5)
    p, q = (x.double().softmax(-1) for x in (t, z))
    assert found["divergence"] == pytest.approx(float((p * (p / q).log()).sum()) / len(z), rel=1e-5)
    assert found["agreement"] == pytest.approx(float((z.argmax(-1) == t.argmax(-1)).double().mean()))


FORMS = {
    "forward": {},
    "both": {"stages": "distillation+next_token"},
    "reverse": {"divergence": "reverse", "temperature": 2.0},
    "js of the likeliest": {"divergence": "js", "teacher_top_k": 5},
    "both of the likeliest": {"stages": "distillation+next_token", "teacher_top_k": 5},
}


@pytest.mark.parametrize("form", FORMS)
def test_stage_loss_matches_formula(settings, form):
    """At a rate of 0, of one batch that holds every block: written out."""
    every = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 10**4}
    pretrain.pretrain({**settings, **every, **FORMS[form]})
    run = json.loads(Path(settings["output_dir"], "run.json").read_text())
    [logged] = [entry["loss"] for entry in run["history"] if "loss" in entry]
    base = umbra.base.loading.load_base(settings["base"])
    torch.manual_seed(3)
    model = umbra.attach(base, umbra.ShadowConfig())
    asked = umbra.options.PretrainOptions(
        **{k: v for k, v in settings.items() if k in ("base", "data", "max_length", "held_out")}
    )
    writer = ChatFormatter(umbra.base.loading.load_tokenizer(settings["base"]))
    train_set, _ = pretrain._mix(asked, pretrain._documents(asked, writer), writer, 3)
    losses = []
    for i in range(len(train_set)):
        ids = train_set[i]["input_ids"][None]
        with torch.no_grad():
            with model.shadow_only():
                z = model(input_ids=ids).logits[0, :-1]
            with model.disable_adapter():
                t = model(input_ids=ids).logits[0, :-1]
        chosen = {
            "divergence": "forward",
            "temperature": 1.0,
            "teacher_top_k": None,
            "stages": "distillation",
            **FORMS[form],
        }
        told = teacher_log_probs(t, chosen["temperature"], chosen["teacher_top_k"])
        loss = divergence.divergence(z, told, chosen["divergence"], chosen["temperature"])
        loss = loss + (F.cross_entropy(z, ids[0, 1:], reduction="sum") if "next_token" in chosen["stages"] else 0)
        losses.append(float(loss) / len(z))
    assert logged == pytest.approx(np.mean(losses), rel=1e-4)


class Killed(Exception):
    pass


def killed(*_, **__):
    raise Killed


def test_killed_run_resumes(settings, monkeypatch, tmp_path):
    """Killed in the first stage, and again in the second, both times beyond a checkpoint."""
    settings = {**settings, "stages": "next_token,distillation"}
    whole = pretrain.pretrain({**settings, "output_dir": str(tmp_path / "whole")})
    made, steps = pretrain.Pretrainer.__init__, []

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **told):
            steps.append(state.global_step)
            if len(steps) in (6, 6 + 8 + 6):
                raise Killed

    def killed(self, *args, **options):
        made(self, *args, **options)
        self.add_callback(Kill)

    monkeypatch.setattr(pretrain.Pretrainer, "__init__", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            pretrain.pretrain(settings)
    found = pretrain.pretrain(settings)
    assert steps == [*range(1, 7), *range(5, 13), *range(1, 7), *range(5, 13)]
    for stage in ("1-next_token", "2-distillation"):
        assert found[stage] == pytest.approx(whole[stage], rel=1e-4)


def test_base_generated_text_is_trained_on(settings, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    own = {"data": None, "prompts": str(tmp_path / "prompts.txt"), "own_documents": 40, "own_new_tokens": 20}
    found = pretrain.pretrain({**settings, **own, "max_length": 16})
    assert found["1-distillation"]["divergence"] < found["start"]["divergence"]
    lines = (tmp_path / "out" / "own.jsonl").read_text().splitlines()
    assert len(lines) == 40
    mixed = {**own, "data": settings["data"], "weights": "1,2", "output_dir": str(tmp_path / "mixed")}
    assert "start" in pretrain.pretrain({**settings, **mixed, "max_length": 16})


def test_narrow_shadow_has_own_embeddings(settings):
    pretrain.pretrain({**settings, **NARROW})
    model = umbra.attach(
        umbra.base.loading.load_base(settings["base"]), umbra.ShadowConfig(shadow=settings["output_dir"])
    )
    assert model.shadow.owns_embeddings
    assert AutoModelForCausalLM.from_pretrained(settings["output_dir"]).config.hidden_size == 16


def naive_alignment(base, stock):
    """The projection for a base of another width, by numpy's least squares."""
    W, S = (m.get_output_embeddings().weight.detach().double().numpy() for m in (base, stock))
    return torch.as_tensor(np.linalg.lstsq(W, S[: len(W)], rcond=None)[0]).float()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shadow_of_other_width_is_aligned_in_closed_form(settings, tmp_path, kind):
    """Beside the base that it was pretrained for, it says exactly what it says alone; beside another, as nearly as can be."""
    sizes = dict(list(NARROW.items())[: None if kind == "llama" else 2])
    make_base(kind, vocab_size=99).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    settings["base"] = str(tmp_path / "base")
    pretrain.pretrain({**settings, **sizes})
    stock, ids = AutoModelForCausalLM.from_pretrained(settings["output_dir"]).eval(), tokens(2)
    config = umbra.ShadowConfig(shadow=settings["output_dir"])
    model = umbra.attach(umbra.base.loading.load_base(settings["base"]), config).eval()
    with torch.no_grad(), model.shadow_only():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    other = make_base(hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    expected = naive_alignment(other, stock)
    model = umbra.attach(other, config)
    torch.testing.assert_close(model.shadow.projection.weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_shadow_pretrained_for_other_base_is_reported(settings, tmp_path, recwarn):
    """It has no projection to be solved for. Fine-tuned further, a base is no other one; what the warning names helps."""
    pretrain.pretrain(settings)
    config, base = umbra.ShadowConfig(shadow=settings["output_dir"]), umbra.base.loading.load_base(settings["base"])
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(1.5).add_(torch.randn_like(base.get_output_embeddings().weight) * 0.01)
    umbra.attach(base, config)
    assert not [w for w in recwarn if "unrelated weights" in str(w.message)]
    other, taught = str(tmp_path / "other"), str(tmp_path / "taught")
    make_base(vocab_size=99).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.warns(UserWarning, match=f"umbra pretrain --base {other} --shadow {settings['output_dir']}"):
        umbra.attach(umbra.base.loading.load_base(other), config)
    found = pretrain.pretrain({**settings, "base": other, "shadow": settings["output_dir"], "output_dir": taught})
    assert found["1-distillation"]["divergence"] < 0.9 * found["start"]["divergence"]
    recwarn.clear()
    umbra.attach(umbra.base.loading.load_base(other), umbra.ShadowConfig(shadow=taught))
    assert not [w for w in recwarn if "unrelated weights" in str(w.message)]


@pytest.mark.parametrize(("kind", "fields"), [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.25})])
def test_logit_scaling_is_applied_once(settings, tmp_path, kind, fields):
    randomise(AutoConfig.for_model(kind, **{**LLAMA_LIKE, **fields})).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    narrow = {k: v for k, v in NARROW.items() if k != "shadow_head_dim"}  # which these do not have
    pretrain.pretrain({**settings, **narrow, "base": str(tmp_path / "base"), "max_steps": 4})
    stock, ids = AutoModelForCausalLM.from_pretrained(settings["output_dir"]).eval(), tokens(2)
    config = umbra.ShadowConfig(shadow=settings["output_dir"])
    model = umbra.attach(umbra.base.loading.load_base(str(tmp_path / "base")), config).eval()
    with torch.no_grad(), model.shadow_only():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_alignment_trains_projection_only(settings, tmp_path):
    stages = {"stages": "alignment,distillation", "shadow": settings["base"], "output_dir": str(tmp_path / "aligned")}
    base = str(tmp_path / "wider")
    make_base(hidden_size=48, num_attention_heads=4, num_key_value_heads=2).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    found = pretrain.pretrain({**settings, **stages, "base": base, "max_steps": 25})
    assert found["1-alignment"]["divergence"] < found["start"]["divergence"]
    before = umbra.load(tmp_path / "aligned" / "stages" / "1-alignment", umbra.base.loading.load_base(base)).shadow
    stock = AutoModelForCausalLM.from_pretrained(settings["base"])
    for name, p in before.backbone.named_parameters():
        assert torch.equal(p, stock.base_model.get_parameter(name)), name
    with pytest.raises(umbra.ConfigError, match="this one has none"):
        pretrain.pretrain({**settings, "stages": "alignment"})


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "no text": ({"data": None}, "nothing to learn from"),
    "no such file": ({"data": "nowhere.txt"}, "nowhere.txt cannot be read"),
    "no such stage": ({"stages": "distilation"}, "has 'distilation': choose from alignment, distillation, next_token"),
    "no stage": ({"stages": " , "}, "stages is empty"),
    "no such divergence": ({"divergence": "l2"}, "divergence must be one of forward, reverse, js"),
    "no temperature": ({"temperature": 0.0}, "temperature must be more than 0"),
    "weights of others": ({"weights": "1,2"}, "must be a positive number for each of"),
    "no weights": ({"weights": "many"}, "weights must be numbers separated by commas"),
    "an unknown key": ({"stage": "distillation"}, "Did you mean 'stages'"),
    "no output": ({"output_dir": ""}, "output_dir is missing"),
    "blocks too long": (
        {"max_length": 10**6},
        "max_length=1000000 is more than the base's 128 positions",
    ),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor applies to umbra train"),
    "no prompts": ({"prompts": "nowhere.txt"}, "nowhere.txt cannot be read"),
    "a source twice": ({"data": "a.txt,a.txt"}, "names a source twice"),
    "evaluation": ({"eval_strategy": "steps"}, "eval_strategy applies to umbra train"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_invalid_settings_are_refused_early(settings, form, tmp_path):
    changed, message = REFUSED[form]
    with pytest.raises(umbra.UmbraError, match=message):
        pretrain.pretrain({**settings, **changed})
    assert not (tmp_path / "out").exists(), "the next attempt finds the folder free"


def test_source_with_only_duplicates_is_refused(settings, tmp_path):
    (tmp_path / "copy.txt").write_text(Path(settings["data"]).read_text().upper())
    with pytest.raises(umbra.DataError, match=r"All \d+ documents of .*copy.txt duplicate others"):
        pretrain.pretrain({**settings, "data": f"{settings['data']},{tmp_path}/copy.txt"})


def test_generated_text_can_be_used_as_data_file(settings, tmp_path, monkeypatch):
    """Also beside what it writes in this run, which has another name."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"{i} and more " * 9}) + "\n" for i in range(40)))
    monkeypatch.chdir(tmp_path)
    own = {"data": "own.jsonl", "max_length": 16, "max_steps": 1, "save_strategy": "no"}
    pretrain.pretrain({**settings, **own})
    both = {**own, "prompts": "prompts.txt", "own_documents": 30, "own_new_tokens": 20, "weights": "1,2"}
    assert "start" in pretrain.pretrain({**settings, **both, "output_dir": "both"})


def test_plain_kernels_setting_is_accepted(settings):
    with umbra.method.kernels.reference():
        assert "start" in pretrain.pretrain({**settings, "max_steps": 1})


def test_unwritable_output_is_refused_early(settings, monkeypatch):
    def refuse(model):
        raise umbra.DetachError("no such model")

    monkeypatch.setattr(causal_lm.ShadowForCausalLM, "detached", refuse)
    monkeypatch.setattr(pretrain, "_run_stage", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(umbra.DetachError):
        pretrain.pretrain(settings)


def test_folder_of_another_run_is_refused(settings):
    pretrain.pretrain({**settings, "max_steps": 2})
    with pytest.raises(umbra.CheckpointError, match=r"max_steps: 2 → 1\) \(it can be made longer, not shorter"):
        pretrain.pretrain({**settings, "max_steps": 1})
    pretrain.pretrain({**settings, "max_steps": 2, "overwrite": True})


def test_single_stage_run_can_be_extended(settings, tmp_path):
    values = {**settings, "lr_scheduler_type": "constant", "max_steps": 3}
    pretrain.pretrain(values)
    found = pretrain.pretrain({**values, "max_steps": 6})
    whole = pretrain.pretrain({**values, "max_steps": 6, "output_dir": str(tmp_path / "whole")})
    assert found == whole
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(weights[k], v) for k, v in expected.items())
    two = {**values, "stages": "next_token,distillation", "output_dir": str(tmp_path / "two")}
    pretrain.pretrain(two)
    with pytest.raises(umbra.CheckpointError, match=r"max_steps: 3 → 6\) \(a run of several stages"):
        pretrain.pretrain({**two, "max_steps": 6})


def test_changed_data_is_another_run(settings, tmp_path, capsys):
    given = {**settings, "max_steps": 1, "save_strategy": "no"}
    found = pretrain.pretrain(given)
    assert pretrain.pretrain(given) == found and "nothing was trained" in capsys.readouterr().err
    Path(settings["data"]).write_text(TEXT.replace("plus", "and"))
    with pytest.raises(umbra.CheckpointError, match=r"another content of .*text"):
        pretrain.pretrain(given)


def test_answers_to_changed_prompts_are_regenerated(settings, tmp_path):
    """The prompts that are still asked, in their places, keep theirs."""
    prompts, own = tmp_path / "prompts.txt", tmp_path / "out" / "own.jsonl"
    given = {
        **settings,
        "data": None,
        "prompts": str(prompts),
        "own_documents": 12,
        "own_new_tokens": 40,
        "max_steps": 1,
    }

    def written(*lines: str) -> list[str]:
        prompts.write_text("\n".join(lines))
        pretrain.pretrain({**given, "overwrite": True})
        return [json.loads(line)["text"] for line in own.read_text().splitlines()]

    first, second = written("one", "two", "six"), written("one", "two", "ten")
    assert second[:2] == first[:2]
    assert ["ten" in t for t in second] == [i % 3 == 2 for i in range(12)]


INPUTS = {"data": "out/own.jsonl", "prompts": "out/README.md", "base": "out", "shadow": "out", "weights": None}


@pytest.mark.parametrize("name", INPUTS)
def test_failed_start_overwrites_nothing(settings, tmp_path, name):
    """Neither what it would read, nor a finished model where a setting is wrong."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    own = {"prompts": str(tmp_path / "prompts.txt"), "own_documents": 30, "own_new_tokens": 20, "max_steps": 1}
    pretrain.pretrain({**settings, **own})
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    wrong = {name: str(tmp_path / INPUTS[name])} if INPUTS[name] else {"data": "nowhere.txt"}
    with pytest.raises(umbra.UmbraError, match=f"{name}=.*where the run writes" if INPUTS[name] else "cannot be read"):
        pretrain.pretrain({**settings, **own, **wrong, "overwrite": True})
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_generated_text_is_reused_with_other_settings(settings, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    own = {
        "data": None,
        "prompts": str(tmp_path / "prompts.txt"),
        "own_documents": 2,
        "own_new_tokens": 9,
        "max_steps": 1,
    }
    with pytest.raises(umbra.DataError, match="lower it"):
        pretrain.pretrain({**settings, **own, "max_length": 128})
    kept = (tmp_path / "out" / "own.jsonl").read_bytes()
    again = {**settings, **own, "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(type(make()), "generate", lambda *_, **__: pytest.fail("it is written already"))
        pretrain.pretrain({**again, "max_length": 8, "held_out": 1})
    assert (tmp_path / "out" / "own.jsonl").read_bytes() == kept
    pretrain.pretrain({**again, "own_temperature": 0.5, "max_length": 8, "held_out": 1})
    assert (tmp_path / "out" / "own.jsonl").read_bytes() != kept
    (tmp_path / "prompts.txt").write_text("three\nfour\n")
    pretrain.pretrain({**again, "own_temperature": 0.5, "max_length": 8, "held_out": 1})
    assert "three" in (tmp_path / "out" / "own.jsonl").read_text()


def test_mixed_precision_reaches_losses(settings, monkeypatch):
    seen = []
    plain = stages.shadow_states
    monkeypatch.setattr(stages, "shadow_states", lambda *x: seen.append(torch.is_autocast_enabled("cpu")) or plain(*x))
    for on in (False, True):
        pretrain.pretrain({**settings, "output_dir": f"{settings['output_dir']}{on}", "max_steps": 1, "bf16": on})
    measured = seen[: seen.index(True)]
    assert not any(measured) and seen.count(True) == 1


@pytest.mark.parametrize("role", ["shadow", "base"])
def test_model_with_missing_weights_is_refused(settings, tmp_path, role):
    """transformers would make them up."""
    model, folder = make_base(vocab_size=99), tmp_path / "damaged"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.0.mlp.up_proj" not in k}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(umbra.UmbraError, match=r"lacks 1 tensors, model.layers.0.mlp.up_proj.weight first"):
        pretrain.pretrain({**settings, role: str(folder)})
    config = json.loads((folder / "config.json").read_text())
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    with pytest.raises(umbra.UmbraError, match=r"can(not be)? load"):
        pretrain.pretrain({**settings, role: str(folder)})


def test_pretrain_command_runs(settings, tmp_path, capsys):
    flags = [x for k, v in settings.items() for x in (f"--{k}", str(v))]
    assert main(["pretrain", *flags]) == 0
    assert "1-distillation agreement" in capsys.readouterr().out
    assert main(["pretrain", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert main(["pretrain", *flags, "--divergence", "l2"]) == 2
    assert "divergence must be one of" in capsys.readouterr().err


def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in ("distillation", "next_token", *KINDS))


# -- what the base says, kept -----------------------------------------------------------------------------------------

KEPT = {"teacher_top_k": 8, "temperature": 1.5}


@pytest.mark.parametrize("stages", ["distillation", "distillation+next_token"])
def test_cached_teacher_equals_base_teacher(settings, tmp_path, stages):
    def learn(name, **options):
        pretrain.pretrain({**settings, **KEPT, "stages": stages, "output_dir": str(tmp_path / name), **options})
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    fly, kept, other = learn("a"), learn("b", teacher_cache=True), learn("c", temperature=3.0)
    assert all(torch.allclose(fly[k], kept[k], atol=1e-6) for k in fly)
    assert not all(torch.allclose(fly[k], other[k], atol=1e-4) for k in fly)


def test_teacher_cache_is_filled_once_and_resumes(settings, tmp_path, monkeypatch):
    settings |= {**KEPT, "teacher_cache": True, "per_device_eval_batch_size": 4}
    asked, stop = [], 3
    say = pretrain.base_teacher

    def counted(model, ids, options):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(len(ids))
        return say(model, ids, options)

    monkeypatch.setattr(pretrain, "base_teacher", counted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(settings)
    stop = None
    pretrain.pretrain(settings)
    note = json.loads((tmp_path / "out/teacher/teacher.json").read_text())
    assert sum(asked) == note["done"] == note["shape"][0]
    assert note["shape"][1:] == [31, 8]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher_cache": True}, "teacher_top_k"),
        ({"teacher_cache": True, "teacher_top_k": 4, "stages": "next_token"}, "for distillation"),
        ({"teacher_cache": True, "teacher_top_k": 4, "stages": "alignment,distillation"}, "for distillation"),
    ],
)
def test_useless_teacher_cache_is_refused(settings, change, says):
    with pytest.raises(umbra.errors.ConfigError, match=says):
        pretrain.pretrain({**settings, **change})


# -- another tokenizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["pretrain", "train"])
def test_shadow_with_another_tokenizer_is_refused(settings, tmp_path, run):
    pretrain.pretrain({**settings, "max_steps": 1})
    shadow = tmp_path / "out"
    again = {**settings, "shadow": str(shadow), "output_dir": str(tmp_path / "again"), "max_steps": 1}
    if run == "train":
        (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "1", "completion": "2"}) + "\n")
        again |= {"train_data": str(tmp_path / "d.jsonl")}
        for key in ("data", "held_out"):
            del again[key]
    call = pretrain.pretrain if run == "pretrain" else train
    call(again)
    saved = json.loads((shadow / "tokenizer.json").read_text())
    numbers = saved["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    (shadow / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(umbra.ConfigError, match="2 tokens have other numbers"):
        call({**again, "output_dir": str(tmp_path / "third")})


def test_attach_compares_vocabularies(settings, tmp_path):
    """By number: also two that have few words in common."""
    pretrain.pretrain({**settings, "max_steps": 1})
    shadow, base = str(tmp_path / "out"), umbra.base.loading.load_base(settings["base"])
    umbra.attach(base, umbra.ShadowConfig(shadow=shadow)).unload()
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    saved["model"]["vocab"] = {(t if t.startswith("<") else f"other {t}"): i for t, i in words.items()}
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(umbra.ConfigError, match="has another tokenizer than the base"):
        umbra.attach(base, umbra.ShadowConfig(shadow=shadow))


def test_renamed_tokens_and_missing_tokenizer_are_accepted(settings, tmp_path):
    pretrain.pretrain({**settings, "max_steps": 1})
    file = tmp_path / "out" / "tokenizer.json"
    saved, base = json.loads(file.read_text()), umbra.base.loading.load_base(settings["base"])
    token = saved["added_tokens"][-1]
    for words in (saved["model"]["vocab"], {}):
        if token["content"] in words:
            words["<renamed>"] = words.pop(token["content"])
    token["content"] = "<renamed>"
    file.write_text(json.dumps(saved))
    umbra.attach(base, umbra.ShadowConfig(shadow=str(tmp_path / "out"))).unload()
    make_base("qwen3").save_pretrained(tmp_path / "bare")  # transformers would make up a tokenizer of one token
    bare = umbra.base.loading.load_base(str(tmp_path / "bare"))
    umbra.attach(bare, umbra.ShadowConfig(shadow=str(tmp_path / "out")))


def test_unused_rows_are_ignored_in_vocabulary_check(settings, tmp_path):
    """A base whose table is padded further than that of the shadow's own base, with the same tokenizer."""
    pretrain.pretrain({**settings, **NARROW, "max_steps": 1})
    base = umbra.base.loading.load_base(settings["base"])
    base.resize_token_embeddings(base.config.vocab_size + 7, mean_resizing=False)
    model = umbra.attach(base, umbra.ShadowConfig(shadow=str(tmp_path / "out")))
    rows = len(model.shadow.backbone.get_input_embeddings().weight)
    assert rows == base.config.vocab_size
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokens()
    with torch.no_grad():
        said, expected = model.detached()(ids).logits, stock(ids).logits
    assert said.shape[-1] == rows
    torch.testing.assert_close(said[..., : expected.shape[-1]], expected, rtol=1e-3, atol=1e-3)
    (tmp_path / "out" / "tokenizer.json").unlink()
    model.unload()
    with pytest.raises(umbra.BaseModelError, match="they must share one tokenizer"):
        umbra.attach(base, umbra.ShadowConfig(shadow=str(tmp_path / "out")))


def test_text_of_replaced_base_is_not_reused(settings, tmp_path, base_folder, monkeypatch):
    """Nor is what it has said of the text."""
    shutil.copytree(base_folder, tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    given = {
        **settings, "base": str(tmp_path / "base"), "data": None, "prompts": str(tmp_path / "prompts.txt"), "own_documents": 4,
        "own_new_tokens": 20, "max_length": 8, "held_out": 1, "max_steps": 1,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_run_stage", killed)
        with pytest.raises(Killed):
            pretrain.pretrain(given)
    before = (tmp_path / "out/own.jsonl").read_text()
    randomise(AutoConfig.from_pretrained(base_folder), 9).save_pretrained(tmp_path / "base")
    with pytest.raises(umbra.CheckpointError, match=r"another content of .*base"):
        pretrain.pretrain(given)
    pretrain.pretrain({**given, "overwrite": True})
    assert (tmp_path / "out/own.jsonl").read_text() != before


def test_failed_overwriting_run_leaves_old_model(settings, tmp_path):
    pretrain.pretrain({**settings, "max_steps": 1})
    before = load_file(tmp_path / "out/model.safetensors")
    (tmp_path / "prompts.txt").write_text("one\n")
    own = {"data": None, "prompts": str(tmp_path / "prompts.txt"), "own_documents": 1, "own_new_tokens": 3}
    with pytest.raises(umbra.DataError, match="lower it"):
        pretrain.pretrain({**settings, **own, "max_length": 64, "overwrite": True})
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shared_table_is_recognised_in_another_precision(base_folder, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype).save_pretrained(tmp_path / "shadow")
    config = umbra.ShadowConfig(shadow=str(tmp_path / "shadow"))
    for change, owns in ((1.0, False), (1.02, True)):
        for kind in (torch.float32, torch.float16):
            base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=kind)
            with torch.no_grad():
                base.get_input_embeddings().weight[3] *= change
            assert umbra.attach(base, config).shadow.owns_embeddings == owns


def test_teacher_runs_without_dropout(tmp_path):
    model = umbra.attach(make_base("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5), umbra.ShadowConfig())
    for module in model.base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    expected = stages.base_states(model.eval(), batch)
    assert torch.equal(stages.base_states(model.train(), batch), expected)
    assert model.base.training


def test_top_k_beyond_vocabulary_uses_all_tokens(settings, tmp_path):
    pretrain.pretrain({**settings, "teacher_cache": True, "teacher_top_k": 10**6, "max_steps": 1})
    assert json.loads((tmp_path / "out/teacher/teacher.json").read_text())["shape"][2] == 99


def test_meaningless_settings_are_refused(settings):
    pretrain.pretrain({**settings, "max_steps": 1, "remove_unused_columns": True})
    with pytest.raises(umbra.ConfigError, match="set it for umbra train"):
        pretrain.pretrain({**settings, "escalation": "[REMOTE]"})
