"""``umbra report``: what a study found, as report.md, report.html and its pictures. Losses stand on the first page."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.lab.study import plots
from umbra.lab.study.methods import ATTACHED, FIT, SHADOWS
from umbra.lab.study.page import Section, markdown, page
from umbra.lab.study.results import Results, Variant
from umbra.lab.study.statistics import Estimate, mcnemar
from umbra.lab.study.tasks import FIGURES, STUDY_FILE


def write_report(out: Path, to: Path | None = None) -> list[Path]:
    """Write the report of the study in ``out``.

    Returns:
        report.html and report.md; pictures for the latter lie in `FIGURES`.

    Raises:
        CheckpointError: no study there, or a disk that refuses.
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

    def write(staging: Path) -> None:
        for name, text in files.items():
            folder.write_text(staging / name, text)

    folder.write_together(to, write)
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
    study, found = results.study, _comparisons(results)
    lead = [study["about"]] if study["about"] else []
    lead.append(f"{study['base']} in {study['dtype']}; seeds {', '.join(map(str, study['seeds']))}. {_where(results)}")
    for told, part in (
        ("comparisons with what was trained likewise", [c for c in found if c.theirs.is_trained]),
        ("with the bare base", [c for c in found if not c.theirs.is_trained]),
    ):
        if part:
            lead.append(_counted(results, told, part))
    if results.failed:
        lead.append(f"**{len(results.failed)} runs have failed** and are in no comparison: see the end.")
    if results.unscored:
        lead.append(f"**{len(results.unscored)} scores are missing,** since a test has failed: see the end.")
    if results.missing:
        lead.append(f"**{len(results.missing)} runs are missing:** the study was not run to its end.")
    sizes = results.about["parameters"]
    target = sizes.get(study["match"], study["match"]) or 0
    alone = {v.method for v in results.alone}
    other = [n for n in sizes if sizes[n] and abs(sizes[n] - target) > FIT * target and n not in alone]
    if study["match"] is not None and other:
        lead.append(f"Not of equal size: {', '.join(f'{n} ({sizes[n] / 1e6:.2f} M)' for n in other)}.")
    return lead


def _counted(results: Results, what: str, found: "list[Comparison]") -> str:
    """How many comparisons are won, tied and lost, and which are lost."""
    won, tied, lost = ([c for c in found if c.apart.verdict == verdict] for verdict in ("win", "tie", "loss"))
    told = f"Of {len(found)} {what} {len(won)} are won, {len(tied)} tied and {len(lost)} lost."
    losses = [
        f"{c.ours.name} to {c.theirs.name} on {c.task} ({_told(c.apart, results.is_loss(c.tested), '+')})" for c in lost
    ]
    return f"{told} **Lost:** {'; '.join(losses)}." if lost else f"{told} No loss is beyond the noise."


def _where(results: Results) -> str:
    """Machines, versions, commits and days of all runs."""
    told: dict[str, list[set[str]]] = {}
    for kept in (*results.runs, *results.trials):
        machine, packages = kept["umbra"]["machine"], kept["meta_info"]["package_info"]
        versions = [
            f"{n.removesuffix('-version')} {v}" for n, v in packages.items() if v and not n.startswith("bitsandbytes")
        ]
        what = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} threads"
        commits, days = told.setdefault(f"{what}; {', '.join(versions)}", [set(), set()])
        commits.add(str(kept["umbra"]["commit"]))
        days.add(kept["run_info"]["created_at"][:10])
    parts = [f"{w}; commits {', '.join(sorted(c))}; {', '.join(sorted(d))}" for w, (c, d) in told.items()]
    return ". ".join(parts) + "." if parts else ""


def _told(found: Estimate | None, is_loss: bool = False, sign: str = "") -> str:
    """Mean ± half the interval, in % but for losses; "+" as the sign shows one always."""
    if found is None:
        return "–"
    scale, digits = (1, ".3f") if is_loss else (100, ".1f")
    half = "" if found.half == math.inf else f" ± {scale * found.half:{digits}}"
    missing = f" ({found.seeds} of {found.asked} seeds)" if found.seeds < found.asked else ""
    return f"{scale * found.mean:{sign}{digits}}{half}{missing}"


def _judged(found: Estimate | None, is_loss: bool = False) -> str:
    if found is None:
        return "–"
    verdict = {"tie": "tie", "": "(seeds alone)"}.get(found.verdict, f"**{found.verdict}**")
    return f"{_told(found, is_loss, '+')} {verdict}"


