"""Sections on scaling, ablations and the learning-rate search."""

from umbra.lab.study.report import plots, wording
from umbra.lab.study.report.page import Section
from umbra.lab.study.report.performance import Made
from umbra.lab.study.results import Results, Variant


def scaling(results: Results) -> Made:
    """Scores over trainable parameters, one curve per family."""
    families: dict[str, list[Variant]] = {}
    for v in results.variants:
        method = results.study["methods"][v.method]
        if method["family"] and v.mode == method["modes"][0]:
            families.setdefault(method["family"], []).append(v)
    families = {n: vs for n, vs in families.items() if len(vs) > 1}
    if not families:
        return None, None
    rows = [
        [
            f"{name}: {v.name}", wording.millions(results.cost(v)["parameters"]) if results.cost(v) else wording.NOTHING,
            *(wording.score(results.score(v, t, t), results.is_loss(t)) for t in results.trained),
            wording.score(results.mean_score(v)),
        ]
        for name, variants in families.items()
        for v in variants
    ]  # fmt: skip
    figure = None if all(results.is_loss(t) for t in results.trained) else "scaling"
    text = ["Scores by number of trainable parameters." + wording.about_losses(results)]
    section = Section("Scaling", text, ["family", "trainable", *results.trained, "mean, %"], rows, figure)
    return section, lambda: plots.scaling(results, families)


def ablations(results: Results) -> Made:
    """Differences of the variants of one kind to the reference method."""
    name = results.study["reference"]
    if name is None:
        return None, None
    reference = next(v for v in results.variants if v.method == name)
    others = [v for v in results.variants if v.mode == reference.mode and v.kind == reference.kind and v != reference]
    cells = [wording.score(results.score(reference, t, t), results.is_loss(t)) for t in results.trained]
    rows = [[reference.name, *cells, wording.score(results.mean_score(reference))]]
    for v in others:
        cells = [wording.verdict(results.difference(v, reference, t, t), results.is_loss(t)) for t in results.trained]
        rows.append([v.name, *cells, wording.score(results.mean_score(v))])
    text = [
        f"Each row is {name} with the change in its name, minus {name}: a loss is the contribution of the part that was removed "
        "or changed." + wording.about_losses(results)
    ]  # fmt: skip
    return Section("Ablations", text, ["variant", *results.trained, "mean, %"], rows), None


Trials = dict[tuple[str, str], list[tuple[float, float | None]]]  # by task and method: rate and held-out loss


def search(results: Results) -> Made:
    """Held-out losses of all trials, and the rates chosen by them."""
    trials: Trials = {}
    for record in results.trials:
        request = record["umbra"]["request"]
        for name in results.names_of(record):
            trial = request["training"]["learning_rate"], record["umbra"]["validation_loss"]
            trials.setdefault((request["task"], name), []).append(trial)
    if not trials:
        return None, None
    chosen, rows = _chosen_rates(results), []
    for (task, name), losses in trials.items():
        best = min((loss for _, loss in losses if loss is not None), default=None)
        cells = [
            (best is not None and loss == best, f"{r:g}: " + ("diverged" if loss is None else f"{loss:.4f}"))
            for r, loss in sorted(losses)
        ]
        text = " · ".join(f"**{cell}**" if is_best else cell for is_best, cell in cells)
        rows.append([f"{task}: {name}", text, ", ".join(chosen.get(name, []))])
    header = ["task: method", "rate: held-out loss", "trained with"]
    return Section("Learning-rate search", _about_search(results, trials), header, rows), None


def _about_search(results: Results, trials: Trials) -> list[str]:
    settings = results.study["search"]
    steps = f"{settings['max_steps']} steps" if settings["max_steps"] else "as many steps as a run"
    budget = "Every method in the search had the same number of trials"
    if len({len(losses) for losses in trials.values()}) > 1:
        budget = "Methods had different numbers of trials"
    text = [
        f"{budget}: {steps} at seed {settings['seed']}, scored by the loss of answers held out of the training set. A task "
        "without trials uses the rate that is best over the tasks with trials."
    ]  # fmt: skip
    fixed: dict[str, set[float]] = {}
    for name, _, rate, source in results.description["rates"]:
        if source == "given" and rate is not None:
            fixed.setdefault(name, set()).add(rate)
    if fixed:
        rates = (f"{name} {', '.join(f'{r:g}' for r in sorted(values))}" for name, values in fixed.items())
        text.append(f"Fixed rates, without a search: {', '.join(rates)}.")
    return text


def _chosen_rates(results: Results) -> dict[str, list[str]]:
    """Return the rates that runs were trained with, by method, as text."""
    rates: dict[str, list[str]] = {}
    for name, task, rate, source in results.description["rates"]:
        if source != "given":
            note = "" if source.startswith("searched") else f" ({source})"
            rates.setdefault(name, []).append(f"{task} {wording.NOTHING if rate is None else f'{rate:g}'}{note}")
    return rates
