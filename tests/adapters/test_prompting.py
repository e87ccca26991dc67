"""The adapter folder carries how the adapter is asked, and whoever opens it asks so."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

import umbra
from support.folders import CONFIG, FIXTURES, names
from support.runs import RECORDS, train_settings, write
from support.tiny import make, make_base, tokens
from support.tokenizer import CHARACTERS, make_tokenizer
from umbra.adapters.prompting import FORMAT_2_PROMPTING, Prompting, open_formatter
from umbra.base.loading import load_tokenizer
from umbra.cli import main
from umbra.deploy.convert import convert
from umbra.training.train import train

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

# TRL 1.16's own use of old names of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*:FutureWarning")
THINKING = (
    "{% set thoughts = '[]' if enable_thinking is defined and not enable_thinking else '' %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ thoughts if m['role'] == 'assistant' }}{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ thoughts }}{% endif %}"
)


@pytest.fixture
def settings(tmp_path, base_folder):
    return train_settings(tmp_path, base_folder)


def thinking_tokenizer(template: str = THINKING):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def beside(base_folder, **fields):
    """A model beside the base in the folder, which has a tokenizer."""
    from umbra.base.loading import load_base

    return umbra.attach(load_base(base_folder), umbra.ShadowConfig(rank=2, **fields)).eval()


def prompts_of(folder, base_folder, *flags):
    """The prompts that `umbra eval` puts to an adapter."""
    data = write(folder.parent / "asked.jsonl", RECORDS[:2])
    out = folder.parent / "replies.jsonl"
    assert main(["eval", str(folder), data, "--modes", "attached", "--output", str(out), *flags]) == 0
    return [json.loads(line)["prompt"] for line in out.read_text().splitlines()]


# -- written by every way of saving ------------------------------------------------------------------------------------


def test_adapter_trained_without_template_is_prompted_without(settings, tmp_path, capsys):
    train({**settings, "chat_template": False, "max_steps": 1})
    asked = prompts_of(tmp_path / "out", settings["base"])
    assert asked == [r["prompt"] for r in RECORDS[:2]]
    assert "overrides" not in capsys.readouterr().err
    asked = prompts_of(tmp_path / "out", settings["base"], "--chat_template", "true")
    assert asked == [f"<|user|>{r['prompt']}<eos>\n<|assistant|>" for r in RECORDS[:2]]
    assert "umbra: chat_template true overrides the adapter's false" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "the adapter's tokenizer, without a chat template" in capsys.readouterr().out
    assert "without a chat template" in (tmp_path / "out/README.md").read_text()


def test_template_arguments_apply_to_training_and_prompting(settings, tmp_path, base_folder, capsys):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(base)
    thinking_tokenizer().save_pretrained(base)
    given = {"base": str(base), "max_steps": 1, "save_steps": 1}
    train({**settings, **given, "chat_template_kwargs": {"enable_thinking": False}})
    for folder in ("out", "out/checkpoint-1"):
        assert prompts_of(tmp_path / folder, base)[0].endswith("<|assistant|>[]")
    overridden = prompts_of(tmp_path / "out", base, "--chat_template_kwargs", "{}")
    assert overridden[0].endswith("<|assistant|>")
    assert "umbra: chat_template_kwargs {} overrides the adapter's" in capsys.readouterr().err
    assert main(["detach", str(tmp_path / "out"), str(tmp_path / "edge")]) == 0
    assert (
        main(["export", str(tmp_path / "edge"), "--to", "hf", "--out", str(tmp_path / "hf"), "--max_new_tokens", "2"])
        == 0
    )
    capsys.readouterr()
    main(["export", str(tmp_path / "edge"), "--to", "hf", "--out", str(tmp_path / "x"), "--chat_template", "no"])
    assert "umbra: chat_template false overrides the adapter's true" in capsys.readouterr().err
    for folder in ("edge", "hf"):
        noted = json.loads((tmp_path / folder / "generation_config.json").read_text())["prompting"]
        assert noted == {"chat_template": True, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--chat_template_kwargs", "enable"], "expected a JSON object"),
        (["--chat_template_kwargs", '{"tokenize": true}'], "tokenize"),
        (["--chat_template_kwargs", "[1]"], "expected a JSON object"),
    ],
)
def test_unusable_template_arguments_are_refused(given, message, settings, capsys):
    flags = [x for k, v in settings.items() for x in (f"--{k}", str(v))]
    try:
        code = main(["train", *flags, *given])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["no mapping", ["enable_thinking"], {"when": 2 + 1j}, {"messages": []}, {1: 2}])
def test_template_arguments_must_map_to_json_values(value, settings):
    with pytest.raises(umbra.ConfigError, match="chat_template_kwargs"):
        train({**settings, "chat_template_kwargs": value})


def trained(kind: str, model, tokenizer, out) -> None:
    """One step of a trainer, which saves into ``out``."""
    options = {
        "output_dir": str(out), "max_steps": 1, "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2,
        "save_steps": 1, "logging_steps": 1, "bf16": False, "activation_checkpointing": False,
    }  # fmt: skip
    rows = [{"input_ids": r.tolist(), "labels": r.tolist()} for r in tokens(4)]
    texts = Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in RECORDS[:4]])
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    if kind == "Trainer":
        trainer = Trainer(model, TrainingArguments(**options), train_dataset=rows, processing_class=tokenizer)
    elif kind == "ShadowTrainer":
        trainer = umbra.ShadowTrainer(
            model, TrainingArguments(**options), train_dataset=rows, processing_class=tokenizer
        )
    elif kind == "SFTTrainer":
        trainer = umbra.with_shadow_loss(trl.SFTTrainer)(
            model, trl.SFTConfig(**options, max_length=32), train_dataset=texts, processing_class=tokenizer
        )
    elif kind == "DPOTrainer":
        trainer = umbra.with_shadow_loss(trl.DPOTrainer)(
            model, args=trl.DPOConfig(**options, max_length=32), train_dataset=pairs, processing_class=tokenizer
        )
    else:
        trainer = umbra.with_shadow_loss(trl.GRPOTrainer)(
            model, reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=trl.GRPOConfig(
                **options, num_generations=2, max_completion_length=4, chat_template_kwargs={"enable_thinking": False}
            ),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 4), processing_class=tokenizer,
        )  # fmt: skip
    trainer.train()
    trainer.save_model()


@pytest.mark.parametrize("kind", ["Trainer", "ShadowTrainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer"])
def test_each_trainer_saves_tokenizer(kind, tmp_path, base_folder, capsys):
    tokenizer = thinking_tokenizer()
    trained(kind, beside(base_folder), tokenizer, tmp_path)
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        formatter = open_formatter(umbra.load(folder))
        assert formatter.tokenizer.chat_template == THINKING
        assert formatter.chat_template_kwargs == ({"enable_thinking": False} if kind == "GRPOTrainer" else {})
    assert "the adapter's tokenizer is used; the base's has another chat template" in capsys.readouterr().err


def test_tokenizer_survives_resave_and_upload(tmp_path, base_folder):
    model = beside(base_folder)
    model.save_pretrained(
        tmp_path / "a", tokenizer=thinking_tokenizer(), chat_template_kwargs={"enable_thinking": False}
    )
    umbra.load(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert names(tmp_path / "a") == names(tmp_path / "b")
    first, second = (json.loads((tmp_path / n / CONFIG).read_text()) for n in "ab")
    assert first["prompting"] == second["prompting"] and first["prompting"]["tokenizer"]
    again = open_formatter(umbra.load(tmp_path / "b"))
    assert again.ask("q") == "<|user|>q<eos>\n<|assistant|>[]"
    other = beside(base_folder)
    other.load_adapter(tmp_path / "b", "second")
    other.set_adapter("second")
    assert open_formatter(other).ask("q") == again.ask("q")


def test_upload_includes_tokenizer(tmp_path, base_folder, monkeypatch):
    uploaded = []

    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **how):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **how):
            uploaded.append(
                (names(Path(folder_path)), json.loads((Path(folder_path) / CONFIG).read_text())["prompting"])
            )

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    given = {"tokenizer": thinking_tokenizer(), "chat_template": False}
    beside(base_folder).save_pretrained(tmp_path / "a", push_to_hub=True, **given)
    umbra.load(tmp_path / "a").push_to_hub("owner/a")
    expected = json.loads((tmp_path / "a" / CONFIG).read_text())["prompting"]
    assert uploaded == [(names(tmp_path / "a"), expected)] * 2 and expected["chat_template"] is False


def test_export_for_peer_package_includes_tokenizer(tmp_path, base_folder):
    model = beside(base_folder, dialect="peft")
    model.save_pretrained(tmp_path / "a", tokenizer=thinking_tokenizer())
    convert(umbra.load(tmp_path / "a"), tmp_path / "b", "peft")
    assert open_formatter(umbra.load(tmp_path / "b")).tokenizer.chat_template == THINKING


def test_resave_drops_previous_adapters_tokenizer(tmp_path, base_folder):
    beside(base_folder).save_pretrained(tmp_path, tokenizer=thinking_tokenizer())
    (tmp_path / "notes.txt").write_text("mine")
    beside(base_folder).save_pretrained(tmp_path, overwrite=True)
    assert names(tmp_path) == {CONFIG, "adapter_model.safetensors", "README.md", "notes.txt"}
    assert open_formatter(umbra.load(tmp_path)).tokenizer.chat_template == make_tokenizer().chat_template


@pytest.mark.parametrize("order", ["before", "after"])
def test_tokenizer_in_adapter_folder_is_used(order, tmp_path, base_folder):
    if order == "before":
        thinking_tokenizer().save_pretrained(tmp_path)
    beside(base_folder).save_pretrained(tmp_path)
    if order == "after":
        thinking_tokenizer().save_pretrained(tmp_path)
    assert open_formatter(umbra.load(tmp_path)).tokenizer.chat_template == THINKING


def test_base_tokenizer_is_the_fallback(tmp_path, base_folder, capsys):
    beside(base_folder).save_pretrained(tmp_path)
    formatter = open_formatter(umbra.load(tmp_path))
    assert formatter.tokenizer.get_vocab() == load_tokenizer(base_folder).get_vocab()
    assert formatter.chat_template_kwargs == {} and "umbra:" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["processing_class", "tokeniser", "chat_templates"])
def test_unknown_save_argument_is_refused(name, tmp_path):
    with pytest.raises(umbra.ConfigError, match=name):
        make().save_pretrained(tmp_path, **{name: make_tokenizer()})


# -- what does not fit -------------------------------------------------------------------------------------------------


def larger_tokenizer(count: int = 30):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(count)])
    return tokenizer


def renamed_tokenizer():
    """One whose token 2, the end, is another one."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<bos>", "<stop>", "<unk>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<stop>")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (larger_tokenizer(), "tokens beyond the 99 rows"),
        (renamed_tokenizer(), "token 2 is '<stop>', but '<eos>' in the base's"),
    ],
)
def test_tokenizer_larger_than_base_is_refused(tokenizer, message, tmp_path, base_folder):
    model = beside(base_folder)
    with pytest.raises(umbra.ConfigError, match=message):
        model.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(umbra.CheckpointError, match=message):
        open_formatter(umbra.load(tmp_path))


