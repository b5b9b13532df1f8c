"""The import directions of the project: metaopt <- tasks <- experiments."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_LINES = 400

# Each unit of metaopt may import the units of lower layers and itself.
LAYERS = (
    ("validate", "_double", "_tree", "_files", "sharding"),
    ("task",),
    ("optimizers.base",),
    ("learner",),
    ("optimizers", "estimators", "augment", "imitate", "secant"),
    ("baselines",),
    ("train", "evaluate", "checkpoint", "coordinate_check", "scores"),
    ("averaging",),
    ("fewshot",),
    ("interpret",),
    ("stability", "testing"),
    ("registry",),
    ("weights",),
    ("",),  # metaopt/__init__.py
)
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}

# What the packages may not import at all, and what they may import at module level:
# importing the library must stay cheap and must not need an extra.
FORBIDDEN = {"metaopt": {"tasks", "experiments"}, "tasks": {"experiments"}}
CORE = {"jax", "optax", "haiku", "chex", "numpy", "safetensors", "metaopt"}
HEAVY = {"tensorflow_datasets", "orbax", "sklearn", "matplotlib", "flax", "tensorflow"}
HAIKU = ("metaopt.optimizers", "metaopt.fewshot", "tasks")


def unit_of(module: str) -> str | None:
    """Returns the unit of LAYERS that `module` belongs to, None if there is none."""
    name = module.removeprefix("metaopt").removeprefix(".")
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    return name if name or module == "metaopt" else None


def module_name(root: pathlib.Path, path: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, modules: set[str]):
    """Yields `(line, module, at module level)` of every import of a file."""
    inside = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazy or _is_type_checking(node):
            inside.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, top
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in modules else base, top


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def complaint(importer: str, module: str, top: bool) -> str | None:
    """Returns why `importer` may not import `module`, None if it may."""
    package, target = importer.partition(".")[0], module.partition(".")[0]
    if module.startswith("."):
        return "a relative import"
    if target in FORBIDDEN.get(package, ()):
        return f"{package} never imports {target}"
    if target == "haiku" and not importer.startswith(HAIKU):
        return "haiku is kept to networks"
    if target in HEAVY and top:
        return "to be imported inside the function that needs it"
    if package == "metaopt" and top and target not in CORE | sys.stdlib_module_names:
        return "not a core dependency"
    if package == target == "metaopt":
        mine, other = unit_of(importer), unit_of(module)
        if other is None:
            return "a unit without a place in LAYERS"
        if mine is not None and mine != other and RANK[mine] <= RANK[other]:
            return f"{mine or 'metaopt'} is not above {other or 'metaopt'}"
    return None


def violations(root: pathlib.Path) -> list[str]:
    """Returns every breach below `root`, as `file:line imports x: reason`."""
    packages = ("metaopt", "tasks", "experiments")
    paths = sorted(p for name in packages for p in (root / name).rglob("*.py"))
    names = {path: module_name(root, path) for path in paths}
    modules = set(names.values())
    found = []
    for path, importer in names.items():
        text, where = path.read_text(), path.relative_to(root)
        if (length := text.count("\n")) > MAX_LINES:
            found.append(f"{where}:{length} is longer than {MAX_LINES} lines")
        if importer.startswith("metaopt") and unit_of(importer) is None:
            found.append(f"{where}:1 has no place in LAYERS")
        for line, module, top in imports(ast.parse(text), modules):
            if reason := complaint(importer, module, top):
                found.append(f"{where}:{line} imports {module}: {reason}")
    return found


def test_no_import_goes_up():
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_a_bad_tree_is_caught(tmp_path):
    files = {
        "metaopt/__init__.py": "from metaopt.train import meta_train\n",
        "metaopt/task.py": "import haiku\nfrom metaopt import learner\n",
        "metaopt/learner.py": "from .task import Task\nimport metaopt\n",
        "metaopt/train.py": "def f():\n    import orbax\n    import tasks.data\n",
        "metaopt/evaluate.py": "try:\n    import rich\nexcept ImportError: pass\n",
        "metaopt/optimizers/__init__.py": "from metaopt.optimizers.base import X\n",
        "metaopt/optimizers/base.py": "import haiku\nimport metaopt.estimators.pes\n",
        "metaopt/estimators/pes.py": "from metaopt.optimizers import base\n",
        "metaopt/estimators/es.py": "from metaopt.optimizers import Hyper\n",
        "metaopt/helpers.py": "\n" * (MAX_LINES + 1),
        "tasks/data.py": "import tensorflow_datasets as tfds\n",
        "tasks/mlp.py": "import haiku\nfrom experiments.run import main\n",
        "experiments/run.py": "import rich\nfrom tasks import data\nimport metaopt\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert {line.partition(": ")[0] for line in violations(tmp_path)} == {
        "metaopt/task.py:1 imports haiku",
        "metaopt/task.py:2 imports metaopt.learner",
        "metaopt/learner.py:1 imports .task",
        "metaopt/learner.py:2 imports metaopt",
        "metaopt/train.py:3 imports tasks.data",
        "metaopt/evaluate.py:2 imports rich",
        "metaopt/optimizers/base.py:2 imports metaopt.estimators.pes",
        "metaopt/estimators/es.py:1 imports metaopt.optimizers",
        f"metaopt/helpers.py:{MAX_LINES + 1} is longer than {MAX_LINES} lines",
        "metaopt/helpers.py:1 has no place in LAYERS",
        "tasks/data.py:1 imports tensorflow_datasets",
        "tasks/mlp.py:2 imports experiments.run",
    }