def _times(found: Estimate | None) -> str:
    """A multiple, with half its interval."""
    if found is None:
        return "–"
    return f"{found.mean:.2f}" + ("" if found.half in (0, math.inf) else f" ± {found.half:.2f}") + " ×"


class Comparison(NamedTuple):
    """Ours beside theirs: trained on one task, tested on it or on another."""

    ours: Variant
    theirs: Variant
    trained: str
    tested: str
    apart: Estimate

    @property
    def task(self) -> str:
        return self.trained if self.trained == self.tested else f"{self.trained} → {self.tested}"


def _opponents(results: Results) -> list[tuple[Variant, Variant]]:
    """Ours attached and every trained rival; ours detached and what was trained alone; ours and the bare base."""
    pairs = [(a, b) for a in results.ours if a.mode == ATTACHED for b in results.rivals if b.is_trained]
    pairs += [(a, b) for a in results.ours if a.mode != ATTACHED for b in results.alone]
    return pairs + [(a, b) for a in results.ours for b in results.variants if not b.is_trained]


def _comparisons(results: Results) -> list[Comparison]:
    """Of all opponents, on every task and on what is tested after it."""
    found = []
    for ours, theirs in _opponents(results):
        for trained in results.trained:
            for tested in results.study["tested"][trained]:
                apart = results.apart(ours, theirs, trained, tested)
                if apart is not None and apart.verdict:
                    found.append(Comparison(ours, theirs, trained, tested, apart))
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
        costs = (
            [f"{cost['parameters'] / 1e6:.2f} M", f"{cost['seconds']:.2f}", f"{cost['peak'] / 1e9:.2f}"]
            if cost
            else ["–"] * 3
        )
        rows.append([v.name, *cells, _told(results.mean_score(v)), *costs])
    units = [f"{t}, {results.metric(t)}" + ("" if results.is_loss(t) else " %") for t in tasks]
    noise = (
        "what a seed and what the choice of test items brings"
        if len(results.study["seeds"]) > 1
        else ("what the choice of test items brings; what a seed brings is unknown, since there is one")
    )
    held = [t for t in tasks if results.study["tasks"][t].get("scored_on") == "validation"]
    place = f"its test set ({', '.join(held)}: on what is held out for choices)" if held else "its test set"
    text = [
        f"Each method, trained on a task and tested on {place}: the mean over seeds, and half its 95 % interval, which "
        f"counts {noise}. The best of a column is bold, whether or not it is ahead of the noise: the next table tells that. "
        "Beside them the parameters that are trained, seconds a step and the peak memory of training, GB." + _of_losses(results)
    ]  # fmt: skip
    header = ["method", *units, "mean", "trained", "s a step", "GB"]
    return Section("Scores", text, header, rows, "scores"), lambda: plots.scores(results)


def _of_losses(results: Results) -> str:
    """What is to be known where a score is a loss."""
    losses = [t for t in results.trained if results.is_loss(t)]
    if not losses:
        return ""
    return (
        f" Of {', '.join(losses)} it is the loss, of which less is better: it is in no mean, and a difference is positive where "
        "the first has less."
    )


def _verdicts(results: Results) -> Made:
    rows, found = [], [c for c in _comparisons(results) if c.trained == c.tested]
    for ours, theirs in dict.fromkeys((c.ours, c.theirs) for c in found):
        mine = {c.trained: c.apart for c in found if (c.ours, c.theirs) == (ours, theirs)}
        counts = [sum(a.verdict == verdict for a in mine.values()) for verdict in ("win", "tie", "loss")]
        cells = [_judged(mine.get(t), results.is_loss(t)) for t in results.trained]
        rows.append([f"{ours.name} − {theirs.name}", *cells, " / ".join(map(str, counts))])
    if not rows:
        return None, None
    rivals = [c for c in found if c.theirs.is_trained]  # beside the bare base all of these would look alike
    text = [
        "Differences are paired, seed by seed and item by item (two-way random effects, Student's t with Satterthwaite's degrees "
        "of freedom). One whose 95 % interval holds zero is a tie." + _of_losses(results) + _exact(results, rivals)
    ]  # fmt: skip
    named = [
        (f"{c.ours.name} − {c.theirs.name}, {c.trained}", c.apart) for c in rivals if not results.is_loss(c.tested)
    ]
    figure = "differences" if named else None
    section = Section("Wins, ties and losses", text, ["difference", *results.trained, "win / tie / loss"], rows, figure)
    return section, lambda: plots.differences(named, "ours − theirs, points")