def test_changed_tokenizer_is_refused(tmp_path, base_folder):
    beside(base_folder).save_pretrained(tmp_path, tokenizer=make_tokenizer())
    file = tmp_path / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"<eos>"', '"<end>"'))
    with pytest.raises(umbra.CheckpointError, match="was changed after"):
        umbra.load(tmp_path)
    file.unlink()
    with pytest.raises(umbra.CheckpointError, match="is missing"):
        umbra.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": "no"}, {"chat_template_kwargs": []}, {"tokenizer": {"../x": None}}, {"more": 1}, {"tokenizer": ["a"]},
        {"tokenizer": {"adapter_config.json": None}},
        {"tokenizer": {"\x1b[31m.json": None}}, {"chat_template_kwargs": {"tokenize": True}},
    ],
)  # fmt: skip
def test_damaged_prompting_entry_is_refused(change, tmp_path, base_folder):
    beside(base_folder).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    values["prompting"] |= change
    values["sha256"] = None
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(umbra.CheckpointError, match="damaged"):
        umbra.load(tmp_path)


def test_digest_covers_prompting(tmp_path, base_folder):
    beside(base_folder).save_pretrained(tmp_path, chat_template=False)
    values = json.loads((tmp_path / CONFIG).read_text())
    values["prompting"]["chat_template"] = True
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(umbra.CheckpointError, match="changed after"):
        umbra.load(tmp_path)


