"""What a function can read beside its arguments, and what libraries are."""

import dis
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

# They count with name and version and are not read; the standard library counts with
# its names. Anything else is read, since its author may be the one who changes it.
_LIBRARIES = (
    *("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "chex"),
    *("haiku", "flax", "equinox"),
)
_STANDARD = os.path.dirname(os.__file__) + os.sep
# The bit of `__flags__` of classes that were made while Python ran.
_MADE_LATER = 1 << 9


def name_in_library(value: Any) -> str | None:
    """Returns name and version of what a library has under its name, None of others.

    >>> import math
    >>> name_in_library(math.sin)
    'math .sin'
    >>> name_in_library(lambda x: math.sin(x)) is None
    True
    """
    if isinstance(value, types.ModuleType):
        return _versioned(value.__name__) if _is_library(vars(value)) else None
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        return None
    if module == "builtins" and isinstance(value, type):
        # It lacks some of its own, such as the type of functions.
        return None if value.__flags__ & _MADE_LATER else f"builtins.{name}"
    found: Any = sys.modules.get(module)
    if not (isinstance(found, types.ModuleType) and _is_library(vars(found))):
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{_versioned(module)}.{name}" if found is value else None


def reads(function: types.FunctionType) -> list[Any]:
    """Returns names and values of what a function can read.

    That is its closure, and unless a library wrote it the globals, the attributes of
    modules and the imports that its code names, also that of functions within it. Names
    count wherever they stand, so it is rather too much than too little.
    """
    code, known = function.__code__, function.__globals__
    names, held = _names(code), {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # an empty cell
            continue
    found = _named(held, names | held.keys(), set())
    if not _is_library(known):
        found += _named(known, names, set())
        found += _named(_imported(code, known), names, set())
    return found


def _is_library(namespace: Mapping[str, Any]) -> bool:
    """Whether the globals of a module are those of a library."""
    root = str(namespace.get("__name__")).partition(".")[0]
    if root in _LIBRARIES:
        return True
    if not isinstance(file := namespace.get("__file__"), str):
        return root in sys.stdlib_module_names
    return file.startswith(_STANDARD) and "-packages" not in file


def _versioned(module: str) -> str:
    root = sys.modules.get(module.partition(".")[0])
    return f"{module} {getattr(root, '__version__', '')}"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields a code and those of the functions and classes in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    """Returns all names of globals, attributes and imports, and strings like them."""
    return {
        name
        for inner in _codes(code)
        for name in (*inner.co_names, *inner.co_consts)
        if isinstance(name, str)
    }


def _named(known: Mapping[str, Any], names: set[str], passed: set[str]) -> list[Any]:
    """Returns those of `known` with one of the names, and of modules the same."""
    found: list[Any] = []
    for name in sorted(known.keys() & names):
        value = known[name]
        found.append(name)
        if not isinstance(value, types.ModuleType) or _is_library(vars(value)):
            found.append(value)
        elif value.__name__ not in passed:
            passed.add(value.__name__)
            found.append(value.__name__)
            found += _named(vars(value) | _lazy(value, names), names, passed)
    return found


def _lazy(module: types.ModuleType, names: set[str]) -> dict[str, Any]:
    """Returns the attributes that a module makes when they are asked for."""
    found = {}
    if "__getattr__" in vars(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old names
            for name in names - vars(module).keys():
                try:
                    found[name] = getattr(module, name)
                except Exception:  # whatever the function of somebody else raises
                    continue
    return found


def _imported(
    code: types.CodeType, known: Mapping[str, Any]
) -> dict[str, types.ModuleType]:
    """Returns the modules that a function imports when it runs, if they are loaded."""
    found = {}
    for inner in _codes(code):
        if dis.opmap["IMPORT_NAME"] not in inner.co_code[::2]:
            continue
        steps = [x for x in dis.get_instructions(inner) if x.opname != "EXTENDED_ARG"]
        for level, step in zip(steps, steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                dots = "." * int(level.argval)
                package = str(known.get("__package__") or "")
                try:
                    name = importlib.util.resolve_name(dots + step.argval, package)
                except ImportError:  # which it raises when it runs, too
                    continue
                if name in sys.modules:
                    found[step.argval] = sys.modules[name]
    return found
