"""Sections on scores, wins and losses, costs, transfer and forgetting."""

from collections.abc import Callable

from matplotlib.figure import Figure

from umbra.lab.study.methods import ATTACHED, SHADOWS
from umbra.lab.study.report import plots, wording
from umbra.lab.study.report.comparisons import Comparison, comparisons, pairs
from umbra.lab.study.report.page import Section
from umbra.lab.study.results import Results
from umbra.lab.study.statistics import mcnemar

Made = tuple[Section | None, Callable[[], Figure] | None]  # a section, and what draws its figure
VERDICTS = ("win", "tie", "loss")


def scores(results: Results) -> Made:
    """Scores of every variant on every trained task, with sizes and costs."""
    tasks, rows = results.trained, []
    best = {}
    for task in tasks:
        means = [s.mean for v in results.variants if (s := results.score(v, task, task)) is not None]
        best[task] = (min if results.is_loss(task) else max)(means, default=None)
    for v in results.variants:
        cells = []
        for task in tasks:
            estimate = results.score(v, task, task)
            text = wording.score(estimate, results.is_loss(task))
            cells.append(f"**{text}**" if estimate is not None and estimate.mean == best[task] else text)
        cost = results.cost(v)
        costs = [wording.NOTHING] * 3
        if cost:
            costs = [wording.millions(cost["parameters"]), f"{cost['seconds']:.2f}", f"{cost['peak'] / 1e9:.2f}"]
        rows.append([v.name, *cells, wording.score(results.mean_score(v)), *costs])
    noise = "the variance between seeds and between test items"
    if len(results.study["seeds"]) == 1:
        noise = "the variance between test items; the variance between seeds is unknown, because there is one seed"
    held_out = [t for t in tasks if results.study["tasks"][t].get("scored_on") == "validation"]
    place = f"its test set ({', '.join(held_out)}: on held-out training records)" if held_out else "its test set"
    text = [
        f"Each method is trained on a task and tested on {place}: mean over seeds ± half the 95 % confidence interval, which "
        f"includes {noise}. The best mean of a column is bold, whether or not the difference is significant; see the next table. "
        "Further columns: trainable parameters, seconds per step, and peak memory of training in GB."
        + wording.about_losses(results)
    ]  # fmt: skip
    units = [f"{t}, {results.metric(t)}{results.unit(t)}" for t in tasks]
    header = ["method", *units, "mean", "trainable", "s/step", "GB"]
    return Section("Scores", text, header, rows, "scores"), lambda: plots.scores(results)


def verdicts(results: Results) -> Made:
    """Paired differences of all compared methods."""
    rows, judged = [], [c for c in comparisons(results) if c.trained == c.tested]
    for ours, baseline in dict.fromkeys((c.ours, c.baseline) for c in judged):
        by_task = {c.trained: c.difference for c in judged if (c.ours, c.baseline) == (ours, baseline)}
        counts = [sum(d.verdict == verdict for d in by_task.values()) for verdict in VERDICTS]
        cells = [wording.verdict(by_task.get(t), results.is_loss(t)) for t in results.trained]
        rows.append([f"{ours.name} − {baseline.name}", *cells, " / ".join(map(str, counts))])
    if not rows:
        return None, None
    trained = [
        c for c in judged if c.baseline.is_trained
    ]  # beside the bare base their differences would all look alike
    text = [
        "Differences are paired, seed by seed and item by item (two-way random effects, Student's t with Satterthwaite's degrees "
        "of freedom). A difference whose 95 % confidence interval contains zero is a tie."
        + wording.about_losses(results) + _exact_tests(results, trained)
    ]  # fmt: skip
    named = [
        (f"{c.ours.name} − {c.baseline.name}, {c.trained}", c.difference)
        for c in trained
        if not results.is_loss(c.tested)
    ]
    figure = "differences" if named else None
    section = Section("Wins, ties and losses", text, ["difference", *results.trained, "win / tie / loss"], rows, figure)
    return section, lambda: plots.differences(named, "ours − baseline, percentage points")


