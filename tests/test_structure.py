"""The shape of the code: its public names, which way imports flow, and what each room may know."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import umbra

SOURCE = Path(umbra.__file__).parent
MODULES = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in SOURCE.rglob("*.py")
}
# A room is a module, or a package of modules.
ROOMS = sorted({module.partition("/")[0] for module in MODULES} - {"__init__", "__main__"})

# From the ground up: a room imports only from rooms above it in this list.
ORDER = [
    "errors",
    "options",
    "config",
    "settings",
    "terminal",
    "hub",
    "kernels",
    "core",
    "folder",
    "locks",
    "manifest",
    "dense",
    "shards",
    "anatomy",
    "added_tokens",
    "channels",
    "caches",
    "hooks",
    "decoding",
    "bases",
    "fingerprint",
    "pretrained",
    "backbone",
    "integrity",
    "adapters",
    "forward",
    "paths",
    "speculation",
    "drafting",
    "losses",
    "data",
    "prompting",
    "card",
    "model",
    "detach",
    "checkpoint",
    "interop",
    "inspect",
    "resuming",
    "trainers",
    "runs",
    "warm_start",
    "train",
    "divergence",
    "teacher",
    "pretrain",
    "scoring",
    "generate",
    "export",
    "lm_eval",
    "bench",
    "evaluate",
    "cli",
]
# What a model does for its user's convenience, looked up only when it is called.
LAZY_UPWARD = {
    ("adapters", "checkpoint"),
    ("checkpoint", "interop"),
    ("model", "checkpoint"),
    ("model", "detach"),
}

PUBLIC_NAMES = {
    "BaseModelError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DetachError",
    "ExportError",
    "ShadowConfig",
    "ShadowModel",
    "ShadowTrainer",
    "StateError",
    "UmbraError",
    "attach",
    "load",
    "with_shadow_loss",
}


def run(code: str) -> str:
    """What a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# -- public names --------------------------------------------------------------------------------------------------


def test_the_public_names_are_these():
    assert umbra.__all__ == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_a_public_name_can_be_imported_and_comes_from_where_it_says(name):
    value = getattr(umbra, name)
    assert value.__name__ == name
    assert value.__module__.startswith("umbra.")
    assert name in dir(umbra)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="shadow_of_a_doubt"):
        _ = umbra.shadow_of_a_doubt


def test_the_lazy_table_and_the_typing_imports_agree():
    """`_ROOMS` is for Python, the block under TYPE_CHECKING for its readers: the same names from the same rooms."""
    typed = {alias.name: room for room, names, _ in imports("__init__", typing=True) for alias in names}
    assert typed == umbra._ROOMS


def test_importing_umbra_imports_nothing_heavy_and_is_quick():
    code = """
import sys, time
start = time.perf_counter()
import umbra
print(time.perf_counter() - start, *[m for m in ("torch", "transformers", "numpy", "safetensors") if m in sys.modules])
"""
    seconds, *heavy = run(code).split()
    assert heavy == []
    assert float(seconds) < 1


@pytest.mark.parametrize("room", ["errors", "config", "options", "cli"])
def test_what_help_needs_imports_no_torch(room):
    assert run(f"import sys, umbra.{room}; print('torch' in sys.modules)") == "False"


# -- imports -------------------------------------------------------------------------------------------------------


def imports(module: str, typing: bool = False) -> list[tuple[str, list[ast.alias], bool]]:
    """(room, names, at the top level) of each import within the package; of those under TYPE_CHECKING if ``typing``."""
    found = []
    up = module.count("/") + 1  # dots that lead out of the module's own room

    def visit(node: ast.AST, top: bool, for_typing: bool) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            for child in node.body:
                visit(child, top, True)
            return
        if isinstance(node, ast.Import):
            assert not any(a.name.partition(".")[0] == "umbra" for a in node.names), f"{module}: import relatively"
        if isinstance(node, ast.ImportFrom) and for_typing is typing:
            assert (node.module or "").partition(".")[0] != "umbra" or node.level, f"{module}: import relatively"
            if node.level == up:
                rooms = [node.module.partition(".")[0]] if node.module else [a.name for a in node.names]
                found.extend((room, node.names, top) for room in rooms if room in ROOMS)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), for_typing)

    visit(MODULES[module], True, False)
    return found


def test_every_room_has_its_place():
    assert sorted(ORDER) == ROOMS


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__", "__main__"}))
def test_imports_flow_downward(module):
    room = module.partition("/")[0]
    for target, _, at_top in imports(module):
        if not at_top and (room, target) in LAZY_UPWARD:
            continue
        assert ORDER.index(target) < ORDER.index(room), f"{room} imports {target}, which lies above it"


def test_the_exceptions_are_in_use():
    used = {(room, target) for room in MODULES for target, _, at_top in imports(room) if not at_top}
    assert used >= LAZY_UPWARD


# -- habits --------------------------------------------------------------------------------------------------------


def own_definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


@pytest.mark.parametrize("room", MODULES)
def test_a_public_module_class_or_function_has_a_docstring(room):
    tree = MODULES[room]
    assert ast.get_docstring(tree), f"{room}.py has no docstring"
    assert [node.name for node in own_definitions(tree) if not ast.get_docstring(node)] == []


def foreign_lookups(tree: ast.Module) -> list[str]:
    """Calls of getattr and hasattr on anything but ``self``."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and getattr(node.args[0], "id", None) != "self"
    ]


@pytest.mark.parametrize("room", [room for room in MODULES if room.partition("/")[0] != "anatomy"])
def test_only_anatomy_guesses_at_attributes(room):
    found = foreign_lookups(MODULES[room])
    assert len(found) <= 3, "\n".join(found)


@pytest.mark.parametrize("room", MODULES)
def test_nothing_is_unpickled_and_nothing_is_evaluated(room):
    for node in ast.walk(MODULES[room]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {name.partition(".")[0] for name in names} & {
                "pickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
            }
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec", "np.load", "numpy.load"), called
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code" or ast.unparse(node.value) == "False"
