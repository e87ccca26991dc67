"""The benchmark, ``umbra bench``: Umbra and its peers in one process, interleaved, at equal trainable parameters.

    base.py      the base, in memory once
    methods.py   the methods, rows of the tables
    cases.py     the cases, columns of the tables, and the checks before timing
    timing.py    interleaved timing
    memory.py    peak memory of a training step, in a separate process
    scaling.py   cost by layers, batch, context and rank
    machine.py   time, memory and description of a machine
    records.py   JSON; report.py: Markdown; plot.py: figures

``python -m bench`` at the root of the repository writes to bench/results.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from umbra.errors import ConfigError, plain
from umbra.files import folder
from umbra.files.locks import locked
from umbra.lab.bench import scaling
from umbra.lab.bench.base import RANDOM, Base, LanguageModel, random_config
from umbra.lab.bench.cases import CASES, Case, Memory, make_batch, unlabelled
from umbra.lab.bench.machine import Device, session
from umbra.lab.bench.memory import peak_memory
from umbra.lab.bench.methods import METHODS, REFERENCES, Method, build, chosen, fit, trainable
from umbra.lab.bench.records import Records
from umbra.lab.bench.report import Report
from umbra.lab.bench.timing import measure
from umbra.lab.options import BenchOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Plan = dict[Case, list[Method]]  # the methods to measure by case


def bench(options: BenchOptions) -> dict[str, Any]:
    """Measure everything that has no row yet, and write ``NAME.json``, ``NAME.md`` and ``NAME.png`` into ``options.out``.

    Returns:
        The content of the JSON file.

    Raises:
        ConfigError: unusable options; raised before anything is loaded.
        BaseModelError: see `load_base`.
        CheckpointError: the folder has another measurement of this name, or cannot be written.
    """
    names = chosen(options.methods, [m.name for m in METHODS], "methods")
    if not options.scaling:
        chosen(options.cases, [c.name for c in CASES], "cases")
    dtype = _check(options)
    device = Device(options.device, options.threads)
    methods = _installed([m for m in METHODS if m.name in names or m.name in REFERENCES])
    name = options.name or _name(options)
    header = {
        "base": "random Llamas" if options.scaling else options.base, "dtype": options.dtype, "device": device.torch.type,
        "machine": device.describe(), "lora_rank": options.lora_rank, "seed": options.seed,
    }  # fmt: skip
    if options.scaling:
        header |= {"base": f"random Llamas {scaling.SHAPE}", "lora_rank": scaling.CENTRE["rank"]}
    with locked(options.out):
        return _bench(options, name, names, header, methods, (dtype, device))


def _bench(
    options: BenchOptions, name: str, names: list[str], header: dict[str, Any], methods: list[Method],
    place: tuple[torch.dtype, Device],
) -> dict[str, Any]:  # fmt: skip
    """Run the benchmark; the output folder is locked."""
    dtype, device = place
    columns = {} if options.scaling else {c.name: c for c in CASES}
    wanted = chosen(options.cases, list(columns), "cases") if columns else []
    records = Records(Path(options.out) / f"{name}.json", header, session(asdict(options)), options.anew)
    if options.scaling:
        cases: dict[Case, list[str]] = {p.case: [n for n in scaling.ROWS if n in names] for p in scaling.POINTS}
    else:
        asked = options.methods != BenchOptions.methods
        cases = {columns[c]: [n for n in names if asked or _is_default(columns[c], n)] for c in wanted}
    plan = {case: _lacking(case, rows, methods, records, options) for case, rows in cases.items()}
    plan = {case: rows for case, rows in plan.items() if rows}
    if plan and options.scaling:
        _run_scaling(plan, records, options, dtype, device)
    elif plan:
        _run(plan, records, options, dtype, device)
    _write(records, options)
    return records.as_dict()


def _check(options: BenchOptions) -> torch.dtype:
    if options.dtype not in DTYPES:
        raise ConfigError(f"Unknown dtype {options.dtype!r}: choose from {', '.join(DTYPES)}.")
    return DTYPES[options.dtype]


def _name(options: BenchOptions) -> str:
    base = "scaling" if options.scaling else options.base.replace(RANDOM, "random-").strip("/").replace("/", "-")
    return f"{base}-{options.dtype}-{options.device.replace(':', '')}"


def _installed(methods: Sequence[Method]) -> list[Method]:
    for method in methods:
        if not method.is_installed:
            _say(f"{method.name}: skipped, {method.package} is not installed")
    return [m for m in methods if m.is_installed]


def _is_default(case: Case, name: str) -> bool:
    return case.methods is None or name in case.methods


def _lacking(
    case: Case, names: list[str], methods: list[Method], records: Records, options: BenchOptions
) -> list[Method]:
    """Return the methods of a case without a row, and the references to measure along with them.

    Methods that a case does not apply to get their row at once.
    """
    asked = [m for m in methods if m.name in names]
    unable = {m.name: {"absent": why} for m in asked if (why := case.absent(m)) is not None}
    records.note(case.name, unable)
    able = [m.name for m in asked if m.name not in unable]
    lacking = [n for n in able if options.anew or records.lacks(case.name, n, options.rounds)]
    if unable and set(able) <= set(REFERENCES):
        return []
    return [m for m in methods if m.name in lacking or (lacking and m.name in REFERENCES and case.absent(m) is None)]


# -- running -------------------------------------------------------------------------------------------------------


def _run(plan: Plan, records: Records, options: BenchOptions, dtype: torch.dtype, device: Device) -> None:
    base = Base.named(options.base, dtype, device.torch, options.seed)
    methods = [m for m in METHODS if any(m in rows for rows in plan.values())]
    rank, widths = fit(base, methods, options.lora_rank)
    if rank != options.lora_rank:
        _say(f"LoRA's rank is {rank}: at {options.lora_rank} LoRA is smaller than the attention of a shadow")
    models = build(base, methods, rank, widths, options.seed)
    records.sizes |= {name: trainable(model) for name, model in models.items()}
    records.fitted |= {"lora_rank": rank, "widths": {**records.fitted.get("widths", {}), **widths}}
    with _Progress(plan, base, device, options.rounds) as progress:
        for case, rows in plan.items():
            if not isinstance(case, Memory):
                rows_of_case = measure(
                    case, rows, models, base, device, rounds=options.rounds, seed=options.seed,
                    tick=lambda name, case=case: progress.advance(case, name),
                )  # fmt: skip
                records.put(case.name, rows_of_case)
        del models
        weighed = [case for case in plan if isinstance(case, Memory)]
        for method in methods:
            cases = [case for case in weighed if method in plan[case]]
            if cases:
                width = widths.get(method.name, 0)
                weights = peak_memory(cases, method, base, device, rank=rank, width=width, seed=options.seed)
                for case in cases:
                    records.put(case.name, {method.name: weights[case.name]})
                    progress.advance(case, method.name)


def _run_scaling(plan: Plan, records: Records, options: BenchOptions, dtype: torch.dtype, device: Device) -> None:
    points = [p for p in scaling.POINTS if p.case in plan]
    for point in tqdm(points, desc="scaling", disable=None):
        base = Base.random(random_config(**point.shape), dtype, device.torch, options.seed)
        rows = plan[point.case]
        rank, widths = fit(base, rows, point.sizes["rank"])
        models = build(base, rows, rank, widths, options.seed)
        measured = measure(point.case, rows, models, base, device, rounds=options.rounds, seed=options.seed)
        records.put(point.case.name, measured)


class _Progress:
    """A progress bar in seconds, estimated from short runs of the base."""

    def __init__(self, plan: Plan, base: Base, device: Device, rounds: int):
        batch = unlabelled(make_batch(base, 4, 128))
        tokens, new = 4 * 128, 8

        @torch.no_grad()
        def forward() -> None:
            base.model(**batch)

        @torch.no_grad()
        def decode() -> None:
            cast(LanguageModel, base.model).generate(batch["input_ids"][:1, :4], max_new_tokens=new, do_sample=False)

        per_token, per_new = (min(device.seconds(run) for _ in range(2)) for run in (forward, decode))
        self.costs = {case: case.cost(per_token / tokens, per_new / new) for case in plan}
        runs = {case: 1 if isinstance(case, Memory) else rounds + 1 for case in plan}
        total = sum(self.costs[case] * runs[case] * len(rows) for case, rows in plan.items())
        _say(f"{len(plan)} cases, {rounds} rounds: about {total / 60:.1f} minutes")
        form = "{desc:<34} {percentage:3.0f} % |{bar}| {n:.0f}/{total:.0f} s estimated, {elapsed} elapsed"
        self.bar = tqdm(total=total, bar_format=form, disable=None)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self, case: Case, name: str) -> None:
        self.bar.set_description_str(f"{case.name}: {name}", refresh=False)
        self.bar.update(self.costs[case])


# -- writing -------------------------------------------------------------------------------------------------------


def report_of(values: dict[str, Any]) -> Report:
    """Return the tables of a measurement; ``values`` are those of its JSON file."""
    return Report(values, {c.name: c.about for c in (*CASES, *(p.case for p in scaling.POINTS))})


def _write(records: Records, options: BenchOptions) -> None:
    report = report_of(records.as_dict())
    text, stem = plain(report.text()), records.path.stem
    files: dict[str, Callable[[Path], object]] = {f"{stem}.md": lambda path: folder.write_text(path, text)}
    if find_spec("matplotlib") is None:
        _say("no figure: matplotlib is not installed")
    else:
        files[f"{stem}.png"] = _figure(report, options)
    records.write(files)
    if not options.json:
        print(text)
    _say(f"written: {', '.join(str(records.path.with_name(n)) for n in (records.path.name, *files))}")


def _say(text: str) -> None:
    tqdm.write(f"umbra bench: {text}", file=sys.stderr)


def _figure(report: Report, options: BenchOptions) -> Callable[[Path], None]:
    """Return what draws the figure of a report."""
    from umbra.lab.bench import plot

    if options.scaling:
        values = {a: {p.case.name: p.value for p in scaling.POINTS if p.axis == a} for a in scaling.AXES}
        return lambda path: plot.growth(report, values, path)
    sizes = {c.name: c.rows for c in CASES if c.name == "step-masked" or c.name.startswith("batch-")}
    return lambda path: plot.dots(report, sizes, path)
