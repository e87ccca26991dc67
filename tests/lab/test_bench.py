"""The benchmark on a tiny random base: measurements, refusals and stored rows."""

import dataclasses
import json

import pytest
import torch

from support.tiny import assert_same, gradients, scramble
from umbra import ConfigError
from umbra.cli import main
from umbra.errors import CheckpointError
from umbra.lab import bench
from umbra.lab.bench import cases, memory, methods, scaling
from umbra.lab.bench.base import Base, random_config
from umbra.lab.bench.cases import CASES, Decode, Detached, Disagreement, Drafted, Prefill, Step
from umbra.lab.bench.machine import Device
from umbra.lab.bench.methods import BASE, LORA, METHODS
from umbra.lab.bench.timing import interleave, prepare
from umbra.lab.options import BenchOptions

QUICK = "step,step-masked,batch-1,prefill,decode,latency,decode-detached"
ROWS = {m.name: m for m in METHODS}
NAMES = list(ROWS)
SMALL = {
    "step": Step("step", "", 2, 12),
    "masked": Step("masked", "", 2, 12, labelled=1 / 3),
    "prefill": Prefill("prefill", "", 2, 12),
    "decode": Decode("decode", "", 1, 6, new=6),
}


def run(folder, capsys=None, **options) -> dict:
    """What `umbra bench` holds afterwards."""
    given = {"base": "random:tiny", "rounds": 1, "threads": 1, "out": folder, "name": "t", "json": True, **options}
    code = main(["bench", *(part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", str(v)))])
    if capsys is not None:
        assert code == 0, capsys.readouterr().err
    return json.loads((folder / "t.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run of all quick cases."""
    folder = tmp_path_factory.mktemp("bench")
    run(folder, cases=QUICK)
    return folder


@pytest.fixture(scope="module")
def base():
    return Base.named("random:tiny", torch.float32, torch.device("cpu"))


def built(base, *names, rank=8):
    wanted = [ROWS[n] for n in names]
    rank, widths = methods.fit(base, wanted, rank)
    return methods.build(base, wanted, rank, widths, 0)


def tamper(model: torch.nn.Module) -> torch.nn.Module:
    """The model with all that it trains randomised."""
    trained = {n.replace(".", "_"): p for n, p in model.named_parameters() if p.requires_grad}
    scramble(torch.nn.ParameterDict(trained), std=1.0)
    return model


# -- the whole of it -----------------------------------------------------------------------------------------------


def test_every_method_and_case_is_measured(whole):
    held = json.loads((whole / "t.json").read_text())
    assert set(held["cases"]) == set(QUICK.split(","))
    for case in CASES:
        if case.name in held["cases"]:
            rows, expected = held["cases"][case.name], case.methods or NAMES
            assert set(rows) == set(expected)
            for name, row in rows.items():
                assert row["session"] == 0
                if case.absent(ROWS[name]):
                    assert "seconds" not in row
                else:
                    assert len(row["seconds"]) == 1 and row["seconds"][0] > 0, (case.name, name, row)
                    assert row["beside"].keys() == {LORA, BASE}
    assert held["trainable"].keys() == ROWS.keys()
    session = held["sessions"][0]
    assert session["versions"]["peft"] and session["date"] and session["arguments"]["rounds"] == 1
    assert held["header"]["machine"]["threads"] == 1


def test_report_has_tables_and_picture(whole):
    text = (whole / "t.md").read_text()
    for name in NAMES:
        assert f"| {name} | 1.00 [1.00 – 1.00]" in text or name != LORA
        assert text.count(f"\n| {name} |") >= 4
    assert "ratios to PEFT LoRA" in text and "ratios to bare base" in text
    held = json.loads((whole / "t.json").read_text())["cases"]["step"]
    ratio = held["Umbra"]["seconds"][0] / held[LORA]["seconds"][0]
    assert f"| Umbra | {ratio:.2f} [{ratio:.2f} – {ratio:.2f}]" in text
    assert (whole / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_cache_growth_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "POINTS", tuple(scaling.Point(axis, 4) for axis in scaling.AXES))
    monkeypatch.setattr(scaling, "CENTRE", {"layers": 2, "batch": 1, "context": 16, "rank": 8})
    monkeypatch.setattr(scaling, "SHAPE", {**scaling.SHAPE, "hidden_size": 64, "vocab_size": 64})
    held = run(tmp_path, scaling=True)
    assert list(held["cases"]) == ["layers 4", "batch 4", "context 4", "rank 4"]
    assert all("seconds" in row for rows in held["cases"].values() for row in rows.values())
    assert set(held["cases"]["rank 4"]) == set(scaling.ROWS)
    assert (tmp_path / "t.png").exists()


def test_help_lists_every_method_case_and_shape():
    output = {f.name: f.metadata["help"] for f in dataclasses.fields(BenchOptions)}
    assert all(m.name in output["methods"] for m in METHODS)
    assert all(c.name in output["cases"] for c in CASES)
    assert all(f"random:{shape}" in output["base"] for shape in bench.base.SHAPES)


# -- equal before timed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("name", ["Umbra", LORA, "PEFT Shadow", "shadow-peft"])
def test_adapter_with_initial_effect_is_refused(base, name, case):
    model = built(base, name)[name]
    assert callable(prepare(SMALL[case], ROWS[name], model, base))
    tamper(model)
    assert "differ from the base's" in prepare(SMALL[case], ROWS[name], model, base)["refused"]
    with pytest.raises(Disagreement, match=r"task losses|last logits|token"):
        SMALL[case].ready(ROWS[name], model, base)


def test_wrong_task_loss_is_refused(base):
    twice = dataclasses.replace(ROWS[LORA], loss=lambda model, batch: 2 * methods.total_loss(model, batch))
    assert "task losses" in prepare(SMALL["masked"], twice, built(base, LORA)[LORA], base)["refused"]


def test_mismatching_detached_shadow_is_refused(base, monkeypatch):
    model = built(base, "Umbra")["Umbra"]
    case = Detached("d", "", 1, 6, new=4)
    assert case.ready(ROWS["Umbra"], model, base)().shape == (1, 10)
    edge = scramble(model.detached())
    monkeypatch.setattr(type(model), "detached", lambda self: edge)
    with pytest.raises(Disagreement, match="detached"):
        case.ready(ROWS["Umbra"], model, base)


def test_refusal_is_recorded_and_reported(tmp_path, monkeypatch, capsys):
    def tampered(base, rank, width):
        return tamper(methods._lora(base, rank, width))

    row = dataclasses.replace(ROWS["PEFT DoRA"], build=tampered)
    monkeypatch.setattr(bench, "METHODS", (ROWS[BASE], ROWS[LORA], row))
    arguments = ["bench", "--base=random:tiny", "--rounds=1", "--cases=prefill", f"--out={tmp_path}", "--name=t"]
    assert main(arguments) == 1
    assert "refused" in capsys.readouterr().out
    rows = json.loads((tmp_path / "t.json").read_text())["cases"]["prefill"]
    assert "seconds" not in rows["PEFT DoRA"] and "seconds" in rows[LORA]


def test_unsupported_method_is_noted(base):
    def unable(model, batch):
        raise NotImplementedError("not on  this\nmachine")

    row = dataclasses.replace(ROWS[LORA], loss=unable)
    result = prepare(SMALL["step"], row, built(base, LORA)[LORA], base)
    assert result == {"failed": "NotImplementedError: not on this machine"}


# -- equal sizes, one base -----------------------------------------------------------------------------------------


def test_shadow_sizes_match_lora(base):
    models = built(base, *NAMES)
    target = methods.trainable(models[LORA])
    assert target == methods.lora_size(base, 8)
    for method in METHODS:
        if method.is_fitted:
            assert abs(methods.trainable(models[method.name]) - target) <= methods.FIT * target


def test_unmatched_width_raises(base):
    with pytest.raises(ConfigError, match="Umbra has"):
        methods.build(base, [ROWS["Umbra"]], 8, {"Umbra": 16}, 0)


def test_lora_grows_to_match_large_shadow_attention():
    wide = Base.random(random_config(num_attention_heads=16, head_dim=32), torch.float32, torch.device("cpu"))
    wanted = [ROWS[LORA], ROWS["Umbra"]]
    rank, widths = methods.fit(wide, wanted, 1)
    assert rank > 1 and widths["Umbra"] >= methods.NARROWEST
    models = methods.build(wide, wanted, rank, widths, 0)
    assert methods.trainable(models[LORA]) == methods.lora_size(wide, rank)


def test_methods_share_unchanged_base_weights(base):
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    models = built(base, *NAMES)
    shared = {p.data_ptr() for p in base.model.parameters()}
    for name, model in models.items():
        frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        assert shared <= frozen, name
        if not isinstance(prepare(SMALL["step"], ROWS[name], model, base), dict):
            assert not {id(m) for m in model.modules()} & {id(m) for m in base.model.modules()}
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in base.model.named_parameters())


def test_label_only_row_has_lora_gradients(base):
    model = tamper(built(base, LORA)[LORA]).train()
    batch = cases.make_batch(base, 3, 12, 1 / 3)
    full = methods.total_loss(model, batch)
    full.backward()
    expected = gradients(model)
    loss = methods.label_only_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, full, rtol=1e-6, atol=0)
    assert_same(gradients(model), expected, rtol=5e-5)


# -- memory --------------------------------------------------------------------------------------------------------


def test_peak_memory_is_measured_in_subprocess(base):
    sizes = [cases.Memory("large", "", 16, 256), cases.Memory("small", "", 2, 16)]
    rank, widths = methods.fit(base, [ROWS["Umbra"]], 8)
    result = memory.peak_memory(sizes, ROWS["Umbra"], base, Device("cpu"), rank=rank, width=widths["Umbra"], seed=0)
    rise = {name: row["peak"] - row["before"] for name, row in result.items()}
    assert rise["large"] > 16 * 256 * 99 * 4 > rise["small"]
    assert result["large"]["before"] > 2**26


def test_failed_subprocess_is_noted(base, monkeypatch):
    broken = dataclasses.replace(ROWS["Umbra"], name="no such row")
    result = memory.peak_memory([cases.Memory("m", "", 1, 16)], broken, base, Device("cpu"), rank=8, width=16, seed=0)
    assert "StopIteration" in result["m"]["failed"]


# -- kept ----------------------------------------------------------------------------------------------------------


def test_turns_are_interleaved_and_shuffled():
    turns: list[str] = []
    runs = {name: lambda name=name: turns.append(name) for name in "abcde"}
    seconds = interleave(runs, Device("cpu"), rounds=6)
    rounds = ["".join(turns[i : i + 5]) for i in range(0, 30, 5)]
    assert all(sorted(r) == list("abcde") for r in rounds) and len(set(rounds)) > 2
    assert {len(times) for times in seconds.values()} == {6}


def test_killed_run_resumes(tmp_path, monkeypatch):
    measured, measure = [], bench.measure

    def killed(case, *args, **options):
        measured.append(case.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(case, *args, **options)

    monkeypatch.setattr(bench, "measure", killed)
    options = {"cases": "prefill,decode,latency", "methods": "Umbra"}
    first = run(tmp_path, **options)
    assert list(first["cases"]) == ["prefill"]
    second = run(tmp_path, **options)
    assert measured == ["prefill", "decode", "decode", "latency"]
    assert second["cases"]["prefill"] == first["cases"]["prefill"]
    run(tmp_path, **options)
    assert len(measured) == 4
    run(tmp_path, **{**options, "rounds": 2, "cases": "prefill"})
    run(tmp_path, **{**options, "rounds": 2, "cases": "prefill"})
    run(tmp_path, **{**options, "cases": "latency", "anew": True})
    assert measured[4:] == ["prefill", "latency"]


def test_single_row_is_remeasured_with_references(tmp_path):
    first = run(tmp_path, cases="prefill", methods="umbra,peft dora")["cases"]["prefill"]
    second = run(tmp_path, cases="prefill", methods="Umbra", anew=True)
    rows = second["cases"]["prefill"]
    assert rows["PEFT DoRA"] == first["PEFT DoRA"]
    assert rows["Umbra"] != first["Umbra"] and rows["Umbra"]["beside"][LORA] == rows[LORA]["seconds"]
    assert len([s for s in second["sessions"] if s]) == 2
    assert "PEFT DoRA in prefill" in (tmp_path / "t.md").read_text()


def test_other_measurements_are_not_mixed_in(tmp_path):
    options = {"cases": "prefill", "methods": BASE}
    run(tmp_path, **options)
    given = BenchOptions(
        base="random:tiny", rounds=1, threads=1, out=str(tmp_path), name="t", dtype="bfloat16", **options
    )
    with pytest.raises(CheckpointError, match=r"dtype: 'float32' → 'bfloat16'.*--anew"):
        bench.bench(given)
    assert bench.bench(dataclasses.replace(given, anew=True))["header"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"header": 1}', "no json"])
def test_damaged_results_file_is_named(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"t\.json is damaged"):
        bench.bench(BenchOptions(base="random:tiny", out=str(tmp_path), name="t"))


# -- what is asked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "Umbr"}, "'umbr' matches none of: bare base"),
        ({"cases": "step,stop*"}, r"'stop\*' matches none of: step"),
        ({"cases": " ,"}, "cases is empty"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"dtype": "float16"}, "Unknown dtype 'float16'"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"device": "mps"}, "cpu and cuda"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"base": "random:qwen"}, "Did you mean 'qwen3-"),
    ],
)
def test_invalid_requests_are_explained(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        bench.bench(BenchOptions(**{"base": "random:tiny", "out": str(tmp_path / "new"), **options}))
    assert not (tmp_path / "new").exists()


def test_patterns_select_rows_in_given_order():
    assert methods.chosen("umbra*, PEFT LoRA", NAMES, "methods") == [LORA, *(n for n in NAMES if n.startswith("Umbra"))]


def test_missing_peer_package_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    held = run(tmp_path, cases="prefill")
    assert set(held["cases"]["prefill"]) == {n for n in NAMES if ROWS[n].package is None}
    assert "shadow-peft: skipped, shadow_peft is not installed" in capsys.readouterr().err
    assert "ratios to bare base" in (tmp_path / "t.md").read_text()


def test_case_without_methods_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    held = run(tmp_path, cases="decode-compiled")
    assert all("C++ compiler" in row["absent"] for row in held["cases"]["decode-compiled"].values())
    assert "no-such" not in (tmp_path / "t.md").read_text()


def test_drafting_is_measured_for_umbra(base, monkeypatch):
    """With drafts, to the base's tokens; beside the references without any, and for nobody else."""
    case, drafted = Drafted("drafted", "", 1, 6, new=6), []
    default = next(c for c in CASES if c.name == "decode-drafted")
    assert {n for n in NAMES if case.absent(ROWS[n]) is None} >= {BASE, LORA, "Umbra"}
    assert case.absent(ROWS["PEFT DoRA"]) == cases.ALONE
    assert all(default.absent(ROWS[n]) is None for n in default.methods)
    model = built(base, "Umbra")["Umbra"]
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *args, **o: drafted.append(o["draft"]) or generate(*args, **o))
    result = case.ready(ROWS["Umbra"], model, base)()
    assert drafted == [cases.DRAFT] * 2
    assert torch.equal(result, case.ready(ROWS[BASE], base.copy(), base)())