def test_processor_with_tokenizer_is_saved(tmp_path, base_folder):
    tokenizer = thinking_tokenizer()
    processor = SimpleNamespace(
        tokenizer=tokenizer, chat_template=THINKING, save_pretrained=lambda out, **_: tokenizer.save_pretrained(out)
    )
    beside(base_folder).save_pretrained(tmp_path, tokenizer=processor)
    assert open_formatter(umbra.load(tmp_path)).tokenizer.chat_template == THINKING


# -- adapters of format 2 ----------------------------------------------------------------------------------------------


def test_format_2_adapter_keeps_its_prompting(tmp_path):
    model = umbra.load(FIXTURES / "format2" / "causal", make_base())
    assert model.shadow.prompting == FORMAT_2_PROMPTING == Prompting(None, True, {"enable_thinking": False})
    model.save_pretrained(tmp_path)
    assert umbra.load(tmp_path, make_base()).shadow.prompting == FORMAT_2_PROMPTING


def test_equal_tokenizers_are_shared(tmp_path, base_folder):
    model = beside(base_folder)
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer())
    model.load_adapter(tmp_path, "a")
    model.load_adapter(tmp_path, "b")
    assert model.adapter("a").prompting.tokenizer is model.adapter("b").prompting.tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == make_tokenizer().get_vocab()


def test_generate_prompts_as_in_training(tmp_path, base_folder, monkeypatch, capsys):
    model = beside(base_folder)
    model.save_pretrained(tmp_path, tokenizer=thinking_tokenizer(), chat_template_kwargs={"enable_thinking": False})
    asked = []
    plain = umbra.model.causal_lm.ShadowForCausalLM.generate
    monkeypatch.setattr(
        umbra.model.causal_lm.ShadowForCausalLM,
        "generate",
        lambda self, **g: asked.append(g["input_ids"]) or plain(self, **g),
    )
    assert main(["generate", str(tmp_path), "hi", "--max_new_tokens", "2", "--json"]) == 0
    text = make_tokenizer().decode(asked[0][0])
    assert text == make_tokenizer().decode(make_tokenizer()("<|user|>hi<eos>\n<|assistant|>[]")["input_ids"])
    assert torch.is_tensor(asked[0])
