"""The ``umbra`` command. Each subcommand is imported when it runs, so that ``--help`` is instant."""

import argparse
import dataclasses
import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from umbra.cli.terminal import (
    BROKEN_PIPE,
    abandon_output,
    isolate,
    message_of,
    place_of,
    plain_streams,
    raw_output,
    say,
)
from umbra.config import DialectConstants, ShadowConfig
from umbra.errors import ConfigError, one_line
from umbra.options import (
    EMBEDDED,
    BenchOptions,
    ConvertOptions,
    DetachOptions,
    EvalOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectOptions,
    PretrainOptions,
    ReportOptions,
    TrainOptions,
    speaks,
)
from umbra.options.yaml_file import number, read_yaml, spelled

COMMANDS = {
    "train": "train a shadow: umbra train config.yaml [--field value …]",
    "pretrain": "pretrain a shadow by itself: umbra pretrain config.yaml [--field value …]",
    "eval": "score base, attached and detached on a held-out set",
    "evaluate": "compare methods over tasks and seeds: umbra evaluate study.yaml",
    "report": "write the report of a study again",
    "generate": "answer a prompt, streaming",
    "detach": "write the shadow alone, as a stock transformers checkpoint",
    "export": "write the shadow alone for transformers, onnxruntime or llama.cpp, compared with PyTorch",
    "convert": "write an adapter for PEFT or shadow-peft, or make theirs Umbra's",
    "inspect": "explain an adapter folder",
    "bench": "time and weigh Umbra beside LoRA, DoRA and the published Shadows",
    "lm_eval": "lm-eval's command line, with --model umbra: umbra lm_eval run --model umbra --model_args adapter=…",
}
PATIENCE = 20  # seconds for which a rank leaves an error to rank 0, at whose end the launcher ends them all


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand. See docs/trouble.md.

    Returns:
        0 on success; 1 where single runs of a comparison failed; 2 with one line on standard error for what a user can
        mend; 70 likewise for an error of Umbra's own; 130 when interrupted; 141 where nobody reads standard output.
    """
    if arguments is None:
        isolate()
        arguments = sys.argv[1:]
    with plain_streams():
        try:
            try:
                return _dispatch(arguments)
            finally:  # argparse ends the process after its help
                sys.stdout.flush()
        except BrokenPipeError:
            abandon_output()
            return BROKEN_PIPE
        except KeyboardInterrupt:
            print("umbra: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            return _fail(error)


def _fail(error: Exception) -> int:
    """Say what went wrong, in one line."""
    if os.environ.get("UMBRA_TRACEBACK"):
        raise error
    if not speaks():
        time.sleep(PATIENCE)
    text, code = message_of(error), 2
    if text is None:
        kind, code = type(error).__name__, 70
        text = one_line(
            f"unexpected {kind} at {place_of(error)}: {error!s:.300}. Set UMBRA_TRACEBACK=1 for the traceback, and report it"
        )
    print(f"umbra: error: {text}", file=sys.stderr)
    abandon_output()
    return code


class _Parser(argparse.ArgumentParser):
    """Raises a ConfigError where argparse would print its usage and end the process; a flag is given once."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


class _Once(argparse.Action):
    """Stores a value, unless there is one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string is not None and self.dest in vars(namespace):
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


def _dispatch(arguments: list[str]) -> int:
    parser = _Parser(prog="umbra", description="A frozen language model and its detachable shadow.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    given, rest = parser.parse_known_args(arguments)
    if given.version:
        from umbra import __version__

        print(f"umbra {__version__}")
        return 0
    if given.command is None:
        parser.print_help()
        return 0
    return globals()[f"_{given.command}"](rest)


# -- the subcommands ---------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    values, as_json = _run_settings(
        "umbra train",
        "Train a shadow. Every field below can stand in a flat YAML file and be overridden by a flag; so can "
        "every field of transformers' TrainingArguments (learning_rate, num_train_epochs, activation_checkpointing, …). "
        "The same command again resumes a run that was killed.",
        TrainOptions,
        arguments,
    )
    from umbra.training.train import train

    with _telling_errors(as_json):
        metrics = train(values)
    if speaks():
        say(json.dumps(metrics, indent=2) if as_json else _lines(metrics))
    _leave_ranks()
    return 0


def _telling_errors(as_json: bool) -> AbstractContextManager[Any]:
    """What trainers print beside the result goes to stderr, if the result is to be read by a program."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _pretrain(arguments: list[str]) -> int:
    values, as_json = _run_settings(
        "umbra pretrain",
        "Pretrain a shadow by itself, from text and from the frozen base; the folder is then `--shadow` of umbra train. Every "
        "field below can stand in a flat YAML file and be overridden by a flag; so can every field of transformers' "
        "TrainingArguments (max_steps, learning_rate, …), for each stage. The same command again resumes a run that was killed.",
        PretrainOptions,
        arguments,
    )
    from umbra.training.pretrain import pretrain

    with _telling_errors(as_json):
        metrics = pretrain(values)
    say(json.dumps(metrics, indent=2) if as_json else _lines(_flat(metrics)))
    return 0


