"""The paragraphs before the first table: setting, wins and losses, and what is missing."""

from umbra.lab.study.methods import FIT
from umbra.lab.study.report import wording
from umbra.lab.study.report.comparisons import Comparison, comparisons
from umbra.lab.study.results import Results


def lead(results: Results) -> list[str]:
    """Return the paragraphs."""
    study, judged = results.study, comparisons(results)
    paragraphs = [study["about"]] if study["about"] else []
    seeds = ", ".join(map(str, study["seeds"]))
    paragraphs.append(
        f"Base model: {study['base']} in {study['dtype']}; seeds {seeds}. {_environment(results)}".strip()
    )
    for what, part in (
        ("comparisons with other trained methods", [c for c in judged if c.baseline.is_trained]),
        ("comparisons with the bare base", [c for c in judged if not c.baseline.is_trained]),
    ):
        if part:
            paragraphs.append(_summary(results, what, part))
    if results.failed:
        paragraphs.append(f"**{len(results.failed)} runs have failed** and are in no comparison; see Failed runs.")
    if results.unscored:
        paragraphs.append(f"**{len(results.unscored)} scores are missing** because a test has failed; see Failed runs.")
    if results.missing:
        paragraphs.append(f"**{len(results.missing)} runs are missing:** the study has not been completed.")
    return paragraphs + _unmatched(results)


def _unmatched(results: Results) -> list[str]:
    """Return a paragraph about methods whose size differs from the size that methods are matched to."""
    match, sizes = results.study["match"], results.description["parameters"]
    if match is None:
        return []
    target = sizes.get(match, match) or 0
    alone = {v.method for v in results.alone}
    others = [n for n in sizes if sizes[n] and abs(sizes[n] - target) > FIT * target and n not in alone]
    text = ", ".join(f"{n} ({wording.millions(sizes[n])})" for n in others)
    return [f"Not matched in trainable parameters: {text}."] if others else []


def _summary(results: Results, what: str, judged: list[Comparison]) -> str:
    """Return how many comparisons are won, tied and lost, with every loss."""
    won, tied, lost = ([c for c in judged if c.difference.verdict == v] for v in ("win", "tie", "loss"))
    counts = f"{len(judged)} {what}: {len(won)} won, {len(tied)} tied, {len(lost)} lost."
    losses = [
        f"{c.ours.name} to {c.baseline.name} on {c.task} ({wording.score(c.difference, results.is_loss(c.tested), '+')})"
        for c in lost
    ]
    return f"{counts} **Lost:** {'; '.join(losses)}." if lost else f"{counts} No loss is statistically significant."


def _environment(results: Results) -> str:
    """Return machines, package versions, commits and dates of all runs."""
    environments: dict[str, tuple[set[str], set[str]]] = {}
    for record in (*results.runs, *results.trials):
        machine, packages = record["umbra"]["machine"], record["meta_info"]["package_info"]
        versions = [
            f"{n.removesuffix('-version')} {v}" for n, v in packages.items() if v and not n.startswith("bitsandbytes")
        ]
        device = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} threads"
        commits, days = environments.setdefault(f"{device}; {', '.join(versions)}", (set(), set()))
        commits.add(str(record["umbra"]["commit"]))
        days.add(record["run_info"]["created_at"][:10])
    parts = [f"{e}; commits {', '.join(sorted(c))}; {', '.join(sorted(d))}" for e, (c, d) in environments.items()]
    return ". ".join(parts) + "." if parts else ""
