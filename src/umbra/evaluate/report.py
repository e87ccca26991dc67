"""``umbra report``: what a study found, as report.md, report.html and its pictures. Losses stand on the first page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import folder
from ..errors import CheckpointError
from . import plots
from .methods import ATTACHED, SHADOWS
from .page import Section, markdown, page
from .results import Results, Variant
from .statistics import Estimate, mcnemar

STUDY_FILE = "study.json"  # what the report knows of a study, beside the records
FIGURES = "figures"


def write_report(out: Path, to: Path | None = None) -> list[Path]:
    """Write the report of the study in ``out``.

    Returns:
        report.html and report.md; pictures for the latter lie in `FIGURES`.

    Raises:
        CheckpointError: no study there, or a disk that refuses.
        ConfigError: matplotlib or scipy is not installed.
    """
    results, to = Results(out, STUDY_FILE), to or out
    sections, drawings = _sections(results)
    lead = _lead(results)
    figures = {name: draw() for name, draw in drawings.items()}
    svgs = {name: plots.svg(f) for name, f in figures.items()}
    title = results.study["title"]
    try:
        (to / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            (to / FIGURES / f"{name}.png").write_bytes(plots.png(figure))
    except OSError as error:
        raise CheckpointError(f"The report cannot be written to {to}: {error}") from error
    files = {
        "report.html": page(title, lead, sections, svgs),
        "report.md": markdown(title, lead, sections, {n: f"{FIGURES}/{n}.png" for n in figures}),
    }
    folder.write_together(to, lambda staging: [folder.write_text(staging / n, t) for n, t in files.items()] and None)
    return [to / n for n in files]


def _sections(results: Results) -> tuple[list[Section], dict[str, Callable[[], Any]]]:
    makers = (_scores, _verdicts, _costs, _transfer, _forgetting, _scaling, _ablations, _search, _failures, _again)
    sections, drawings = [], {}
    for make in makers:
        section, draw = make(results)
        if section is not None:
            sections.append(section)
            if draw is not None and section.figure:
                drawings[section.figure] = draw
    return sections, drawings


Made = tuple[Section | None, Callable[[], Any] | None]


# -- words -------------------------------------------------------------------------------------------------------------


def _lead(results: Results) -> list[str]:
    study = results.study
    kept = next(iter((*results.runs, *results.trials)), None)
    lead = [study["about"]] if study["about"] else []
    lead.append(f"{study['base']} in {study['dtype']}; seeds {', '.join(map(str, study['seeds']))}. {_where(kept)}")
    losses, wins, ties = [], 0, 0
    for ours, theirs, task, found in _pairs(results):
        wins, ties = wins + (found.verdict == "win"), ties + (found.verdict == "tie")
        if found.verdict == "loss":
            losses.append(f"{ours.name} to {theirs.name} on {task} ({_signed(found, results.is_loss(task))})")
    if wins + ties + len(losses):
        told = f"Of {wins + ties + len(losses)} comparisons {wins} are won, {ties} tied and {len(losses)} lost."
        lead.append(f"{told} **Lost:** {'; '.join(losses)}." if losses else f"{told} No loss is beyond the noise.")
    if results.missing:
        lead.append(f"**{len(results.missing)} runs are missing:** the study was not run to its end.")
    return lead


def _where(kept: dict[str, Any] | None) -> str:
    if kept is None:
        return ""
    machine, packages = kept["umbra"]["machine"], kept["meta_info"]["package_info"]
    versions = ", ".join(
        f"{n.removesuffix('-version')} {v}" for n, v in packages.items() if v and n != "bitsandbytes-version"
    )
    what = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} threads"
    return f"{what}; {versions}; commit {kept['umbra']['commit']}; {kept['run_info']['created_at'][:10]}."


def _told(found: Estimate | None, is_loss: bool = False) -> str:
    if found is None:
        return "–"
    scale, form = (1, "{:.3f}") if is_loss else (100, "{:.1f}")
    half = "" if found.half in (0, float("inf")) else f" ± {form.format(scale * found.half)}"
    return form.format(scale * found.mean) + half


def _signed(found: Estimate | None, is_loss: bool = False) -> str:
    if found is None:
        return "–"
    scale, form = (1, "{:+.3f}") if is_loss else (100, "{:+.1f}")
    half = "" if found.half == float("inf") else f" ± {form.format(scale * found.half).lstrip('+')}"
    return form.format(scale * found.mean) + half


def _judged(found: Estimate | None, is_loss: bool = False) -> str:
    if found is None:
        return "–"
    return f"{_signed(found, is_loss)} {'tie' if found.verdict == 'tie' else f'**{found.verdict}**'}"


def _pairs(results: Results) -> list[tuple[Variant, Variant, str, Estimate]]:
    """Ours attached against every trained rival, on every task."""
    found = []
    for ours in (v for v in results.ours if v.mode == ATTACHED):
        for theirs in (v for v in results.rivals if v.is_trained):
            for task in results.trained:
                apart = results.apart(ours, theirs, task, task)
                if apart is not None:
                    found.append((ours, theirs, task, apart))
    return found


# -- sections ----------------------------------------------------------------------------------------------------------


def _scores(results: Results) -> Made:
    tasks = results.trained
    best = {}
    for task in tasks:
        found = {v: s.mean for v in results.variants if (s := results.score(v, task, task)) is not None}
        best[task] = (min if results.is_loss(task) else max)(found.values(), default=None)
    rows = []
    for v in results.variants:
        cells = []
        for task in tasks:
            found = results.score(v, task, task)
            text = _told(found, results.is_loss(task))
            cells.append(f"**{text}**" if found is not None and found.mean == best[task] else text)
        cost = results.cost(v)
        size = f"{cost['parameters'] / 1e6:.2f} M" if cost else "0"
        rows.append([v.name, size, *cells, _told(results.mean_score(v))])
    units = [f"{t}, {results.metric(t)}" + ("" if results.is_loss(t) else " %") for t in tasks]
    text = [
        "Each method, trained on a task and tested on its test set: the mean over seeds, and half its 95 % interval, which counts "
        "both what a seed and what the choice of test items brings. The best of a column is bold, whether or not it is ahead of "
        "the noise: the next table tells that."
    ]  # fmt: skip
    section = Section("Scores", text, ["method", "trained", *units, "mean"], rows, "scores")
    return section, lambda: plots.scores(results)


def _verdicts(results: Results) -> Made:
    rows, pairs = [], _pairs(results)
    for ours, theirs in dict.fromkeys((a, b) for a, b, _, _ in pairs):
        cells: list[str] = []
        counts: dict[str, int] = dict.fromkeys(("win", "tie", "loss"), 0)
        for task in results.trained:
            found = results.apart(ours, theirs, task, task)
            cells.append(_judged(found, results.is_loss(task)))
            if found is not None:
                counts[found.verdict] += 1
        rows.append([f"{ours.name} − {theirs.name}", *cells, " / ".join(map(str, counts.values()))])
    if not rows:
        return None, None
    text = [
        "Differences are paired, seed by seed and item by item (two-way random effects, Student's t with Satterthwaite's degrees "
        "of freedom). One whose 95 % interval holds zero is a tie. " + _exact(results, pairs)
    ]  # fmt: skip
    section = Section(
        "Wins, ties and losses", text, ["difference", *results.trained, "win / tie / loss"], rows, "differences"
    )
    named = [(f"{a.name} − {b.name}, {task}", found) for a, b, task, found in pairs if not results.is_loss(task)]
    return section, lambda: plots.differences(named, "ours − theirs, points")


def _exact(results: Results, pairs: list[tuple[Variant, Variant, str, Estimate]]) -> str:
    """How many single-seed comparisons McNemar's exact test calls different."""
    tests, apart = 0, 0
    for ours, theirs, task, _ in pairs:
        a, b = results.items(ours, task, task), results.items(theirs, task, task)
        for seed in a.keys() & b.keys():
            if {*a[seed], *b[seed]} <= {0.0, 1.0} and len(a[seed]) == len(b[seed]):
                tests, apart = tests + 1, apart + (mcnemar(a[seed], b[seed]) < 0.05)
    return f"Seed by seed, McNemar's exact test finds {apart} of {tests} pairs of runs apart at 0.05." if tests else ""


