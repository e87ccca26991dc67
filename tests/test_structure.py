"""The structure of the code: public names, the direction of imports, and limits of each room."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import umbra
from support.fast import SLOW

SOURCE = Path(umbra.__file__).parent
MODULES = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in SOURCE.rglob("*.py")
}

TESTS = {
    path.relative_to(Path(__file__).parent).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in Path(__file__).parent.rglob("*.py")
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
    """Return the output of a fresh Python process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# -- public names --------------------------------------------------------------------------------------------------


def test_public_names_are_stable():
    assert umbra.__all__ == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_public_name_is_importable(name):
    value = getattr(umbra, name)
    assert value.__name__ == name
    assert value.__module__.startswith("umbra.")
    assert name in dir(umbra)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="shadow_of_a_doubt"):
        _ = umbra.shadow_of_a_doubt


def test_lazy_table_matches_typing_imports():
    """`_ROOMS` and the imports under TYPE_CHECKING have the same names from the same rooms."""
    typed = {name: module.removesuffix("/__init__").replace("/", ".") for module, name in imports("__init__")}
    assert typed == umbra._ROOMS


def test_importing_umbra_is_light_and_fast():
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
def test_help_imports_no_torch(room):
    assert run(f"import sys, umbra.{room}; print('torch' in sys.modules)") == "False"


# -- imports -------------------------------------------------------------------------------------------------------


def module_of(dotted: str) -> str | None:
    """Return the key in `MODULES` of ``umbra.a.b``, or None if it is not a module."""
    path = dotted.removeprefix("umbra").lstrip(".").replace(".", "/")
    candidates = [path, f"{path}/__init__" if path else "__init__"]
    return next((name for name in candidates if name in MODULES), None)


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each import within the package, including those in functions and for type checkers."""
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


def test_every_module_is_in_a_room():
    assert sorted(ROOMS) == sorted({module.partition("/")[0] for module in MODULES} - {"__init__", "__main__"})
    assert len([module for module in MODULES if "/" not in module]) <= 4


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__", "__main__"}))
def test_rooms_import_downward(module):
    room = module.partition("/")[0]
    for target, _ in imports(module):
        other = target.partition("/")[0]
        if target == "__init__":  # the version
            continue
        assert ROOMS.index(other) <= ROOMS.index(room), f"{module} imports {target}, of a room above its own"


def test_no_import_circle():
    graph = {module: {target for target, _ in imports(module) if target != "__init__"} for module in MODULES}
    graph["__init__"] = set()
    circles = [circle for circle in strongly_connected(graph) if len(circle) > 1]
    assert circles == []


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other."""
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
def test_public_definitions_have_docstrings(room):
    tree = MODULES[room]
    assert ast.get_docstring(tree), f"{room}.py has no docstring"
    assert [node.name for node in own_definitions(tree) if not ast.get_docstring(node)] == []


def foreign_lookups(tree: ast.Module) -> list[str]:
    """Return the calls of getattr and hasattr on anything but ``self``."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and getattr(node.args[0], "id", None) != "self"
    ]


@pytest.mark.parametrize("room", [room for room in MODULES if not room.startswith("base/architectures/")])
def test_only_architectures_look_up_attributes(room):
    found = foreign_lookups(MODULES[room])
    assert len(found) <= 3, "\n".join(found)


@pytest.mark.parametrize("room", MODULES)
def test_nothing_is_unpickled_or_evaluated(room):
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


# -- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", TESTS)
def test_no_test_module_imports_another(module):
    imported = set()
    for node in ast.walk(TESTS[module]):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    forbidden = {
        part for name in imported for part in name.split(".") if part.startswith("test_") or part == "conftest"
    }
    assert not forbidden, f"move what {module} imports into tests/support"


@pytest.mark.parametrize("module", TESTS)
def test_names_of_tests_are_short(module):
    names = [node.name for node in ast.walk(TESTS[module]) if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name.startswith("test_") and len(name) >= 70] == []


def test_fast_tier_lists_existing_tests():
    for module, slow in SLOW.items():
        assert module in TESTS, f"tests/support/fast.py lists {module}"
        assert slow <= {node.name for node in ast.walk(TESTS[module]) if isinstance(node, ast.FunctionDef)}


def test_test_modules_are_in_rooms():
    at_top = {"conftest", "test_config", "test_demo", "test_docs", "test_examples", "test_structure"}
    assert {module.partition("/")[0] for module in TESTS} - at_top <= {*ROOMS, "support"}
    names = [module.rpartition("/")[2] for module in TESTS if "/test_" in module]
    assert len(names) == len(set(names)), "two test modules have the same name"


# -- limits --------------------------------------------------------------------------------------------------------

# Names that say where a value came from, or that the field calls otherwise (see the glossary).
BANNED = {
    "told", "found", "mine", "theirs", "kept", "own", "sure", "quicken", "sparing", "wake", "rest", "lane", "seam", "anatomy",
}  # fmt: skip

# At most so many in the whole package.
LIMITS = {"Any": 120, "self: Any": 0, "ignore": 25, "broad": 8, "banned": 0, "long": 0}


def count(module: str) -> Counter[str]:
    """Count banned names, long functions, broad excepts, `Any` and ``type: ignore`` in a module."""
    counts: Counter[str] = Counter()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            counts["long"] += lines > 60 and not module.startswith("method/kernels/triton_kernels")
        if isinstance(node, ast.ExceptHandler):
            caught = [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else ["BaseException"]
            counts["broad"] += bool({"Exception", "BaseException"} & set(caught))
        counts["banned"] += names(node).strip("_") in BANNED
    source = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
    for what, pattern in (
        ("Any", r": Any\b"),
        ("self: Any", r"\bself: Any\b"),
        ("ignore", r"#.*\b(?:type|pyright): ignore"),
    ):
        counts[what] += len(re.findall(pattern, source))
    return counts


def names(node: ast.AST) -> str:
    """Return the identifier that a node introduces or reads, or an empty string."""
    for field in ("id", "arg", "attr", "name"):
        if isinstance(value := getattr(node, field, None), str):
            return value
    return ""


@pytest.mark.parametrize("what", LIMITS)
def test_package_is_within_its_limits(what):
    counts = {module: count(module)[what] for module in MODULES}
    assert sum(counts.values()) <= LIMITS[what], {module: n for module, n in counts.items() if n}
