"""YAML settings with the numbers that users mean: 1e-3 is a number, 010 is ten. Imports no torch.

YAML 1.1, which PyYAML reads, takes 1e-3 for text, 010 for eight, ``no`` for false, and the last of two equal keys.
"""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbra.errors import ConfigError, raising, shown

if TYPE_CHECKING:
    from yaml import SafeLoader

LARGEST_YAML = 2**17  # bytes
DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # pipes that a shell passes, which have a writer
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
NUMBER_LINE = re.compile(f"^(?:{NUMBER.pattern})$")


def number(text: object) -> Any:
    """Return YAML's value of a flag's text, with numbers as in `read_yaml`; any other value unchanged."""
    import yaml

    if not isinstance(text, str):
        return text
    if NUMBER.fullmatch(text):
        return _decimal(text)
    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError):
        return text


def restore_no(values: dict[Any, Any]) -> dict[Any, Any]:
    """Return the mapping with "no" for false in a strategy: ``save_strategy: no`` is false to YAML."""
    return {k: "no" if v is False and str(k).endswith("_strategy") else v for k, v in values.items()}


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a file.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or a key that stands twice.
    """
    import yaml

    # Beside YAMLError, yaml's constructors raise most of Python's exceptions.
    with raising(ConfigError, lambda error: f"{path} cannot be read as YAML: {error!s:.500}"):
        if Path(path).is_fifo() and not path.startswith(DESCRIPTORS):
            raise ValueError("it is a pipe, which may have no writer")
        with open(path, "rb") as file:
            text = file.read(LARGEST_YAML + 1)
        if len(text) > LARGEST_YAML:
            raise ValueError(f"it is larger than {LARGEST_YAML:,} bytes")
        values = yaml.load(text, _loader())
        if _size(values, {}) > LARGEST_YAML:
            raise ValueError("its aliases expand to more values than the file could hold")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `field: value` lines, got {type(values).__name__}.")
    return {shown(k) if not isinstance(k, str) else k: v for k, v in values.items()}


def _decimal(text: str) -> int | float:
    return float(text) if any(c in text for c in ".eE") else int(text)


@cache
def _loader() -> "type[SafeLoader]":
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a key stands twice at line {node.start_mark.line + 1}")
            return restore_no(super().construct_mapping(node, deep))

        def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
            text = str(self.construct_scalar(node))
            if NUMBER.fullmatch(text):
                return _decimal(text)
            return self.construct_yaml_int(node) if node.tag == INT else self.construct_yaml_float(node)

    for tag in (INT, FLOAT):
        Loader.add_constructor(tag, Loader.construct_decimal)
    Loader.add_implicit_resolver(FLOAT, NUMBER_LINE, list("+-.0123456789"))
    return Loader


def _size(value: object, sizes: dict[int, int]) -> int:
    """Return how many values one holds, aliases expanded; a number above every limit if it contains itself.

    Args:
        value: what YAML's loader returned.
        sizes: of the containers that were visited before, by identity.
    """
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = 2 * LARGEST_YAML  # until its size is known
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(value)]