def _costs(results: Results) -> Made:
    costs = {v: results.cost(v) for v in results.variants if v.mode == ATTACHED or v.kind in SHADOWS[1:]}
    costs = {v: c for v, c in costs.items() if c}
    if not costs:
        return None, None
    first = next((v for v in costs if v.kind == "lora"), next(iter(costs)))
    rows = [
        [
            v.name, f"{c['parameters'] / 1e6:.2f} M", f"{c['bytes'] / 1e6:.1f}", f"{c['seconds']:.2f}",
            f"{c['seconds'] / costs[first]['seconds']:.2f} ×", f"{c['peak'] / 1e9:.2f}", f"{c['rise'] / 1e9:.2f}",
            f"{c['rise'] / costs[first]['rise']:.2f} ×" if costs[first]["rise"] > 0 else "–",
        ]
        for v, c in costs.items()
    ]  # fmt: skip
    text = [
        f"Medians over all runs; × is beside {first.name}. Memory is of the whole process, and its rise during training. Runs "
        "follow one another by the hour: for speed as such see the referee, `umbra bench`, which takes turns."
    ]  # fmt: skip
    header = ["method", "trained", "adapter, MB", "s a step", "time", "peak, GB", "rise, GB", "rise"]
    return Section("What it costs", text, header, rows, "pareto"), lambda: plots.pareto(results)


