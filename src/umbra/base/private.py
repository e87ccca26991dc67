"""Guards for private names of other packages.

A private name may change in any release without notice, and an override that a package no longer calls has no effect.
Umbra lists each one that it uses in the module of its package (`private_transformers`, `private_torch`,
`private_bitsandbytes`) and checks the list before it relies on it.
"""

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """A private name of another package.

    Args:
        owner: the class or module that has it, as ``package.module:Class`` or ``package.module``.
        name: the name.
        parameters: of a function, in order and without ``self``; None where they do not matter.
        on_instance: whether only instances have it: `check` then looks for it in the source text of the owner's module.
    """

    owner: str
    name: str
    parameters: tuple[str, ...] | None = None
    on_instance: bool = False

    def __str__(self) -> str:
        return f"{self.owner.replace(':', '.')}.{self.name}"

    def problem(self) -> str | None:
        """Return what differs from the version that Umbra was written for, or None."""
        module_name, _, class_name = self.owner.partition(":")
        owner: Any = importlib.import_module(module_name)
        owner = vars(owner).get(class_name) or getattr(owner, class_name) if class_name else owner
        if self.on_instance:
            module = sys.modules[owner.__module__]
            return None if self.name in inspect.getsource(module) else f"{self} does not exist"
        if not hasattr(owner, self.name):
            return f"{self} does not exist"
        if self.parameters is None:
            return None
        parameters = tuple(n for n in inspect.signature(getattr(owner, self.name)).parameters if n != "self")
        if parameters == self.parameters:
            return None
        return f"{self} takes ({', '.join(parameters)}), not ({', '.join(self.parameters)})"


def check(package: str, supported: str, names: Iterable[PrivateName]) -> None:
    """Check that private names exist and take the expected parameters.

    Args:
        package: the distribution that has them.
        supported: its versions that Umbra supports.
        names: those to check.

    Raises:
        ImportError: it names each one that is missing or differs.
    """
    problems = list(_problems(names))
    if problems:
        raise ImportError(
            f"{package} {version(package)} differs from what Umbra needs: {'; '.join(problems)}. Install {package}{supported}."
        )


def _problems(names: Iterable[PrivateName]) -> Iterator[str]:
    for name in names:
        if (problem := name.problem()) is not None:
            yield problem
