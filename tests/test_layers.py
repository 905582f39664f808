"""Who imports whom in the package: from a layer to the ones below it, at the top of a file, without
a circle; and nobody reaches for another module's or class's underscore.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import fastgpt

PACKAGE = Path(fastgpt.__file__).parent
# From below. A module belongs to the longest name that it begins with.
LAYERS = [
    (
        "config",
        "quantized_weight",
        "tokenizer",
        "atomic_files",
        "torch_state",
        "batch_invariance",
        "reference",
        "_version",
        "_distribution",
    ),
    ("cpu", "triton"),
    ("dispatch",),
    ("ops",),
    ("weights",),
    ("model.fusable", "model.cache"),
    ("model",),
    ("bench",),
    ("training",),
    ("cli", "__main__"),
    ("",),  # the package's own names
]
# Imported where they are used, because they import what not everybody has installed.
OPTIONAL = {
    "fastgpt.bench.charts",
    "fastgpt.bench.page",
    "fastgpt.training.checkpoint",
    "fastgpt.training.parallel",
    "fastgpt.training.run_setup",
    "fastgpt.training.trainer",
}
# What is private to a package may be used all through it.
OWN = {"cpu": {"_C"}, "fastgpt": {"_C"}}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports(tree):
    """(module of ours, whether at the top of the file) of each import but the type checker's."""
    todo = [(node, True) for node in tree.body]
    while todo:
        node, top = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found = whole if whole in MODULES else node.module
                if found in MODULES:
                    yield found, top
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            todo += [(child, top and not inside) for child in ast.iter_child_nodes(node)]


def layer_of(module):
    name = module.removeprefix("fastgpt").removeprefix(".")
    found = [
        (len(prefix), level)
        for level, layer in enumerate(LAYERS)
        for prefix in layer
        if not prefix or name == prefix or name.startswith(f"{prefix}.")
    ]
    return max(found)[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_lead_downwards_and_stand_at_the_top(module):
    for found, top in imports(MODULES[module]):
        if found == module:
            continue
        assert top or found in OPTIONAL, f"{module} imports {found} inside a function"
        if found != "fastgpt" or module.startswith(("fastgpt.bench", "fastgpt.cli")):
            continue
        raise AssertionError(f"{module} imports the whole package")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_layer_knows_one_above_it(module):
    for found, _ in imports(MODULES[module]):
        if found != "fastgpt":
            assert layer_of(found) <= layer_of(module), f"{module} imports {found}"


def test_no_circle():
    known = defaultdict(set)
    for module, tree in MODULES.items():
        known[module] = {found for found, _ in imports(tree) if found not in (module, "fastgpt")}
    state = {}

    def visit(module, path):
        assert state.get(module) != "open", f"a circle: {' -> '.join([*path, module])}"
        if module not in state:
            state[module] = "open"
            for found in known[module]:
                visit(found, [*path, module])
            state[module] = "done"

    for module in MODULES:
        visit(module, [])


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(tree):
    """What a module defines itself: names, attributes of self and cls, keys of its classes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


ALL_OWN = {module: {n for n in own_names(tree) if private(n)} for module, tree in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nobody_uses_another_modules_underscore(module):
    tree = MODULES[module]
    elsewhere = set().union(*(names for other, names in ALL_OWN.items() if other != module))
    allowed = OWN.get(module.split(".")[1] if "." in module else module, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                if private(alias.name) and f"{node.module}.{alias.name}" not in MODULES:
                    assert alias.name in allowed, f"{module} imports {node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if ast.unparse(node).startswith("torch."):
                continue
            ours = node.attr in elsewhere and node.attr not in ALL_OWN[module]
            assert not ours or node.attr in allowed, f"{module}:{node.lineno} uses .{node.attr}"
