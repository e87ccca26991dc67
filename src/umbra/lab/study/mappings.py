"""Check mappings of a YAML file against dataclasses."""

from typing import Any

from umbra.errors import ConfigError, shown, unknown_key
from umbra.options import check_types, names


def check_mapping(kind: type, values: object, where: str) -> dict[str, Any]:
    """Return a mapping whose keys are fields of a dataclass and whose values have the types of these fields.

    Args:
        kind: The dataclass.
        values: The mapping to check.
        where: Its place in the file, for error messages.

    Raises:
        ConfigError: ``values`` is no mapping, or has an unknown key or a value of another type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of names to values, got {shown(values)}.")
    for key in values:
        if key not in names(kind):
            raise unknown_key(str(key), names(kind), where)
    try:
        check_types(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return values


def name_list(value: object, where: str) -> list[str]:
    """Return one task name or a list of them as a list.

    Raises:
        ConfigError: ``value`` is neither.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(name, str | int) for name in value):
        raise ConfigError(f"{where} must be a list of tasks, got {shown(value)}.")
    return [str(name) for name in value]
