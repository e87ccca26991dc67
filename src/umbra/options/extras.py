"""The packages of Umbra's extras, and the command that installs them.

Umbra is on no registry yet. An error about a missing package therefore names the packages themselves, as listed in this
installation's metadata: the command works for a checkout and for a wheel.
"""

from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "umbra-peft"


def packages(extra: str) -> list[str]:
    """Return the requirements of an extra, sorted by name; none if Umbra is imported without being installed."""
    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    parts = [requirement.partition(";") for requirement in listed]
    return sorted(name.strip() for name, _, marker in parts if f"extra == '{extra}'" in marker.replace('"', "'"))


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra.

    Args:
        extra: the extra's name, as in pyproject.toml.

    Returns:
        ``pip install`` with the extra's requirements; with the checkout's extra if this installation has no metadata.
    """
    named = packages(extra)
    return (
        f"pip install {' '.join(map(repr, named))}" if named else f"pip install -e '.[{extra}]' in a checkout of Umbra"
    )
