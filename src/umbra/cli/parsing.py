"""Flags from dataclasses, flat YAML files, and flags that a library's own settings take.

argparse reads the command line. docs/explanation/log.md says which libraries for settings were tried, and what each does wrong.
"""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from umbra.config import ShadowConfig
from umbra.errors import ConfigError
from umbra.options import EMBEDDED, Options
from umbra.options import names as field_names
from umbra.options.yaml_file import number, read_yaml, restore_no

Kind = TypeVar("Kind", bound=Options)
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Parser(argparse.ArgumentParser):
    """Raises a ConfigError where argparse would print its usage and end the process; a flag may be given once.

    Flags may be written with dashes or underscores; help shows the underscores of YAML files.
    """

    def __init__(self, prog: str, usage: str | None = None, description: str | None = None):
        super().__init__(prog=prog, usage=usage, description=description, allow_abbrev=False)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


class _Once(argparse.Action):
    """Stores a value; a second one is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None and self.dest in vars(namespace):
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


class _Several(argparse.Action):
    """Stores one value by itself, several as a list, also those of a repeated flag."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        before = vars(namespace).get(self.dest) or []
        together = [*([before] if isinstance(before, str) else before), *(values or [])]
        setattr(namespace, self.dest, together[0] if len(together) == 1 else together)


def parse(prog: str, kind: type[Kind], arguments: list[str]) -> Kind:
    """Return the options of a verb.

    Args:
        prog: how the command is called, such as ``umbra eval``.
        kind: a dataclass; its docstring is the description.
        arguments: the command line after the verb.

    Raises:
        ConfigError: an unknown flag, a value outside its range, or something to load that does not exist.
    """
    about = (kind.__doc__ or "").partition("``: ")[2]
    parser = Parser(prog, description=about[:1].upper() + about[1:])
    add_flags(parser, kind)
    given, unknown = parser.parse_known_args(with_underscores(arguments))
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), field_names(kind), n=1)
        hint = f". Did you mean --{near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    options = kind(**vars(given))
    check_reachable(vars(options))
    return options


def run_settings(prog: str, description: str, kind: type, arguments: list[str]) -> tuple[dict[str, Any], bool]:
    """Return the flat settings of an optional YAML file, overridden by flags, and whether JSON is to be printed.

    Args:
        prog: how the command is called, such as ``umbra train``.
        description: of the command, for its help.
        kind: a dataclass with the settings of the run; those of `ShadowConfig` and of transformers' TrainingArguments are
            accepted as well.
        arguments: the command line after the verb.

    Raises:
        ConfigError: an unreadable file, a flag that is given twice, or something to load that does not exist.
    """
    parser = Parser(prog, f"{prog} [config.yaml] [--field value …]", description)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    add_flags(parser.add_argument_group("the run"), kind)
    add_flags(parser.add_argument_group("the shadow"), ShadowConfig)
    has_file = bool(arguments) and not arguments[0].startswith("-")
    known, others = parser.parse_known_args(with_underscores(arguments[has_file:]))
    flags = {**vars(known), **library_flags(others)}
    as_json = flags.pop("json")
    values = read_yaml(arguments[0]) if has_file else {}
    for name in [name for name in flags if "." in name]:  # of a nested group
        group, _, entry = name.partition(".")
        nested = values.get(group) or {}
        values[group] = {**nested, entry: flags.pop(name)} if isinstance(nested, dict) else nested
    values |= flags
    check_reachable({"base": EMBEDDED, **values})
    return values, as_json


def with_underscores(arguments: list[str]) -> list[str]:
    """Return the arguments with the underscores of fields in the names of flags, which users may write with dashes."""
    result: list[str] = []
    for argument in arguments:
        if argument == "--":
            return [*result, *arguments[len(result) :]]
        name, equals, value = argument.partition("=")
        is_flag = name.startswith("--") and not any(letter.isspace() for letter in name)
        result.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if is_flag else argument)
    return result


def library_flags(arguments: list[str]) -> dict[str, Any]:
    """Return flags of TrainingArguments: ``--key value``, ``--key=value``, or ``--key`` alone for true.

    Their types are unknown here, since importing transformers takes seconds; values are read as YAML.

    Raises:
        ConfigError: something else, or a flag that is given twice.
    """
    values: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        if not arguments[position].startswith("--"):
            raise ConfigError(f"Unexpected argument {arguments[position]!r}: settings are given as --field value.")
        name, equals, value = arguments[position][2:].partition("=")
        position += 1
        if not equals and position < len(arguments) and not arguments[position].startswith("--"):
            value, equals = arguments[position], "="
            position += 1
        if name in values:
            raise ConfigError(f"--{name} is given twice.")
        values[name] = number(value) if equals else True
    return restore_no(values)


def add_flags(parser: "argparse._ActionsContainer", kind: type, prefix: str = "") -> None:
    """Add a flag for each field of a dataclass, and for each field of a dataclass in it.

    Args:
        parser: a parser or a group of one.
        kind: a dataclass whose fields have a help text.
        prefix: of the names of the flags.
    """
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        text = f.metadata["help"].replace("%", "%%")
        types = [t for t in (get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None)]
        several: dict[str, Any] = {"nargs": "+", "action": _Several} if list[str] in types else {}
        if f.metadata.get("positional"):
            parser.add_argument(f.name, help=text, **several)
        elif dataclasses.is_dataclass(types[0]) and isinstance(types[0], type):
            add_flags(parser, types[0], f"{f.name}.")
        else:
            if f.default not in (None, ""):
                text += f" (default: {f.default})"
            parser.add_argument(
                f"--{prefix}{f.name}", default=argparse.SUPPRESS, help=text, **several, **_conversion(types)
            )


def _conversion(types: list[Any]) -> dict[str, Any]:
    """Return argparse's settings for a flag whose value has one of these types."""
    if types == [bool]:
        return {"type": _boolean, "metavar": "BOOL", "nargs": "?", "const": True}
    if types == [int, float]:
        return {"type": number, "metavar": "NUMBER"}
    if get_origin(types[0]) is tuple:
        return {"type": _integers, "metavar": "INT,…"}
    if get_origin(types[0]) is dict:
        return {"type": _mapping, "metavar": "JSON"}
    if types[0] in (int, float):
        return {"type": types[0], "metavar": types[0].__name__.upper()}
    return {"type": str, "metavar": "STR"}


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
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return BOOLEANS[text.lower()]


def check_reachable(values: dict[str, Any]) -> None:
    """Refuse an adapter, a base, a shadow or data that cannot be loaded from anywhere, before importing anything heavy.

    Raises:
        UmbraError: the first such value.
    """
    from umbra.files import hub

    adapter, model = ("adapter_config.json", "shadow_config.json"), ("config.json",)
    for name, files in (("adapter", adapter), ("base", model), ("shadow", model)):
        value = values.get(name)
        if isinstance(value, str) and not value.startswith("random:") and value not in ("mirror", "dense"):
            hub.check(value, name, files)
    hub.check_data(*(values.get(name) for name in ("train_data", "eval_data", "data")))