def _transfer(results: Results) -> Made:
    tested = results.study["tested"]
    pairs = [
        (a, b) for a in results.trained if results.study["transfer"].get(a) for b in tested[a] if b != a and not results.is_loss(b)
    ]  # fmt: skip
    if not pairs:
        return None, None
    rows = [[v.name, *(_told(results.score(v, *pair)) for pair in pairs)] for v in results.variants]
    for ours in (v for v in results.ours if v.mode == ATTACHED):
        for theirs in results.rivals:
            cells = [_judged(results.apart(ours, theirs, *pair)) for pair in pairs]
            rows.append([f"{ours.name} − {theirs.name}", *cells])
    text = ["Trained on one task and tested on another, of which nothing was seen; %. Below, how far apart they are."]
    section = Section("Transfer", text, ["method", *(f"{a} → {b}" for a, b in pairs)], rows, "transfer")
    return section, lambda: plots.transfer(results, pairs)


def _forgetting(results: Results) -> Made:
    names, base = results.study["forgetting"], next((v for v in results.variants if not v.is_trained), None)
    if not names or base is None:
        return None, None
    rows = []
    for v in (v for v in results.variants if v.is_trained):
        for tested in names:
            cells = [
                "–" if task == tested else _judged(results.apart(v, base, task, tested), results.is_loss(tested))
                for task in results.trained
            ]
            rows.append([f"{v.name}: {tested}", *cells])
    units = ", ".join(f"{n} ({results.metric(n)})" for n in names)
    text = [
        f"What was never trained, after training on the task of a column, beside the bare base: {units}. Negative means forgotten; "
        "losses count as less is better."
    ]  # fmt: skip
    return Section("Forgetting", text, ["after training on", *results.trained], rows), None


def _scaling(results: Results) -> Made:
    families: dict[str, list[Variant]] = {}
    for v in results.variants:
        family = results.study["methods"][v.method]["family"]
        if family and v.mode == results.study["methods"][v.method]["modes"][0]:
            families.setdefault(family, []).append(v)
    families = {n: vs for n, vs in families.items() if len(vs) > 1}
    if not families:
        return None, None
    rows = [
        [
            f"{name}: {v.name}",
            f"{results.cost(v)['parameters'] / 1e6:.2f} M" if results.cost(v) else "–",
            _told(results.mean_score(v)),
        ]
        for name, vs in families.items()
        for v in vs
    ]
    section = Section(
        "Scaling", ["The mean score as trainable parameters grow."], ["family", "trained", "mean, %"], rows, "scaling"
    )
    return section, lambda: plots.scaling(results, families)