def _exact(results: Results, found: list[Comparison]) -> str:
    """How many single-seed comparisons McNemar's exact test calls different."""
    tests, apart = 0, 0
    for c in found:
        a, b = (results.items(v, c.trained, c.tested) for v in (c.ours, c.theirs))
        for seed in a.keys() & b.keys():
            if {*a[seed], *b[seed]} <= {0.0, 1.0} and len(a[seed]) == len(b[seed]):
                tests, apart = tests + 1, apart + (mcnemar(a[seed], b[seed]) < 0.05)
    return f" Seed by seed, McNemar's exact test finds {apart} of {tests} pairs of runs apart at 0.05." if tests else ""


def _costs(results: Results) -> Made:
    costs = {v: results.cost(v) for v in results.variants if v.mode == ATTACHED or v.kind in SHADOWS[1:]}
    costs = {v: c for v, c in costs.items() if c}
    if not costs:
        return None, None
    first = next((v for v in costs if v.kind == "lora"), next(iter(costs)))
    rows = [
        [
            v.name, f"{c['parameters'] / 1e6:.2f} M", f"{c['bytes'] / 1e6:.1f}", f"{c['seconds']:.2f}",
            _times(results.beside(v, first, "seconds")), f"{c['peak'] / 1e9:.2f}", f"{c['rise'] / 1e9:.2f}",
            _times(results.beside(v, first, "rise")),
        ]
        for v, c in costs.items()
    ]  # fmt: skip
    text = [
        f"Medians over all runs; × is beside {first.name}, task by task and seed by seed, with half the 95 % interval. Memory is "
        "of the whole process, and its rise during training. Runs follow one another by the hour: for speed as such see the "
        "referee, `umbra bench`, which takes turns."
    ]  # fmt: skip
    header = ["method", "trained", "adapter, MB", "s a step", "time", "peak, GB", "rise, GB", "rise"]
    figure = "pareto" if any(results.mean_score(v) for v in costs) else None
    return Section("What it costs", text, header, rows, figure), lambda: plots.pareto(results)


def _transfer(results: Results) -> Made:
    named = results.study["transfer"]
    pairs = [
        (a, b) for a in results.trained for b in results.study["tested"][a]
        if b != a and b in ([named[a]] if isinstance(named.get(a), str) else named.get(a, []))
    ]  # fmt: skip
    if not pairs:
        return None, None
    rows = [[v.name, *(_told(results.score(v, *p), results.is_loss(p[1])) for p in pairs)] for v in results.variants]
    for ours, theirs in _opponents(results):
        cells = [_judged(results.apart(ours, theirs, *p), results.is_loss(p[1])) for p in pairs]
        rows.append([f"{ours.name} − {theirs.name}", *cells])
    text = [
        "Trained on one task and tested on another, none of whose test records were seen. Below, how far apart they are."
    ]
    header = ["method", *(f"{a} → {b}, {results.metric(b)}{'' if results.is_loss(b) else ' %'}" for a, b in pairs)]
    shares = [p for p in pairs if not results.is_loss(p[1])]
    section = Section("Transfer", text, header, rows, "transfer" if shares else None)
    return section, lambda: plots.transfer(results, shares)


def _forgetting(results: Results) -> Made:
    base = next((v for v in results.variants if not v.is_trained), None)
    if not results.study["forgetting"] or base is None:
        return None, None
    rows = []
    for tested in results.study["forgetting"]:
        pairs = [(v, base) for v in results.variants if v.is_trained] + _opponents(results)
        for ours, theirs in dict.fromkeys(pairs):
            cells = [
                "–" if task == tested else _judged(results.apart(ours, theirs, task, tested), results.is_loss(tested))
                for task in results.trained
            ]  # fmt: skip
            rows.append([f"{tested}: {ours.name} − {theirs.name}", *cells])
    units = ", ".join(f"{n} ({results.metric(n)})" for n in results.study["forgetting"])
    text = [
        f"What was never trained, after training on the task of a column, beside the bare base and beside each other: {units}. "
        "Negative means worse: beside the base, forgotten."
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
            f"{name}: {v.name}", f"{results.cost(v)['parameters'] / 1e6:.2f} M" if results.cost(v) else "–",
            *(_told(results.score(v, t, t), results.is_loss(t)) for t in results.trained), _told(results.mean_score(v)),
        ]
        for name, vs in families.items()
        for v in vs
    ]  # fmt: skip
    figure = None if all(results.is_loss(t) for t in results.trained) else "scaling"
    text = ["The scores as trainable parameters grow." + _of_losses(results)]
    section = Section("Scaling", text, ["family", "trained", *results.trained, "mean, %"], rows, figure)
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
        + _of_losses(results)
    ]
    return Section("Ablations", text, ["variant", *results.trained, "mean, %"], rows), None