def _flat(metrics: dict[str, Any]) -> dict[str, Any]:
    """Values one level down under both names."""
    inner = {k: v if isinstance(v, dict) else {"": v} for k, v in metrics.items()}
    return {f"{k} {name}".strip(): value for k, found in inner.items() for name, value in found.items()}


def _run_settings(prog: str, about: str, kind: type, arguments: list[str]) -> tuple[dict[str, Any], bool]:
    """Flat settings of a YAML file and flags, and whether JSON is to be printed."""
    parser = _Parser(prog=prog, usage=f"{prog} [config.yaml] [--field value …]", description=about)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    _add_flags(parser.add_argument_group("the run"), kind)
    _add_flags(parser.add_argument_group("the shadow"), ShadowConfig)
    file, rest = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else (None, arguments)
    known, rest = parser.parse_known_args(rest)
    values = read_yaml(file) if file else {}
    values |= {k: v for k, v in vars(known).items() if k != "json"}
    values |= _pairs(rest)
    _check_reachable({"base": EMBEDDED, **values})
    return values, known.json


def _eval(arguments: list[str]) -> int:
    options = _parse("umbra eval", EvalOptions, arguments)
    from umbra.evaluation.scoring import as_json, score_modes, table, write_replies

    scores, replies = score_modes(options)
    try:
        say(json.dumps(as_json(scores), indent=2) if options.json else table(scores))
    finally:
        write_replies(options.output, replies)
    return 0


def _evaluate(arguments: list[str]) -> int:
    options = _parse("umbra evaluate", EvaluateOptions, arguments)
    _check_installed("umbra evaluate", "evaluate", ("peft", "scipy", "matplotlib"))
    from umbra.lab.study import evaluate

    with _telling_errors(options.json):
        found = evaluate(options)
    say(json.dumps(found, indent=2) if options.json else "\n".join(found["report"]))
    return 1 if found["failed"] else 0


def _report(arguments: list[str]) -> int:
    options = _parse("umbra report", ReportOptions, arguments)
    _check_installed("umbra report", "evaluate", ("scipy", "matplotlib"))
    from umbra.files.locks import locked
    from umbra.lab.study.report import write_report

    out = Path(options.out or options.study)
    with locked(out):
        files = write_report(Path(options.study), out)
    say(json.dumps({"report": [str(f) for f in files]}) if options.json else "\n".join(map(str, files)))
    return 0


def _generate(arguments: list[str]) -> int:
    options = _parse("umbra generate", GenerateOptions, arguments)
    from umbra.evaluation.generate import generate

    with nullcontext() if options.json else raw_output():
        answer = generate(options)
    if options.json:
        say(json.dumps(answer, indent=2, ensure_ascii=False))
    return 0


def _detach(arguments: list[str]) -> int:
    options = _parse("umbra detach", DetachOptions, arguments)
    from umbra.adapters.prompting import open_formatter
    from umbra.deploy.detach import parse_dtype, write_detached
    from umbra.files.manifest import check_apart, of_model, writing
    from umbra.model.loading import load

    dtype, out = parse_dtype(options.dtype), Path(options.out)
    asked = {"command": "detach", "adapter": of_model(options.adapter), "base": options.base, "dtype": options.dtype}
    with writing(out, asked, options.overwrite) as noted:
        if not noted.is_complete:
            check_apart(out, adapter=options.adapter, base=options.base)
            model = load(options.adapter, options.base)
            check_apart(out, base=model.base.name_or_path)
            write_detached(model, out, open_formatter(model).tokenizer, overwrite=True, dtype=dtype)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    if options.json:
        say(json.dumps({"path": str(out), "bytes": size}))
    else:
        say(f"{out}: a stock transformers model of {size / 1e6:.1f} MB")
    return 0


