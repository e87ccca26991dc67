"""Settings that are written down: a YAML file, in which 1e-3 is a number too, and 010 is ten. No torch in here."""

import re
from pathlib import Path
from typing import Any

from umbra.errors import ConfigError, shown

LARGEST_YAML = 2**17  # bytes
DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # what a shell passes: a pipe with a writer
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
NUMBER_LINE = re.compile(f"^(?:{NUMBER.pattern})$")


def number(text: Any) -> Any:
    """YAML's value of a text, but 1e-3 is a number too."""
    import yaml

    if not isinstance(text, str):
        return text
    if NUMBER.fullmatch(text):
        return float(text) if any(c in text for c in ".eE") else int(text)
    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError):
        return text


def spelled(values: dict[Any, Any]) -> dict[Any, Any]:
    """With "no" where a strategy was called so: to YAML that is False."""
    return {k: "no" if v is False and str(k).endswith("_strategy") else v for k, v in values.items()}


def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a key stands twice at line {node.start_mark.line + 1}")
            return spelled(super().construct_mapping(node, deep))

        def construct_decimal(self, node: Any) -> Any:
            text, is_int = str(self.construct_scalar(node)), node.tag == INT
            if NUMBER.fullmatch(text):
                return float(text) if any(c in text for c in ".eE") else int(text)
            return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)

    for tag in (INT, FLOAT):
        Loader.add_constructor(tag, Loader.construct_decimal)
    Loader.add_implicit_resolver(FLOAT, NUMBER_LINE, list("+-.0123456789"))
    return Loader


def _size(value: Any, sizes: dict[int, int]) -> int:
    """How many values there are in one, aliases written out; infinite where it holds itself.

    Args:
        sizes: of the containers that were met before, by identity.
    """
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = 2 * LARGEST_YAML  # until its own is known
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(value)]


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or a key that stands twice.
    """
    import yaml

    try:
        if Path(path).is_fifo() and not path.startswith(DESCRIPTORS):
            raise ValueError("it is a pipe, which nobody may write to")
        with open(path, "rb") as file:
            text = file.read(LARGEST_YAML + 1)
        if len(text) > LARGEST_YAML:
            raise ValueError(f"it is larger than {LARGEST_YAML:,} bytes")
        values = yaml.load(text, _loader())
        if _size(values, {}) > LARGEST_YAML:
            raise ValueError("its aliases stand for more than the file could hold")
    except Exception as error:  # beside YAMLError, yaml's constructors raise most of what Python has
        raise ConfigError(f"{path} cannot be read as YAML: {error!s:.500}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `field: value` lines, got {type(values).__name__}.")
    return {shown(k) if not isinstance(k, str) else k: v for k, v in values.items()}
