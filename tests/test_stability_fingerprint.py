"""Fingerprints: what was changed is never taken for what was measured."""

import collections
import functools
import importlib
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.stability import alignment, estimator_noise, horizon, width_check
from metaopt.stability.fingerprint import fingerprint
from metaopt.stability.problems import MoonsNet
from metaopt.stability.records import digest, record_of
from metaopt.stability.subject import subject
from metaopt.stability.suite import PROBES

OPT = """
import functools
import jax, jax.numpy as jnp, numpy as np, optax
import helpers
from helpers import shifted
from metaopt import LearnedOptimizer

SIZE, RATE = 3, 0.1
WEIGHTS = np.array([1.0, 2.0])
TABLE = {"decay": 0.9}


def direction(g):
    return -1.0 * g


@jax.jit
def jitted(g):
    return 1.5 * g


@jax.custom_vjp
def ruled(g):
    return g


ruled.defvjp(lambda g: (g, None), lambda _, d: (2.5 * d,))


@functools.wraps(np.mean)
def wrapped(g):
    return named(g)


def named(g):
    return 3.5 * g


class Part:
    __slots__ = ("gain",)
    power = 1.25

    def __init__(self):
        self.gain = 4.5

    def step(self, g):
        return self.gain * g


part = functools.partial(lambda scale, g: scale * g, 5.5)
schedule = optax.cosine_decay_schedule(6.5, 10)
parts = {"one": Part()}


class Base(LearnedOptimizer):
    def inherited(self, g):
        return 7.5 * g


class Mine(Base):
    def __init__(self):
        self.field = 8.5

    def init_theta(self, key):
        return ()

    def init(self, theta, params, *, num_steps=None, key=None):
        return jnp.zeros(SIZE)

    def update(self, theta, grads, state, params, *, value=None, **extra):
        from late import turned

        def within(g, start=9.5):
            return start * direction(g)

        def step(g):
            g = sum(f(g) for f in (within, jitted, ruled, wrapped, part, turned))
            g = g + TABLE["decay"] * parts["one"].step(g) ** Part.power
            g = helpers.inner.scaled(g) + shifted(self.inherited(g)) + self.field
            return RATE * schedule(1) * g + WEIGHTS[0] + self.read

        return jax.tree.map(step, grads), state

    @property
    def read(self):
        return getattr(helpers, "by_string") + helpers.lazy


def make():
    return Mine()
"""
HELPERS = """
import inner

OFFSET = 10.5
by_string = 11.5


def shifted(g):
    return g + OFFSET


def __getattr__(name):
    if name == "lazy":
        return 12.5
    raise AttributeError(name)
"""
INNER = "def scaled(g):\n    return 13.5 * g\n"
LATE = "def turned(g):\n    return 14.5 * g\n"
FILES = {"opt": OPT, "helpers": HELPERS, "inner": INNER, "late": LATE}
CHANGES = {
    "a helper": ("opt", "-1.0 * g", "1.0 * g"),
    "a constant of init": ("opt", "SIZE, RATE = 3", "SIZE, RATE = 4"),
    "a constant of update": ("opt", "0.1\n", "5.0\n"),
    "a global array": ("opt", "[1.0, 2.0]", "[1.0, 3.0]"),
    "a global table": ("opt", "0.9", "0.8"),
    "a jitted helper": ("opt", "1.5 *", "-1.5 *"),
    "a rule of derivatives": ("opt", "2.5 *", "-2.5 *"),
    "a helper under another name": ("opt", "3.5 *", "-3.5 *"),
    "state in slots": ("opt", "4.5", "-4.5"),
    "a method of an object": ("opt", "self.gain * g", "self.gain + g"),
    "an attribute of a class": ("opt", "1.25", "2.25"),
    "an argument that is bound": ("opt", "5.5", "-5.5"),
    "a schedule": ("opt", "6.5", "-6.5"),
    "an inherited method": ("opt", "7.5", "-7.5"),
    "an attribute of the optimizer": ("opt", "8.5", "-8.5"),
    "a method of the optimizer": ("opt", "+ WEIGHTS", "- WEIGHTS"),
    "a default": ("opt", "9.5", "-9.5"),
    "a property": ("opt", ") + helpers.lazy", ") - helpers.lazy"),
    "a constant of another module": ("helpers", "10.5", "-10.5"),
    "an attribute named by a string": ("helpers", "11.5", "-11.5"),
    "an attribute made when asked for": ("helpers", "12.5", "-12.5"),
    "a function of another module": ("helpers", "g + OFFSET", "g - OFFSET"),
    "a module within a module": ("inner", "13.5", "-13.5"),
    "a late import": ("late", "14.5", "-14.5"),
}


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """Returns what imports the files anew and gives the digest of `opt.make()`."""
    monkeypatch.syspath_prepend(tmp_path)
    # Two edits within a second have the same time stamp.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def imported(files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return digest(subject(importlib.import_module("opt").make(), theta=()))

    yield imported
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_optimizer_is_another(change, digest_of):
    name, old, new = CHANGES[change]
    assert FILES[name].count(old) == 1
    before = digest_of(FILES)
    assert digest_of(FILES | {name: FILES[name].replace(old, new)}) != before
    assert digest_of(FILES) == before


