"""Fingerprint of what runs: code and values, with all that they reach."""

import contextvars
import copyreg
import functools
import hashlib
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from metaopt.stability.reads import name_in_library, reads

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_CODE = (
    *("co_code", "co_exceptiontable", "co_names", "co_varnames", "co_freevars"),
    *("co_cellvars", "co_flags", "co_argcount", "co_posonlyargcount"),
    *("co_kwonlyargcount", "co_consts"),
)
# Of classes and wrappers: what is not read when they run, and where they stand.
_SILENT = frozenset(
    (
        *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__"),
        *("__annotate__", "__annotate_func__", "__annotations_cache__"),
        *("__dataclass_fields__", "__firstlineno__", "__static_attributes__"),
        *("__slotnames__", "_abc_impl", "_jit_info"),
    )
)


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of what an object does: its code and the values it holds.

    Functions count with their bytecode, closures and defaults, and with the globals
    and the attributes of modules that they name; classes with all their attributes;
    objects with their class and state. What is reached that way counts as well. It is
    the code that runs which counts, not the file, which may have changed since. Equal
    code and values have the same fingerprint in every process of one Python version;
    an object whose state cannot be read has another one each time.

    Not seen are files and variables of the environment that are read while it runs,
    modules that are loaded later, and names that are put together from strings.

    >>> rate = 0.1
    >>> step = lambda g: -rate * g
    >>> before = fingerprint(step)
    >>> before == fingerprint(step)
    True
    >>> rate = 0.2
    >>> before == fingerprint(step)
    False
    """
    found = _Found()
    sha = hashlib.sha256(found.written(value).encode())
    for one in found:
        parts = (type(one), *_parts(one))
        sha.update(f"{found.written(parts)}\n".encode())
    return sha.hexdigest()


class _Found:
    """What was reached, numbered in the order in which it was found.

    It holds on to all of it: the `id` of an object that is gone is given to others.
    """

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def __iter__(self) -> Iterator[Any]:
        # It grows while it is read.
        return iter(self._objects)

    def refer(self, value: Any) -> str:
        """Returns the number of an object, a new one if it was not found before."""
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return f"#{number}"

    def written(self, value: Any) -> str:
        """Returns the text of a value that cannot change, the number of any other.

        Which of the values that cannot change are one object depends on the compiler.
        """
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if type(value) is tuple:
            return f"({', '.join(map(self.written, value))})"
        if type(value) is frozenset:
            return f"set {self.written(tuple(_in_order(value)))}"
        if isinstance(value, types.CodeType):
            return self.written(tuple(getattr(value, name) for name in _CODE))
        return name_in_library(value) or self.refer(value)


def _parts(value: Any) -> Iterable[Any]:
    """Returns what an object is made of."""
    kind = type(value)
    if kind is dict or kind is types.MappingProxyType:
        return [x for item in value.items() for x in item]
    if kind is list:
        return value
    if kind is set:
        return _in_order(value)
    if kind is np.ndarray or isinstance(value, np.generic | jax.Array):
        return _parts_of_array(value)
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    if isinstance(value, type):
        own = {k: v for k, v in vars(value).items() if k not in _SILENT}
        return [value.__qualname__, value.__bases__, *_items(own)]
    if isinstance(value, types.ModuleType):
        own = {k: v for k, v in vars(value).items() if not k.startswith("__")}
        return [value.__name__, *_items(own)]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, contextvars.ContextVar):
        return _parts_of_variable(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    return _parts_of_object(value)


def _in_order(found: Iterable[Any]) -> list[Any]:
    """Sorts a set, whose order differs between processes, as addresses do."""
    return sorted(found, key=lambda x: re.sub(r" at 0x\w+", "", repr(x)))


def _parts_of_variable(variable: contextvars.ContextVar) -> list[Any]:
    try:
        return [variable.name, variable.get()]
    except LookupError:  # it has no value
        return [variable.name]


def _items(found: Mapping[str, Any]) -> list[Any]:
    return [x for name in sorted(found) for x in (name, found[name])]


def _parts_of_array(value: Any) -> list[Any]:
    kind = str(value.dtype), bool(getattr(value, "weak_type", False))
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    if array.dtype.hasobject:
        return [kind, array.shape, array.tolist()]
    return [kind, array.shape, hashlib.sha256(array.tobytes()).digest()]


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    held = [function.__defaults__, function.__kwdefaults__, vars(function)]
    return [function.__code__, *held, *reads(function)]


def _parts_of_object(value: Any) -> list[Any]:
    kind = type(value)
    held = getattr(value, "__dict__", {})
    state = {k: v for k, v in held.items() if k not in _SILENT}
    if name_in_library(kind) and "__wrapped__" in state:
        return _items(state)
    reduced = _reduced(value)
    if reduced is None:
        return [os.urandom(16)]
    if name_in_library(kind):
        return reduced
    for base in kind.__mro__:
        if not name_in_library(base):
            for name, attribute in vars(base).items():
                if isinstance(attribute, functools.cached_property):
                    state.pop(name, None)  # follows from the rest
                if isinstance(attribute, types.MemberDescriptorType):
                    state[name] = getattr(value, name, None)
    return [*_items(state), *reduced[:2], *reduced[3:]]


def _reduced(value: Any) -> list[Any] | None:
    """Returns what pickle would keep of an object; None if it has no way to."""
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        reduced = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception:  # whatever the method of somebody else raises
        return None
    if isinstance(reduced, str):
        # The name is all there is of a compiled function.
        compiled = isinstance(value, types.BuiltinFunctionType)
        return None if compiled else [reduced]
    made, arguments, state, *rest = (*reduced, None, None, None)[:5]
    return [made, arguments, state, *(tuple(x or ()) for x in rest)]
