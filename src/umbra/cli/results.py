"""What several verbs share: results as lines of text, and packages that an extra installs."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib.util import find_spec

from umbra.errors import ConfigError
from umbra.options.extras import install_command


def trainer_output(as_json: bool) -> AbstractContextManager[object]:
    """Send to standard error whatever trainers print beside the result, if a program is to read the result."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def flattened(metrics: Mapping[str, object]) -> dict[str, object]:
    """Return nested metrics one level down, under both names."""
    inner = {key: value if isinstance(value, Mapping) else {"": value} for key, value in metrics.items()}
    return {f"{key} {name}".strip(): value for key, values in inner.items() for name, value in values.items()}


def lines(metrics: Mapping[str, object]) -> str:
    """Return metrics as aligned lines."""
    return "\n".join(f"{k:<28}{v:,.4f}" if isinstance(v, float) else f"{k:<28}{v:,}" for k, v in metrics.items())


def check_installed(command: str, extra: str, packages: tuple[str, ...]) -> None:
    """Raise a ConfigError if a package that a verb needs is missing.

    Args:
        command: how the command is called, for the message.
        extra: the extra of umbra-peft that installs them.
        packages: their import names.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ConfigError(f"{command} needs {', '.join(missing)}: {install_command(extra)}.")
