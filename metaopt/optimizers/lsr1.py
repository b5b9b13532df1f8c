"""LSR1: an implicit preconditioner of a few learned vectors, linear in memory."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers import curvature, features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.curvature import Memory
from metaopt.optimizers.network import init_network
from metaopt.optimizers.small_fc import SmallFC, SmallFCState
from metaopt.optimizers.tokens import (
    SECANT_INPUTS,
    ravel,
    secant_inputs,
    split,
    token_features,
)

_LOG_RANGE = 10.0


class LSR1State(NamedTuple):
    """What `LSR1` remembers of the `n` coordinates of all tensors.

    Attributes:
        averages: step count and averages, as of `SmallFC`.
        vectors: the last vectors of the preconditioner, `[buffer, n]`.
        memory: of the last step.
        penalty: distance from the secant equation at the last update, `[]`.
    """

    averages: SmallFCState
    vectors: jax.Array
    memory: Memory
    penalty: jax.Array


@dataclasses.dataclass(frozen=True)
class LSR1(LearnedOptimizer):
    """Gradient descent behind `I + sum of v v^T` with learned vectors `v`.

    A reconstruction of the structure of L-SR1; features, normalisation and sizes are
    ours. One MLP encodes every coordinate by itself, two more read its code: one gives
    the coordinate's entry of a vector, shrunk to a root mean square below 1, the other
    the log of its step size. The vector replaces the oldest of the buffer, and

        P = I + rank_scale / n * sum_i v_i v_i^T
        update = -step_size * exp(m) * (P d)

    with the descent direction `d` of root mean square 1 and the output `m` per
    coordinate. `P` is positive definite and never formed: time and memory are linear in
    the number of coordinates. Coordinates meet in `P d` and in means only, so the
    weights serve any dimension. With outputs of zero it is normalised gradient descent.

    A coordinate is in use once it had a gradient other than 0; all others stay as they
    are and count in no mean, as for `Optimus`.

    Meta-train it with `metaopt.secant.SecantPenalty` to pull `P` towards the inverse
    Hessian.

    Attributes:
        buffer: number of vectors.
        width: hidden units of each of the three networks.
        rank_scale: largest eigenvalue that one vector adds to `P`.
        direction: "gradient", or "momentum" for its first average.
        step_size: root mean square of an update where `P` is the identity and `m` 0, in
            parameter units.
        head_scale: how far from zero the layer that gives vectors starts.
        decays: start of the decay rates of the averages, as of `SmallFC`.
        square_decay: the same of the full average of the squared gradient.

    References:
        L-SR1, 2025, https://arxiv.org/abs/2508.12270

    >>> import jax
    >>> theta = LSR1().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    1705
    """

    buffer: int = 8
    width: int = 16
    rank_scale: float = 10.0
    direction: str = "gradient"
    step_size: float = 1e-2
    head_scale: float = 0.1
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    square_decay: float = 0.999

    def __post_init__(self):
        validate.integer("buffer", self.buffer)
        validate.integer("width", self.width)
        validate.number("rank_scale", self.rank_scale, low=0.0)
        validate.one_of("direction", self.direction, ("gradient", "momentum"))
        validate.number("step_size", self.step_size, low=0.0, open_low=True)
        validate.number("head_scale", self.head_scale, low=0.0)
        if self.decays == ():
            raise ValueError("decays must hold at least one rate, got decays=().")
        SmallFC(decays=self.decays, square_decay=self.square_decay)

    def init_theta(self, key):
        inputs = 4 + 8 * len(self.decays) + SECANT_INPUTS
        inputs += len(features.TIMESCALES) + curvature.CONTEXT
        keys, head = jax.random.split(key, 4), (self.width, self.width, 1)
        theta = {
            "decays": self._averages.init_theta(keys[0])["decays"],
            "encoder": init_network(keys[1], (inputs, self.width, self.width)),
            "steps": init_network(keys[2], head),
            "vectors": init_network(keys[3], head),
        }
        for name, scale in (("steps", 0.0), ("vectors", self.head_scale)):
            theta[name]["linear_1"]["w"] *= scale
        return theta

    def init(self, theta, params, *, num_steps=None, key=None):
        n = sum(p.size for p in jax.tree.leaves(params))
        return LSR1State(
            averages=self._averages.init(theta, params),
            vectors=jnp.zeros((self.buffer, n)),
            memory=curvature.init_memory(n),
            penalty=jnp.zeros(()),
        )

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del value, extra
        count, memory = state.averages.step, state.memory
        leaves, treedef = jax.tree.flatten(params)
        tensors, averages = self._averages.accumulate(
            theta, grads, state.averages, params
        )
        if not memory.grad.size:
            zeros = [jnp.zeros(p.shape, p.dtype) for p in leaves]
            return treedef.unflatten(zeros), state._replace(averages=averages)
        grad = ravel([x.grad for x in tensors])
        active, pair = curvature.observe(memory, grad)
        product = _precondition(state.vectors, pair.change, active)
        before = curvature.secant(memory, pair, product, active)
        context, log_grad = curvature.context(memory, pair, before, grad, active)
        pairs = zip(tensors, split(active, tensors), strict=True)
        tokens = [token_features(*x) for x in pairs if x[0].grad.size]
        inputs = [jnp.concatenate(tokens, axis=1), secant_inputs(pair, before, active)]
        shared = jnp.concatenate([features.time_features(count), context])
        vector, sizes = self._networks(theta, jnp.concatenate(inputs), shared, active)
        vectors = state.vectors.at[count % self.buffer].set(vector)
        direction = grad
        if self.direction == "momentum":
            direction = ravel([x.momenta[0] for x in tensors])
        direction, _ = curvature.unit(direction, active)
        step = _precondition(vectors, direction, active)
        step = jnp.where(active, -self.step_size * sizes * step, 0.0)
        product = _precondition(vectors, pair.change, active)
        after = curvature.secant(memory, pair, product, active)
        memory = Memory(active, grad, step, log_grad, after.log_scale)
        penalty = curvature.penalty(after, active)
        steps = zip(split(step, tensors), leaves, strict=True)
        updates = treedef.unflatten([x.astype(p.dtype) for x, p in steps])
        return updates, LSR1State(averages, vectors, memory, penalty)

    def secant_penalty(self, state: LSR1State) -> jax.Array:
        """Returns how far the last `P` is from the secant equation, `[]`.

        It is `|s - P y|^2 / (|s|^2 + |P y|^2)` for the last step `s`, up to a running
        scale, and the change `y` of the gradient along it; 0 before the second update.
        See `metaopt.secant.SecantPenalty`.
        """
        return state.penalty

    @property
    def _averages(self):
        return SmallFC(decays=self.decays, square_decay=self.square_decay)

    def _networks(self, theta, inputs, shared, active):
        """Returns the new vector and the factors on the step size, both `[n]`."""
        first, second = (theta["encoder"][f"linear_{i}"] for i in range(2))
        own, common = jnp.split(first["w"], [len(inputs)])
        code = inputs.T @ own + (shared @ common + first["b"])
        code = jax.nn.relu(_linear(second, jax.nn.relu(code)))
        vector, log_size = (_head(theta[name], code) for name in ("vectors", "steps"))
        vector = curvature.bounded(jnp.where(active, vector, 0.0), active)
        log_size = jnp.clip(log_size, -_LOG_RANGE, _LOG_RANGE)
        return self.rank_scale**0.5 * vector, jnp.exp(log_size)


def _precondition(vectors: jax.Array, x: jax.Array, active: jax.Array) -> jax.Array:
    """Applies `I + sum_i v_i v_i^T / n` to `x` `[n]`."""
    count = jnp.maximum(jnp.sum(active), 1).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    along = jnp.matmul(vectors, x, precision=highest) / count
    return x + jnp.matmul(along, vectors, precision=highest)


def _linear(layer, x):
    return x @ layer["w"] + layer["b"]


def _head(layers, code):
    return _linear(layers["linear_1"], jax.nn.relu(_linear(layers["linear_0"], code)))[
        :, 0
    ]