def _ablations(results: Results) -> Made:
    name = results.study["reference"]
    if name is None:
        return None, None
    chief = next(v for v in results.variants if v.method == name)
    others = [v for v in results.variants if v.mode == chief.mode and v.kind == chief.kind and v != chief]
    first = [_told(results.score(chief, t, t), results.is_loss(t)) for t in results.trained]
    rows = [[chief.name, *first, _told(results.mean_score(chief))]]
    for v in others:
        cells = [_judged(results.apart(v, chief, t, t), results.is_loss(t)) for t in results.trained]
        rows.append([v.name, *cells, _told(results.mean_score(v))])
    text = [
        f"Each row is {name} with what its name says, less {name}: a loss is what the part that was taken out had brought."
    ]
    return Section("Ablations", text, ["variant", *results.trained, "mean, %"], rows), None


def _search(results: Results) -> Made:
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for kept in results.trials:
        asked = kept["umbra"]["request"]
        key = asked["task"], results.name_of(kept)
        found.setdefault(key, []).append((asked["training"]["learning_rate"], kept["umbra"]["validation_loss"]))
    if not found:
        return None, None
    rows = []
    for (task, name), losses in found.items():
        best = min(loss for _, loss in losses)
        cells = [
            f"**{rate:g}: {loss:.4f}**" if loss == best else f"{rate:g}: {loss:.4f}" for rate, loss in sorted(losses)
        ]
        rows.append([f"{task}: {name}", " · ".join(cells)])
    search = results.study["search"]
    steps = f"{search['max_steps']} steps" if search["max_steps"] else "as many steps as a run"
    text = [
        f"Every method had the same trials: {steps} at seed {search['seed']}, scored by the loss of the answers that were held out "
        "of the training set. Tasks without trials take the rate that is best over those with."
    ]  # fmt: skip
    return Section("Search for the learning rate", text, ["task: method", "rate: held-out loss"], rows), None


def _failures(results: Results) -> Made:
    if not results.failed:
        return None, None
    rows = []
    for kept in results.failed:
        asked, error = kept["umbra"]["request"], kept["run_info"]["error_msg"].strip().splitlines()[-1:]
        rows.append([f"{asked['task']}: {asked['method']}, seed {asked['seed']}", "".join(error)[:200]])
    return Section("Failed", ["These runs ended with an error, and are in no table."], ["run", "error"], rows), None


def _again(results: Results) -> Made:
    spent = sum(r["run_info"]["total_time"] for r in (*results.runs, *results.trials)) / 3600
    budget = {t: {**results.study["training"], **results.study["tasks"][t]["training"]} for t in results.trained}
    steps = [
        f"{t} {b.get('max_steps', '?')} steps of {b.get('per_device_train_batch_size', 8)}" for t, b in budget.items()
    ]
    shown = [v for v in results.variants if v.mode == ATTACHED or v.kind != "umbra"]
    kinds = [f"{v.method}: {results.about_kind(v)} {_fields(results, v)}".strip() for v in shown]
    text = [
        f"`{results.about['command']}` runs what is not in its folder yet ({len(results.runs)} runs and {len(results.trials)} "
        f"trials, {spent:.1f} hours in all), `umbra report` writes this page from it. Budgets: {', '.join(steps)}.",
        "; ".join(kinds) + ".",
    ]  # fmt: skip
    return Section("How to run it again", text), None


def _fields(results: Results, variant: Variant) -> str:
    fields = results.study["methods"][variant.method]["fields"]
    hidden = ("peft_type", "target_modules")
    told = ", ".join(f"{k}={v}" for k, v in fields.items() if k not in hidden)
    return f"(`{told}`)" if told else ""
