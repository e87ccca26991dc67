"""``umbra report``: tables and pictures, in Markdown and as a page."""

import json
import re
import shutil

import numpy as np
import pytest

from support.studies import METHODS, TRAINING, results_of, run_study, study_of, variant
from umbra.lab.study.report import performance, plots, write_report
from umbra.lab.study.report.comparisons import comparisons, pairs
from umbra.lab.study.report.lead import lead
from umbra.lab.study.results import Results, Variant
from umbra.lab.study.statistics import Estimate, estimate

# of PEFT's use of transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_the_report_is_complete_while_another_search_runs(done, base_folder, tmp_path, monkeypatch):
    shutil.copytree(done / "out", tmp_path / "out")
    given = study_of(tmp_path, base_folder, methods={**METHODS, "LoRA 3": {"kind": "lora", "r": 3}})

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("umbra.lab.study.sweep.run", stop)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, given)
    write_report(tmp_path / "out")
    before, after = ((d / "out" / "report.md").read_text() for d in (done, tmp_path))
    row = next(line for line in before.splitlines() if line.startswith("| LoRA |"))
    assert row in after and "runs are missing" in after


def test_percentages_are_detected_across_runs(done, tmp_path):
    """Of a metric that is none of the known percents; another test's shares stay."""
    shutil.copytree(done / "out", tmp_path / "out")
    for file in (tmp_path / "out" / "runs").glob("sum--*.json"):
        record = json.loads(file.read_text())
        scores = record["umbra"]["scores"].get("sign", {})  # attached, detached
        for score, each in zip(scores.values(), ([61.0] * 24, [0.5] * 24), strict=False):
            score |= {"value": each[0], "items": each}
        file.write_text(json.dumps(record))
    before, after = results_of(done), results_of(tmp_path)
    for name, share in (("Umbra", 0.61), ("Umbra, detached", 0.005)):
        v = variant(after, name)
        assert after.score(v, "sum", "sign").mean == pytest.approx(share)
        assert after.items(v, "sum", "sum") == before.items(v, "sum", "sum")
        assert after.items(v, "sum", "text") == before.items(v, "sum", "text")


def test_the_page_is_self_contained_and_adapts_to_dark_mode(done):
    text = (done / "out" / "report.html").read_text()
    assert not re.search(r"<(script|img|link|iframe)|url\((?!#)|(src|href)=.(?!#)", text)
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and "#010203" not in text
    assert "font-family: system-ui" in text and "DejaVu" not in text
    assert text.count("<svg") == 4
    for title in (
        "Scores",
        "Wins, ties and losses",
        "Cost",
        "Transfer",
        "Forgetting",
        "Learning-rate search",
    ):
        assert f">{title}</h2>" in text
    for name in METHODS:
        assert f">{name}</td>" in text