def test_comments_and_lines_do_not_count(digest_of):
    moved = "# So.\n\n" + OPT.replace("(g):\n", "(g):\n    # Of the gradient.\n\n")
    assert digest_of(FILES | {"opt": moved}) == digest_of(FILES)


@pytest.mark.parametrize(
    "code, module, name",
    [
        ("S12", estimator_noise, "pes_variance"),
        ("S12", estimator_noise, "COST"),
        ("S8", width_check, "coordinate_check"),
        ("S8", MoonsNet, "loss"),
        ("S10", horizon, "watched_rollout"),
        ("S14", alignment, "_observed_run"),
    ],
)
def test_a_probe_is_another_where_its_code_is(code, module, name, monkeypatch):
    def record(code):
        return record_of("", PROBES[code](), 0)

    before, foreign = record(code), record("S13")
    monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
    assert record(code) != before and record("S13") == foreign


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Named(dict):
    pass


def closure(x):
    return lambda g: x * g


@pytest.mark.parametrize(
    "make",
    [
        closure,
        Slots,
        lambda x: jax.jit(closure(x)),
        lambda x: jax.vmap(closure(x)),
        lambda x: jax.nn.initializers.normal(x),
        lambda x: functools.partial(closure, x),
        lambda x: functools.lru_cache(closure(x)),
        lambda x: functools.wraps(np.mean)(closure(x)),
        lambda x: Slots(x).__init__,
        lambda x: type("Made", (), {"step": closure(x)}),
        lambda x: property(closure(x)),
        lambda x: np.array([x]),
        lambda x: np.array([[x], None], object),
        lambda x: np.ma.masked_greater(np.arange(3.0), x),
        lambda x: jnp.ones(2) * x,
        lambda x: jax.random.key(x),
        lambda x: np.random.default_rng(x),
        lambda x: np.zeros(2, f"f{4 * x}"),
        lambda x: jnp.asarray(1.0) if x == 1 else jnp.float32(1.0),
        lambda x: [np.zeros(1), np.zeros(x)],
        lambda x: {"a": {x}},
        lambda x: frozenset((jnp.float32, x)),
        lambda x: Named(a=x),
        lambda x: collections.deque([x]),
        lambda x: collections.defaultdict(closure(x)),
        lambda x: collections.OrderedDict(a=x),
        lambda x: collections.namedtuple("Pair", "a b")(x, 2),
        lambda x: bool(x - 1),
        lambda x: pathlib.Path(str(x)),
        lambda x: slice(x),
    ],
)
def test_values_count(make):
    assert fingerprint(make(1)) == fingerprint(make(1)) != fingerprint(make(2))


def test_what_cannot_be_read_is_never_the_same():
    lock = threading.Lock()
    assert fingerprint([lock]) != fingerprint([lock])


def test_a_cached_property_is_not_part_of_an_object():
    class Squared:
        def __init__(self, x):
            self.x = x

        @functools.cached_property
        def square(self):
            return self.x**2

    number = Squared(3)
    before = fingerprint(number)
    assert number.square == 9 and fingerprint(number) == before


TWICE = """
import jax, optax
from metaopt.weights import load_with_info
from metaopt.stability.records import digest, record_of
from metaopt.stability.subject import subject
from metaopt.stability.suite import PROBES
import opt

WORDS = {"a", "bc", "def", "ghij"}
scale = jax.jit(lambda g: 2.0 * g)

def closed(rate):
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -rate * scale(g) * len(WORDS), grads), state
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 50)
rule, theta, _ = load_with_info("digits-small-fc")
found = {
    "adamw": subject(optax.adamw(schedule)),
    "injected": subject(optax.inject_hyperparams(optax.adam)(learning_rate=schedule)),
    "chain": subject(optax.chain(optax.clip_by_global_norm(1.0), closed(0.1))),
    "planned": subject(lambda n: optax.sgd(optax.linear_schedule(0.1, 0.0, n))),
    "bundled": subject(rule, theta=theta),
    "own": subject(opt.make(), theta=()),
}
for name, one in found.items():
    print(name, digest(one))
for code, probe in PROBES.items():
    print(code, record_of("", probe(), 0))
"""


def test_the_same_is_known_again_in_another_process(tmp_path):
    for name, text in (FILES | {"run": TWICE}).items():
        (tmp_path / f"{name}.py").write_text(text)

    def told(seed):
        root = pathlib.Path(__file__).parent.parent
        paths = os.pathsep.join(map(str, (tmp_path, root)))
        result = subprocess.run(
            [sys.executable, "-c", "import run"],
            env=os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.splitlines()

    # The first compiles what the second reads.
    first = told("1")
    assert first == told("2") and len(first) == 6 + len(PROBES)
