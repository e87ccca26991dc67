"""Hostile input, drawn at random: adapter folders (see fuzz.py), training configurations, YAML. Ten thousand cases by hand."""

import json
import random
import warnings

import pytest
from transformers import TrainingArguments

from support.fuzz import Failed, Fuzzer, limits
from support.mutations_of_files import nested, weird
from support.runs import RECORDS, write
from umbra import ConfigError, ShadowConfig, UmbraError
from umbra.adapters import reading
from umbra.options import PretrainOptions, TrainOptions, names
from umbra.options.yaml_file import read_yaml
from umbra.training import pretrain as pretraining
from umbra.training import train as training

CASES, CHUNK = 360, 30


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_fuzzed_adapter_is_refused_or_loads_unchanged(fuzzer, first):
    outcomes = {fuzzer.attempt(seed)[0] for seed in range(first, first + CHUNK)}
    assert outcomes >= {"refused", "same"}


# -- configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_shadow_configuration_is_valid_or_refused(seed):
    rng = random.Random(seed)
    for _ in range(250):
        values = {key: weird(rng) for key in rng.sample(ShadowConfig.keys(), rng.choice([1, 1, 2, 5]))}
        if rng.random() < 0.1:
            values[rng.choice(["", "rnk", "self", "cls", "\ud800", "a" * 10**5])] = weird(rng)
        said = ""
        try:
            config = ShadowConfig.from_dict(values)
        except ConfigError as error:
            said = str(error)
        else:
            assert ShadowConfig.from_dict(json.loads(json.dumps(config.resolve().to_dict()))) == config.resolve()
        assert len(said) < 2000, values


class WorkBegan(Exception):
    """The settings were accepted."""


RUNS = {
    "train": (training, TrainOptions, "train_data", ["eval_data"]),
    "pretrain": (pretraining, PretrainOptions, "data", ["prompts"]),
}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    def begin(*_):
        raise WorkBegan

    for module, *_ in RUNS.values():
        monkeypatch.setattr(module, "load_tokenizer", begin)
    data = write(tmp_path / "train.jsonl", RECORDS)
    return {"base": "x", "train_data": data, "output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"}


def settings_of(run, settings):
    """The call, its settings that name the data as this run does, and all keys that may hold anything."""
    module, options, data, others = RUNS[run]
    settings = {**settings, data: settings.pop("train_data")}
    return getattr(module, run), settings, sorted({*names(options, ShadowConfig)} - {data, *others})


ARGUMENTS = sorted(f for f in TrainingArguments.__dataclass_fields__ if not f.startswith("_"))
WRONG = [None, True, -1, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\0", [], [[]], {}, {"": 1}, nested(300)]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("part", range(6))
def test_random_run_settings_are_valid_or_refused_early(settings, run, part, tmp_path):
    said: list[str] = []
    call, settings, own = settings_of(run, settings)
    for key in (*own, *ARGUMENTS)[part::6]:
        for value in WRONG:
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    call({**settings, key: value})
                except UmbraError as error:
                    said.append(str(error))
                except WorkBegan:
                    pass
                except Exception as error:
                    raise AssertionError(f"{key}={value!r:.80} raised {error!r}") from error
            assert not (tmp_path / "out").exists(), (key, value)
    assert len(said) > 150
    assert max(len(message) for message in said) < 3000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_length", "long"), ("train_split", 3), ("overwrite", "no"), ("learning_rate", "fast"), ("learning_rate", [1e-3]),
        ("learning_rate", float("nan")), ("seed", -1), ("seed", 2**40), ("num_train_epochs", None), ("logging_steps", {}),
        ("per_device_train_batch_size", 0), ("per_device_train_batch_size", 2.5), ("gradient_accumulation_steps", -4),
        ("bf16", "yes"), ("adam_beta1", True), ("label_names", [3]), ("output_dir", "a\0b"), ("base", 3), ("max_steps", 10**30),
    ],
    ids=str,
)  # fmt: skip
def test_mistyped_setting_is_named(settings, key, value):
    with pytest.raises(ConfigError, match=key):
        training.train({**settings, key: value})


NASTY = {
    "not UTF-8": b"rank: \xff\xfe",
    "a key twice": b"rank: 4\nalpha: 1\nrank: 8\n",
    "a key twice within": b"lr_scheduler_kwargs: {a: 1, a: 2}\n",
    "an object": b"rank: !!python/object/apply:os.system ['true']\n",
    "no mapping": b"- rank\n",
    "nothing": b"",
    "two documents": b"rank: 4\n---\nrank: 8\n",
    "an unknown anchor": b"rank: *no\n",
    "no such date": b"a: 2024-13-45\n",
    "an endless integer": b"rank: " + b"1" * 5000 + b"\n",
    "an empty integer": b'rank: !!int ""\n',
    "no timestamp": b"rank: !!timestamp x\n",
    "a list as key": b"? [1, 2]\n: 3\n",
    "deep lists": b"rank: " + b"[" * 5000,
    "deep blocks": b"\n".join(b" " * i + b"a:" for i in range(1200)),
    "a giant": b"#" * 2**24,
    "a control character": b"rank: \x07\n",
    "a tab": b"rank:\n\t4\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", NASTY)
def test_settings_file_must_be_plain_mapping(tmp_path, kind):
    (tmp_path / "run.yaml").write_bytes(NASTY[kind])
    with limits(), pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("kind", ["a loop", "a bomb"])
def test_endless_value_is_abbreviated_in_error(settings, kind):
    value: list = ["x"] * 9
    for _ in range(8):
        value = [value] * 9
    if kind == "a loop":
        value.append(value)
    with limits(), pytest.raises(ConfigError) as error:
        training.train({**settings, "rank": value})
    assert len(str(error.value)) < 500


def test_random_bytes_in_settings_file_are_refused(tmp_path):
    plain = b"base: x\nrank: 8\nlearning_rate: 1e-3\nshadow: mirror # the default\nlabel_names: [a, 'b', \"c\"]\nbf16: true\n"
    rng, file, kept = random.Random(0), tmp_path / "run.yaml", 0
    for _ in range(600):
        data = bytearray(plain)
        for _ in range(rng.choice([1, 2, 8])):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 9])] = rng.choice(
                [rng.randbytes(1), b"\n", b"- ", b"&a ", b"*a", b"? ", b"!!", b"{"]
            )
        file.write_bytes(data)
        try:
            values = read_yaml(str(file))
            training.split_options(values)
        except ConfigError:
            continue
        kept += 1
    assert kept < 300


def test_fuzzer_detects_planted_bug(fuzzer, monkeypatch):
    """Where the digest is not looked at, values that were changed in silence are found out."""
    monkeypatch.setattr(reading, "check_digest", lambda *_: None)
    found = []
    for seed in range(60):
        try:
            fuzzer.attempt(seed)
        except Failed as error:
            found.append(str(error))
    assert len(found) > 1
    assert all("found silently other" in message for message in found)