def test_markdown_and_page_have_equal_tables(done):
    written, page = ((done / "out" / f"report.{e}").read_text() for e in ("md", "html"))
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    cells = [[re.sub(r"\*\*", "", c.strip()) for c in row[2:-2].split(" | ")] for row in rows]
    result = re.findall(r"<tr>(.*?)</tr>", page)
    assert cells == [[re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in result]
    for figure in re.findall(r"\]\((figures/\w+\.png)\)", written):
        assert (done / "out" / figure).read_bytes()[:4] == b"\x89PNG"


def test_losses_are_in_the_lead(done, monkeypatch):
    loss, win = Estimate(-0.2, -0.3, -0.1, 2, 24), Estimate(0.2, 0.1, 0.3, 2, 24)
    monkeypatch.setattr(
        Results, "difference", lambda self, ours, baseline, *_: loss if baseline.name == "LoRA" else win
    )
    write_report(done / "out", done / "elsewhere")
    text = (done / "elsewhere" / "report.md").read_text()
    first = text[: text.index("## ")]
    for lost in (
        "sum (-20.0 ± 10.0)",
        "sum → sign (-20.0 ± 10.0)",
        "sum → text (-0.200 ± 0.100)",
        "class (-20.0 ± 10.0)",
    ):
        assert f"Umbra to LoRA on {lost}" in first
    assert "won, 0 tied, 4 lost" in first and "Umbra, detached to" not in first
    assert "with the bare base" in first and "0 lost. No loss is statistically significant." in first
    monkeypatch.setattr(Results, "difference", lambda self, ours, baseline, *_: win if baseline.is_trained else loss)
    write_report(done / "out", done / "elsewhere")
    text = (done / "elsewhere" / "report.md").read_text()
    assert re.search(r"\*\*Lost:\*\* .*Umbra, detached to base on sum", text[: text.index("## ")])
    assert (done / "elsewhere" / "figures" / "scores.png").exists()


def test_score_without_items_has_no_verdict(done):
    results = results_of(done)
    for record in results.runs:
        for score in record["umbra"]["scores"].get("sign", {}).values():
            score["items"] = []
    result = results.difference(variant(results, "Umbra"), variant(results, "LoRA"), "sum", "sign")
    assert result.verdict == "" and not any(c.tested == "sign" and c.trained == "sum" for c in comparisons(results))
    row = next(r for r in performance.transfer(results)[0].rows if r[0] == "Umbra − LoRA")
    assert row[1].endswith("(seeds only)")


def test_many_methods_have_distinct_looks(done):
    results = results_of(done)
    results.variants = [Variant(f"a method with a name of some length {i}", "attached", "umbra") for i in range(24)]
    result = plots.looks(results)
    assert len({tuple(look.values()) for look in result.values()}) == 24
    figure = plots.pareto(results)
    assert figure.get_size_inches()[1] > 0.18 * 24 * 2


def test_figure_margins_contain_all_points(done):
    for axes in plots.pareto(results_of(done)).axes:
        assert axes.get_xlim()[1] > 1.02 * max(c[0].get_xdata()[0] for c in axes.containers)
    rows = [("a", Estimate(0.1, 0.0, 0.2, 2, 8)), ("b", Estimate(0.2, 0.1, 0.3, 2, 8))]
    assert plots.differences(rows, "points").axes[0].get_ylim() == (1.5, -0.5)


def test_a_missing_seed_is_reported(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    for file in (tmp_path / "out" / "runs").glob("sum--LoRA--seed-1--*.json"):
        file.unlink()
    write_report(tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "**1 runs are missing:**" in text
    scores, verdicts = (text[text.index(f"## {t}") :] for t in ("Scores", "Wins"))
    for section, name in ((scores, "LoRA"), (verdicts, "Umbra − LoRA")):
        row = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
        assert row.count("(1 of 2 seeds)") >= 1 and "seeds" not in row.split(" | ")[2]


def test_transfer_to_loss_task_is_only_in_table(done):
    results = results_of(done)
    results.study["transfer"] = {"sum": ["sign", "text"]}
    section, draw = performance.transfer(results)
    assert section.header[2] == "sum → text, loss" and draw().axes[0].get_xticklabels()[-1].get_text() == "sum →\nsign"
    row = next(r for r in section.rows if r[0] == "Umbra − LoRA")
    ours, other = (results.score(variant(results, n), "sum", "text").mean for n in ("Umbra", "LoRA"))
    assert row[2].startswith(f"{other - ours:+.3f}")
    results.study["transfer"] = {"sum": ["text"]}
    assert performance.transfer(results)[0].figure is None


def test_sizes_are_compared_with_the_matched_size(done):
    results = results_of(done)
    first = results.description["parameters"]
    results.study["match"], results.description["parameters"] = 5000.0, {**dict.fromkeys(first, 5000), "IA3": 30}
    assert "Not matched in trainable parameters: IA3 (0.00 M)." in "".join(lead(results))
    results.study["match"], results.description["parameters"] = "LoRA", {**dict.fromkeys(first, 5000), "Umbra": 9000}
    assert "Not matched in trainable parameters: Umbra (0.01 M)." in "".join(lead(results))


def test_every_other_method_is_a_baseline(tmp_path, done):
    shutil.copytree(done / "out", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "study.json").read_text())
    about["study"]["ours"] = ["LoRA"]
    (tmp_path / "out" / "study.json").write_text(json.dumps(about))
    named = {(a.name, b.name) for a, b in pairs(results_of(tmp_path))}
    assert named == {("LoRA", n) for n in ("DoRA", "Lily", "IA3", "PEFT Shadow", "Umbra", "base")}


def test_costs_are_per_run_ratios(done, monkeypatch):
    """The multiple is the mean over runs of the same seed and task, with an interval over both."""
    results = results_of(done)
    ours, other = (variant(results, n) for n in ("Umbra", "LoRA"))
    result = results.cost_ratio(ours, other, "seconds")
    seconds = {}
    for record in results.runs:
        asked = record["umbra"]["request"]
        seconds[asked["method"], asked["task"], asked["seed"]] = record["umbra"]["seconds_per_step"]
    by_hand = [seconds["Umbra", t, s] / seconds["LoRA", t, s] for t in results.trained for s in results.study["seeds"]]
    assert result.mean == pytest.approx(sum(by_hand) / len(by_hand)) and result.low < result.mean < result.high
    assert results.cost_ratio(other, other, "seconds").half_width == 0
    text = (done / "out" / "report.md").read_text()
    assert f"{result.mean:.2f} ± {result.half_width:.2f} ×" in text[text.index("## Cost") :]


def test_families_and_ablations_have_sections(tmp_path, base_folder):
    methods = {
        "Umbra": METHODS["Umbra"], "Umbra, α = 0.1": {**METHODS["Umbra"], "alpha": 0.1},
        "LoRA 2": {"kind": "lora", "r": 2, "family": "LoRA"}, "LoRA 4": {"kind": "lora", "r": 4, "family": "LoRA"},
    }  # fmt: skip
    given = study_of(tmp_path, base_folder, methods=methods, match=None, search=None, transfer={}, forgetting=[])
    given |= {"reference": "Umbra", "tasks": {"sum": given["tasks"]["sum"]}, "training": {**TRAINING, "max_steps": 2}}
    given["tasks"]["sum"]["scored_on"] = "validation"
    assert run_study(tmp_path, given)["failed"] == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Scaling" in text and "| LoRA: LoRA 4 |" in text
    assert "its test set (sum: on held-out training records)" in text
    assert len(results_of(tmp_path).items(variant(results_of(tmp_path), "Umbra"), "sum", "sum")[0]) == 6
    ablations = text[text.index("## Ablations") : text.index("## Reproduction")]
    assert "| Umbra, α = 0.1 |" in ablations and "| LoRA 2 |" not in ablations


def test_transfer_map_prints_score_in_each_cell():
    from types import SimpleNamespace

    scores = {("A", "x"): 0.25, ("A", "y"): 0.5, ("B", "y"): 0.75}
    results = SimpleNamespace(
        variants=[SimpleNamespace(name=n) for n in "AB"],
        score=lambda v, _, tested: (
            None if (v.name, tested) not in scores else estimate(np.array([[scores[v.name, tested]]]))
        ),
    )
    (axes,) = plots.transfer(results, [("t", "x"), ("t", "y")]).axes  # type: ignore[arg-type]
    assert {t.get_text(): t.get_position() for t in axes.texts} == {
        "25": (0.5, 0.5),
        "50": (1.5, 0.5),
        "75": (1.5, 1.5),
    }


def test_names_are_drawn_verbatim():
    """Two dollars begin no mathematics, and an underscore hides nothing from a legend."""
    from types import SimpleNamespace

    names = ["_first", "$5 and $\\frac", "$x_1$"]
    results = SimpleNamespace(cost=lambda v: {"parameters": 1e6 * v}, mean_score=lambda v: estimate(np.eye(3)))
    figure = plots.scaling(results, {n: [1, 2] for n in names})  # type: ignore[arg-type, list-item]
    assert [t.get_text().lstrip("\u200b") for t in figure.axes[0].get_legend().get_texts()] == [
        n.replace("$", "\\$") for n in names
    ]
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    ticks = [t.get_text() for t in figure.axes[0].get_xticklabels() if low <= t.get_position()[0] <= high]
    assert ticks == ["1", "2"]
    for each in (figure, plots.differences([(n, estimate(np.eye(3))) for n in names], "")):
        drawn = plots.svg(each)
        assert all(n in drawn for n in names) and plots.png(each)