def _search(results: Results) -> Made:
    found: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for kept in results.trials:
        asked = kept["umbra"]["request"]
        for name in results.names_of(kept):
            told = asked["training"]["learning_rate"], kept["umbra"]["validation_loss"]
            found.setdefault((asked["task"], name), []).append(told)
    if not found:
        return None, None
    rates: dict[str, list[str]] = {}
    for name, task, rate, source in results.about["rates"]:
        if source != "given":
            rates.setdefault(name, []).append(f"{task} {'–' if rate is None else f'{rate:g}'}" + _note_of(source))
    rows = []
    for (task, name), losses in found.items():
        best = min((loss for _, loss in losses if loss is not None), default=None)
        shown = [
            (loss == best, f"{r:g}: " + ("diverged" if loss is None else f"{loss:.4f}")) for r, loss in sorted(losses)
        ]
        cells = [f"**{text}**" if is_best and best is not None else text for is_best, text in shown]
        rows.append([f"{task}: {name}", " · ".join(cells), ", ".join(rates.get(name, []))])
    search, counts = results.study["search"], {len(losses) for losses in found.values()}
    given: dict[str, set[float]] = {}
    for name, _, rate, source in results.about["rates"]:
        if source == "given" and rate is not None:
            given.setdefault(name, set()).add(rate)
    steps = f"{search['max_steps']} steps" if search["max_steps"] else "as many steps as a run"
    budget = "Every method that was searched for had as many trials"
    if len(counts) > 1:
        budget = "Methods had different numbers of trials"
    text = [
        f"{budget}: {steps} at seed {search['seed']}, scored by the loss of the answers that were held out of the training set. A "
        "task without trials of its own takes the rate that is best over those with."
    ]  # fmt: skip
    if fixed := {n: ", ".join(f"{r:g}" for r in sorted(rates)) for n, rates in given.items()}:
        text.append(
            f"Without a search, at a rate that was given: {', '.join(f'{n} {told}' for n, told in fixed.items())}."
        )
    header = ["task: method", "rate: held-out loss", "trained with"]
    return Section("Search for the learning rate", text, header, rows), None


def _note_of(source: str) -> str:
    return "" if source.startswith("searched") else f" ({source})"


def _failures(results: Results) -> Made:
    if not results.failed and not results.unscored:
        return None, None
    rows = []
    for kept in results.failed:
        asked, error = kept["umbra"]["request"], kept["run_info"]["error_msg"].strip().splitlines()[-1:]
        name = f"{asked['task']}: {', '.join(results.names_of(kept))}, seed {asked['seed']}"
        rows.append([name, "".join(error)[:200]])
    for kept, test, error in results.unscored:
        asked, told = kept["umbra"]["request"], error.strip().splitlines()[-1]
        rows.append(
            [
                f"{asked['task']}: {', '.join(results.names_of(kept))}, seed {asked['seed']}, tested on {test}",
                told[:200],
            ]
        )
    text = [
        "These runs ended with an error, and are in no table; of those that name a test it is that score that is missing."
    ]
    return Section("Failed", text, ["run", "error"], rows), None


def _again(results: Results) -> Made:
    spent = sum(r["run_info"]["total_time"] for r in (*results.runs, *results.trials)) / 3600
    budget = {t: {**results.study["training"], **results.study["tasks"][t]["training"]} for t in results.trained}
    steps = [f"{t} {_length(b)} of {b.get('per_device_train_batch_size', 8)}" for t, b in budget.items()]
    shown = [v for v in results.variants if v.mode == ATTACHED or v.kind != "umbra"]
    kinds = [f"{v.method}: {results.about_kind(v)} {_fields(results, v)}".strip() for v in shown]
    text = [
        f"`{results.about['command']}` runs what is not in its folder yet ({len(results.runs)} runs and {len(results.trials)} "
        f"trials, {spent:.1f} hours in all), `umbra report` writes this page from it. Budgets: {', '.join(steps)}.",
        "; ".join(kinds) + ".",
    ]  # fmt: skip
    return Section("How to run it again", text), None


def _length(training: dict[str, Any]) -> str:
    if training.get("max_steps", 0) > 0:
        return f"{training['max_steps']} steps"
    return f"{training.get('num_train_epochs', 1):g} epochs, in steps"


def _fields(results: Results, variant: Variant) -> str:
    fields = results.study["methods"][variant.method]["fields"]
    hidden = ("peft_type", "target_modules")
    told = ", ".join(f"{k}={v}" for k, v in fields.items() if k not in hidden)
    return f"(`{told}`)" if told else ""
