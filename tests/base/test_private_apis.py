"""Private names of other packages: each exists with the parameters that Umbra relies on, and only one module uses it."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel, Trainer

import umbra
from umbra.base import private, private_bitsandbytes, private_torch, private_transformers
from umbra.base.private import PrivateName

SOURCE = Path(umbra.__file__).parent
NAMES = {str(name): name for name in (*private_transformers.NAMES, *private_torch.NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_exists_with_its_parameters(name):
    assert NAMES[name].problem() is None


def test_bitsandbytes_has_its_private_names():
    pytest.importorskip("bitsandbytes")
    private_bitsandbytes.check()


def test_activations_save_their_inputs_for_the_backward():
    x = torch.zeros(1, requires_grad=True)
    assert private_torch.saved_input(torch.nn.functional.silu(x).grad_fn) is not None
    assert private_torch.saved_approximation(torch.nn.functional.gelu(x).grad_fn) == "none"


def test_a_missing_name_is_an_error_that_names_it():
    with pytest.raises(ImportError, match=r"torch\.nn\.Module\._gone does not exist.* Install torch>=2\.11\."):
        private.check("torch", ">=2.11", [PrivateName("torch.nn:Module", "_gone")])


def test_changed_parameters_are_an_error_that_names_them():
    changed = PrivateName("torch.nn:Module", "get_parameter", ("name",))
    with pytest.raises(ImportError, match=r"get_parameter takes \(target\), not \(name\)"):
        private.check("torch", ">=2.11", [changed])


def test_the_supported_versions_are_those_of_the_project():
    project = (SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for package, module in (
        ("torch", private_torch), ("transformers", private_transformers), ("bitsandbytes", private_bitsandbytes)
    ):  # fmt: skip
        assert f'"{package}{module.SUPPORTED}"' in project


def test_every_private_call_through_super_is_listed():
    """An override of a private method calls the original by ``super()``: without an entry, its end would go unnoticed."""
    listed, foreign = {name.name for name in NAMES.values()}, (GenerationMixin, PreTrainedModel, Trainer)
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                through_super = "super()" in ast.unparse(node.value)
                is_foreign = any(hasattr(kind, node.attr) for kind in foreign)
                assert not (through_super and is_foreign) or node.attr in listed, f"{path.name}: {node.attr}"