def _export(arguments: list[str]) -> int:
    options = _parse("umbra export", ExportOptions, arguments)
    from umbra.deploy.export import export, table

    rows, answer = export(options)
    if options.json:
        found = {"path": options.out, "files": [dataclasses.asdict(r) for r in rows], "answer": answer}
        say(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        say("\n\n".join([table(rows), *([answer] if answer is not None else [])]))
    return 0


def _convert(arguments: list[str]) -> int:
    options = _parse("umbra convert", ConvertOptions, arguments)
    if not options.to or not options.out:
        raise ConfigError("Say what to write and where: --to peft|shadow-peft|umbra --out FOLDER.")
    from umbra.adapters.interop import check_format
    from umbra.deploy.convert import convert
    from umbra.files.manifest import of_model, writing
    from umbra.model.loading import load

    check_format(options.to)
    out = Path(options.out)
    asked = {"command": "convert", "adapter": of_model(options.adapter), "to": options.to, "shadow": options.shadow}
    with writing(out, {**asked, "base": options.base}, False) as noted:
        if not noted.is_complete:
            convert(load(options.adapter, options.base, shadow=options.shadow), out, options.to, is_resumed=True)
    files = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    say(json.dumps({"path": str(out), "files": files}) if options.json else f"{out}: {', '.join(files)}")
    return 0


def _inspect(arguments: list[str]) -> int:
    options = _parse("umbra inspect", InspectOptions, arguments)
    from umbra.adapters.inspect import explain, inspect

    found = inspect(options.path)
    say(json.dumps(found, indent=2, ensure_ascii=False) if options.json else explain(found))
    return 0


def _bench(arguments: list[str]) -> int:
    options = _parse("umbra bench", BenchOptions, arguments)
    from umbra.lab.bench import bench

    found = bench(options)
    if options.json:
        say(json.dumps(found, indent=2, ensure_ascii=False))
    return 1 if any("refused" in row for rows in found["cases"].values() for row in rows.values()) else 0


def _lm_eval(arguments: list[str]) -> int:
    _check_installed("umbra lm_eval", "lm-eval", ("lm_eval",))
    from umbra.evaluation.lm_eval import main
    from umbra.files import hub

    with hub.lookup("lm-eval's data sets"):
        main(arguments)
    return 0


def _check_installed(command: str, extra: str, packages: tuple[str, ...]) -> None:
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise ConfigError(f"{command} needs {', '.join(missing)}: pip install 'umbra-peft[{extra}]'.")


def _leave_ranks() -> None:
    """Of a launched run: end the process group while the interpreter is whole, which its threads need."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# -- flags from dataclasses --------------------------------------------------------------------------------------------


def _parse(prog: str, kind: type, arguments: list[str]) -> Any:
    parser = _Parser(prog=prog, description=(kind.__doc__ or "").partition("`` ")[2] or kind.__doc__)
    _add_flags(parser, kind)
    options = kind(**vars(parser.parse_args(arguments)))
    _check_reachable(vars(options))
    return options


def _check_reachable(values: dict[str, Any]) -> None:
    """Refuse an adapter, a base, a shadow or data that can be loaded from nowhere before anything heavy is imported."""
    from umbra.files import hub

    adapter, model = ("adapter_config.json", "shadow_config.json"), ("config.json",)
    for name, files in (("adapter", adapter), ("base", model), ("shadow", model)):
        value = values.get(name)
        if isinstance(value, str) and not value.startswith("random:") and value not in ("mirror", "dense"):
            hub.check(value, name, files)
    hub.check_data(*(values.get(name) for name in ("train_data", "eval_data", "data")))


def _add_flags(parser: Any, kind: type) -> None:
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        text = f.metadata["help"].replace("%", "%%")
        types = [t for t in (get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None)]
        several: dict[str, Any] = {"nargs": "+", "action": _Several} if list[str] in types else {}
        if f.metadata.get("positional"):
            parser.add_argument(f.name, help=text, **several)
            continue
        default = "" if f.default in (None, "", dataclasses.MISSING) else f" (default: {f.default})"
        if types == [bool]:
            parser.add_argument(
                f"--{f.name}", f"--{f.name.replace('_', '-')}", nargs="?", const=True, type=_boolean,
                default=argparse.SUPPRESS, metavar="BOOL", help=text + default,
            )  # fmt: skip
            continue
        kind_of = types[0] if types[0] in (int, float) else str
        form, metavar = kind_of, kind_of.__name__.upper()
        if get_origin(types[0]) is tuple:
            form, metavar = _integers, "INT,…"
        elif get_origin(types[0]) is dict or types[0] is DialectConstants:
            form, metavar = _mapping, "JSON"
        elif types == [int, float]:
            form, metavar = number, "NUMBER"
        parser.add_argument(
            f"--{f.name}", *{f"--{f.name.replace('_', '-')}"} - {f"--{f.name}"}, type=form, default=argparse.SUPPRESS,
            metavar=metavar, help=text + default, **several,
        )  # fmt: skip


class _Several(argparse.Action):
    """One value by itself; several as a list, also of a flag that is given several times."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = vars(namespace).get(self.dest) or []
        values = [*([before] if isinstance(before, str) else before), *values]
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'expected a JSON object such as {{"enable_thinking": false}}, got {text!r:.80}'
        )
    return value


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def _pairs(rest: list[str]) -> dict[str, Any]:
    """Flags of TrainingArguments: ``--key value``, ``--key=value``, or ``--key`` alone for true."""
    pairs: dict[str, Any] = {}
    i = 0
    while i < len(rest):
        if not rest[i].startswith("--"):
            raise ConfigError(f"Unexpected argument {rest[i]!r}: settings are given as --field value.")
        key, equals, value = rest[i][2:].partition("=")
        if not equals and i + 1 < len(rest) and not rest[i + 1].startswith("--"):
            i, value, equals = i + 1, rest[i + 1], "="
        name = key.replace("-", "_")
        if name in pairs:
            raise ConfigError(f"--{key} is given twice.")
        pairs[name] = number(value) if equals else True
        i += 1
    return spelled(pairs)


def _lines(metrics: dict[str, Any]) -> str:
    return "\n".join(f"{k:<28}{v:,.4f}" if isinstance(v, float) else f"{k:<28}{v:,}" for k, v in metrics.items())


if __name__ == "__main__":
    sys.exit(main())