def _exact_tests(results: Results, judged: list[Comparison]) -> str:
    """Return how many pairs of single runs differ by McNemar's exact test."""
    tests, significant = 0, 0
    for c in judged:
        a, b = (results.items(v, c.trained, c.tested) for v in (c.ours, c.baseline))
        for seed in a.keys() & b.keys():
            if {*a[seed], *b[seed]} <= {0.0, 1.0} and len(a[seed]) == len(b[seed]):
                tests, significant = tests + 1, significant + (mcnemar(a[seed], b[seed]) < 0.05)
    return (
        f" By McNemar's exact test, {significant} of {tests} pairs of single runs differ (p < 0.05)." if tests else ""
    )


def costs(results: Results) -> Made:
    """Parameters, file size, time and memory."""
    by_variant = {v: results.cost(v) for v in results.variants if v.mode == ATTACHED or v.kind in SHADOWS[1:]}
    by_variant = {v: c for v, c in by_variant.items() if c}
    if not by_variant:
        return None, None
    reference = next((v for v in by_variant if v.kind == "lora"), next(iter(by_variant)))
    rows = [
        [
            v.name, wording.millions(c["parameters"]), f"{c['bytes'] / 1e6:.1f}", f"{c['seconds']:.2f}",
            wording.ratio(results.cost_ratio(v, reference, "seconds")), f"{c['peak'] / 1e9:.2f}", f"{c['rise'] / 1e9:.2f}",
            wording.ratio(results.cost_ratio(v, reference, "rise")),
        ]
        for v, c in by_variant.items()
    ]  # fmt: skip
    text = [
        f"Medians over all runs; × is relative to {reference.name}, task by task and seed by seed, ± half the 95 % confidence "
        "interval. Peak memory is that of the whole process, the increase that during training. Runs take place hours apart: to "
        "compare speed, use `umbra bench`, which interleaves the methods."
    ]  # fmt: skip
    header = ["method", "trainable", "adapter, MB", "s/step", "time", "peak, GB", "increase, GB", "increase"]
    figure = "pareto" if any(results.mean_score(v) for v in by_variant) else None
    return Section("Cost", text, header, rows, figure), lambda: plots.pareto(results)


def transfer(results: Results) -> Made:
    """Scores on tasks that were not trained on, as listed under ``transfer``."""
    listed = results.study["transfer"]
    tasks = [
        (a, b) for a in results.trained for b in results.study["tested"][a]
        if b != a and b in ([listed[a]] if isinstance(listed.get(a), str) else listed.get(a, []))
    ]  # fmt: skip
    if not tasks:
        return None, None
    rows = [
        [v.name, *(wording.score(results.score(v, *t), results.is_loss(t[1])) for t in tasks)] for v in results.variants
    ]
    for ours, baseline in pairs(results):
        cells = [wording.verdict(results.difference(ours, baseline, *t), results.is_loss(t[1])) for t in tasks]
        rows.append([f"{ours.name} − {baseline.name}", *cells])
    text = [
        "Each method is trained on one task and tested on another one, none of whose test records is among the training records. "
        "The last rows are paired differences."
    ]  # fmt: skip
    header = ["method", *(f"{a} → {b}, {results.metric(b)}{results.unit(b)}" for a, b in tasks)]
    shares = [t for t in tasks if not results.is_loss(t[1])]
    section = Section("Transfer", text, header, rows, "transfer" if shares else None)
    return section, lambda: plots.transfer(results, shares)


def forgetting(results: Results) -> Made:
    """Scores on unrelated tasks after training, compared with the bare base."""
    base = next((v for v in results.variants if not v.is_trained), None)
    if not results.study["forgetting"] or base is None:
        return None, None
    rows = []
    for tested in results.study["forgetting"]:
        compared = [(v, base) for v in results.variants if v.is_trained] + pairs(results)
        for ours, baseline in dict.fromkeys(compared):
            cells = [
                wording.NOTHING if task == tested
                else wording.verdict(results.difference(ours, baseline, task, tested), results.is_loss(tested))
                for task in results.trained
            ]  # fmt: skip
            rows.append([f"{tested}: {ours.name} − {baseline.name}", *cells])
    units = ", ".join(
        f"{n} ({results.metric(n)}{', nats/token' if results.is_loss(n) else ''})" for n in results.study["forgetting"]
    )  # fmt: skip
    text = [
        f"Forgetting: the change on unrelated tasks after training on the task of a column, relative to the bare base and between "
        f"methods: {units}. Negative values are worse: relative to the base, forgetting (for a loss, the loss increase)."
    ]  # fmt: skip
    return Section("Forgetting", text, ["after training on", *results.trained], rows), None
