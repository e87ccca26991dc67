"""The shape of the code: its public names, which way imports flow, and what each room may know."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import umbra

SOURCE = Path(umbra.__file__).parent
MODULES = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in SOURCE.rglob("*.py")
}

# From the ground up: a room imports only from itself and from rooms above it in this list.
ROOMS = [
    "errors",
    "config",
    "options",
    "files",
    "base",
    "method",
    "data",
    "shadow",
    "generation",
    "adapters",
    "model",
    "deploy",
    "training",
    "evaluation",
    "lab",
    "cli",
]
# TEMPORARY: circles that are being taken apart.
UPWARD = {
    ("adapters/checkpoint", "model/shadow_model"),
    ("adapters/card", "model/shadow_model"),
    ("adapters/interop/__init__", "model/shadow_model"),
    ("model/shadow_model", "deploy/detach"),
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
    typed = {name: module.replace("/", ".") for module, name in imports("__init__")}
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


def module_of(dotted: str) -> str | None:
    """The module that ``umbra.a.b`` names, as a key of `MODULES`; None where it is no module."""
    path = dotted.removeprefix("umbra").lstrip(".").replace(".", "/")
    candidates = [path, f"{path}/__init__" if path else "__init__"]
    return next((name for name in candidates if name in MODULES), None)


def imports(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import within the package, those in functions and for type checkers included."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.partition(".")[0] != "umbra", f"{module}: import names from umbra"
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: import absolutely"
            if (node.module or "").partition(".")[0] == "umbra":
                for alias in node.names:
                    target = module_of(f"{node.module}.{alias.name}") or module_of(str(node.module))
                    assert target is not None, f"{module} imports {node.module}, which is not there"
                    yield target, alias.name


def test_every_module_lies_in_a_room():
    assert sorted(ROOMS) == sorted({module.partition("/")[0] for module in MODULES} - {"__init__", "__main__"})
    assert len([module for module in MODULES if "/" not in module]) <= 4


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__", "__main__"}))
def test_rooms_import_downward(module):
    room = module.partition("/")[0]
    for target, _ in imports(module):
        other = target.partition("/")[0]
        if target == "__init__" or (module, target) in UPWARD:  # the version
            continue
        assert ROOMS.index(other) <= ROOMS.index(room), f"{module} imports {target}, of a room above its own"


def test_no_import_circle():
    graph = {module: {target for target, _ in imports(module) if target != "__init__"} for module in MODULES}
    graph["__init__"] = set()
    circles = [circle for circle in strongly_connected(graph) if len(circle) > 1]
    assert circles == [] or UPWARD, circles


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other."""
    sorter, reach = {}, {}
    for start in graph:
        seen, queue = set(), list(graph[start])
        while queue:
            if (node := queue.pop()) not in seen:
                seen.add(node)
                queue.extend(graph[node])
        reach[start] = seen
    for node, others in reach.items():
        sorter.setdefault(frozenset({node} | {other for other in others if node in reach[other]}), None)
    return [sorted(group) for group in sorter]


def test_only_cli_imports_lab():
    for module in MODULES:
        if module.partition("/")[0] not in ("lab", "cli"):
            assert [target for target, _ in imports(module) if target.startswith("lab/")] == [], module


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


@pytest.mark.parametrize("room", [room for room in MODULES if not room.startswith("base/architectures/")])
def test_only_architectures_guess_at_attributes(room):
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


# -- limits: what is left to mend counts down, and nothing is added ------------------------------------------------

BANNED = {
    "told",
    "found",
    "mine",
    "theirs",
    "kept",
    "own",
    "sure",
    "quicken",
    "sparing",
    "wake",
    "rest",
    "lane",
    "seam",
}


def longest_functions(limit: int) -> list[str]:
    return [
        f"{module}: {node.name}, {node.end_lineno - node.lineno + 1} lines"
        for module, tree in MODULES.items()
        if module != "method/kernels/triton_kernels"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > limit
    ]
