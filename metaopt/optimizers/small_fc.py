"""SmallFC: a tiny per-parameter network on factored second-moment features."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers import features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.network import init_network, network_outputs, scaled


class _Decays(NamedTuple):
    momentum: jax.Array
    factored: jax.Array
    square: jax.Array


class Tensor(NamedTuple):
    """One tensor of one update in float32, and its averages; `k` decays.

    Attributes:
        grad: gradient `[*shape]`.
        param: parameter `[*shape]`.
        momenta: averages of the gradient, `[k, *shape]`.
        square: average of the squared gradient, `[*shape]`.
        row: averages of it over the largest axis; not averaged for vectors and scalars.
        col: the same over the second largest axis; None for vectors and scalars.
    """

    grad: jax.Array
    param: jax.Array
    momenta: jax.Array
    square: jax.Array
    row: jax.Array
    col: jax.Array | None


class _Shared(NamedTuple):
    """What all tensors of one update share: the network and its first layer.

    Attributes:
        network: weights of all layers.
        weights: first layer without the time features, `[4 + 8 k, hidden]`.
        bias: first layer's bias and time features, `[hidden]`.
    """

    network: chex.ArrayTree
    weights: jax.Array
    bias: jax.Array


class SmallFCState(NamedTuple):
    """What `SmallFC` remembers; `k` is the number of decays.

    Attributes:
        step: updates made, `[]` int32.
        momenta: averages of the gradient, leaves `[k, *shape]`.
        square: average of the squared gradient, leaves `[*shape]`.
        row: averages of the squared gradient over the largest axis, leaves
            `[k, *shape without it]`; not averaged for vectors and scalars.
        col: the same over the second largest axis; None for vectors and scalars.
    """

    step: jax.Array
    momenta: chex.ArrayTree
    square: chex.ArrayTree
    row: chex.ArrayTree
    col: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class SmallFC(LearnedOptimizer):
    """A per-parameter MLP on momentum, RMS and Adafactor features, with learned decays.

    Reads 28 features divided by their root mean square over the tensor, and eleven of
    the step count. The network returns a direction `d` and a magnitude `m`, the update
    is `-step_size * d * exp(magnitude_scale * m)`. Each decay rate has a learned
    offset; `SmallFC(widths=(32, 32))` is the wider network of later papers.

    Attributes:
        widths: hidden layer sizes.
        decays: start of the decay rates of the gradient averages, and of the factored
            averages of its square.
        square_decay: start of the decay rate of the full average of its square.
        step_size: update size at `d = 1`, `m = 0`, in parameter units.
        magnitude_scale: how strongly `m` changes the update size.

    References:
        Metz et al., 2022, https://arxiv.org/abs/2203.11860

    >>> import jax
    >>> theta = SmallFC().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    197
    """

    widths: tuple[int, ...] = (4, 4)
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    square_decay: float = 0.999
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3

    def __post_init__(self):
        validate.integers("widths", self.widths)
        validate.numbers("decays", self.decays, low=0.0, high=1.0, open_high=True)
        validate.number(
            "square_decay", self.square_decay, low=0.0, high=1.0, open_high=True
        )
        validate.number("step_size", self.step_size, low=0.0, open_low=True)
        validate.number("magnitude_scale", self.magnitude_scale, low=0.0)

    def init_theta(self, key):
        k = len(self.decays)
        inputs = 4 + 8 * k + len(features.TIMESCALES)
        return {
            "decays": {
                "factored": jnp.zeros(k),
                "momentum": jnp.zeros(k),
                "square": jnp.zeros(1),
            },
            "network": init_network(key, (inputs, *self.widths, self._heads)),
        }

    def init(self, theta, params, *, num_steps=None, key=None):
        del theta, num_steps, key
        k = len(self.decays)
        leaves, treedef = jax.tree.flatten(params)
        shapes = [jnp.shape(p) for p in leaves]
        factored = [
            features.init_factored(s, k) if len(s) >= 2 else (jnp.zeros((k, *s)), None)
            for s in shapes
        ]
        return SmallFCState(
            step=jnp.int32(0),
            momenta=treedef.unflatten([jnp.zeros((k, *s)) for s in shapes]),
            square=treedef.unflatten([jnp.zeros(s) for s in shapes]),
            row=treedef.unflatten([row for row, _ in factored]),
            col=treedef.unflatten([col for _, col in factored]),
        )

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del value, extra
        tensors, new_state = self.accumulate(theta, grads, state, params)
        leaves, treedef = jax.tree.flatten(params)
        updates = self.steps(theta, tensors, state.step)
        pairs = zip(updates, leaves, strict=True)
        return treedef.unflatten([u.astype(p.dtype) for u, p in pairs]), new_state

    def accumulate(
        self,
        theta: chex.ArrayTree,
        grads: chex.ArrayTree,
        state: SmallFCState,
        params: chex.ArrayTree,
    ) -> tuple[list[Tensor], SmallFCState]:
        """Moves all averages; returns every tensor with its own, and the new state."""
        treedef = jax.tree.structure(params)
        columns = (grads, params, state.momenta, state.square, state.row, state.col)
        leaves = zip(*(treedef.flatten_up_to(c) for c in columns), strict=True)
        decays = self._decays(theta)
        tensors = [_accumulate(decays, *leaf) for leaf in leaves]
        averages = zip(*(x[2:] for x in tensors), strict=True) if tensors else [()] * 4
        new_state = (treedef.unflatten(x) for x in averages)
        return tensors, SmallFCState(state.step + 1, *new_state)

    def steps(
        self,
        theta: chex.ArrayTree,
        tensors: list[Tensor],
        step: jax.Array,
        active: list[jax.Array] | None = None,
    ) -> list[jax.Array]:
        """Applies the network.

        Args:
            theta: meta-parameters.
            tensors: what `accumulate` returned.
            step: updates made before this one, `[]` int32.
            active: per tensor `[*shape]` bool, the elements of vectors that count in
                root mean squares; all by default. In matrices all elements count, as
                they do in row and column averages.

        Returns:
            The update of every tensor, `[*shape]` float32.
        """
        shared = self._shared(theta, step)
        masks = [None] * len(tensors) if active is None else active
        pairs = zip(tensors, masks, strict=True)
        return [self._step_of(shared, *pair) for pair in pairs]

    def _decays(self, theta):
        offsets = theta["decays"]
        start = (*self.decays, *self.decays, self.square_decay)
        names = ("momentum", "factored", "square")
        offset = jnp.concatenate([offsets[name] for name in names])
        rates = features.learned_decays(start, offset)
        k = len(self.decays)
        squared = jnp.clip(rates[k:], 0.0, 1.0)
        return _Decays(rates[:k], squared[:k], squared[k])

    def _shared(self, theta, step):
        first = theta["network"]["linear_0"]
        n = len(features.TIMESCALES)
        time = jnp.dot(
            features.time_features(step), first["w"][-n:], precision="highest"
        )
        bias = time + first["b"]
        return _Shared(theta["network"], first["w"][:-n], bias)

    def _step_of(self, shared, tensor, active):
        shape = tensor.param.shape
        if tensor.param.size == 0:
            return tensor.param
        if len(shape) >= 2:
            return self._update_factored(shared, *tensor)
        g, p, m, v, row = (
            x.reshape(*x.shape[: x.ndim - len(shape)], -1)
            for x in tensor
            if x is not None
        )
        return self._update_vector(shared, g, p, m, v, row, active).reshape(shape)

    def _update_vector(self, shared, g, p, m, v, row, active):
        """Updates a vector; row and column features are the same there."""
        inverse = jax.lax.rsqrt(v + 1e-6)
        normalised = g * features.safe_rsqrt(row + 1e-9)
        parts = [g[None], p[None], m, v[None], m * inverse, inverse[None], normalised]
        parts += [row, jax.lax.rsqrt(row + 1e-8), m * jax.lax.rsqrt(row + 1e-6)]
        x = jnp.concatenate(parts)
        counts, count = jnp.ones(g.size), g.size
        if active is not None:
            counts = active.reshape(-1).astype(jnp.float32)
            count = jnp.maximum(jnp.sum(counts), 1.0)
        mean_square = jnp.dot(x * x, counts, precision="highest") / count
        w, k = shared.weights, len(self.decays)
        own, double, last = jnp.split(w, [4 + 3 * k, 4 + 7 * k])
        double = double.reshape(2, 2, k, -1).sum(axis=1).reshape(2 * k, -1)
        w = jnp.concatenate([own, double, last])
        w = w * features.inverse_rms(mean_square)[:, None]
        bias = shared.bias[:, None]
        outputs = network_outputs(shared.network, w, list(x), [bias])
        return self._step(outputs, g, p, m, v)

    def _update_factored(self, shared, g, p, m, v, row, col):
        """Updates a matrix or a tensor of higher rank."""
        k, shape = len(self.decays), g.shape
        d1, d0 = features.factored_axes(shape)
        own, rows, cols, rows_inverse, cols_inverse, last = jnp.split(
            shared.weights, [4 + 3 * k, 4 + 4 * k, 4 + 5 * k, 4 + 6 * k, 4 + 7 * k]
        )
        start = [
            _linear(jnp.concatenate([rows, rows_inverse]), row, d0),
            _linear(jnp.concatenate([cols, cols_inverse]), col, d1),
        ]
        start[0] += shared.bias.reshape((-1,) + (1,) * len(shape))
        row_factor, col_factor = features.factors(row, col, shape)
        # mean_squares cuts along the leading axis, so decays may not be there.
        momenta = list(m)
        r = list(jnp.expand_dims(row_factor, 1 + d0))
        c = list(jnp.expand_dims(col_factor, 1 + d1))
        factors = [a * b for a, b in zip(r, c, strict=True)]
        inverse = jax.lax.rsqrt(v + 1e-6)

        def squares(g, p, v, inverse, *rest):
            m, r, c = rest[:k], rest[k : 2 * k], rest[2 * k :]
            factors = [a * b for a, b in zip(r, c, strict=True)]
            x = _inputs(g, p, m, v, inverse, factors)
            return [y * y for y in x]

        arrays = (g, p, v, inverse, *momenta, *r, *c)
        mean_square = features.mean_squares(squares, *arrays)
        x = _inputs(g, p, momenta, v, inverse, factors)
        w = jnp.concatenate([own, last]) * features.inverse_rms(mean_square)[:, None]
        outputs = network_outputs(shared.network, w, x, start)
        return self._step(outputs, g, p, m, v)

    @property
    def _heads(self):
        """Number of outputs of the network."""
        return 2

    def _step(self, outputs, g, p, m, v):
        """Turns the outputs of the network into the update of one tensor."""
        del g, p, m, v
        d, magnitude = outputs
        return scaled(-self.step_size, d, self.magnitude_scale, magnitude)


def _accumulate(decays, g, p, m, v, row, col):
    if p.size == 0:
        return Tensor(p.astype(jnp.float32), p.astype(jnp.float32), m, v, row, col)
    g, p = g.astype(jnp.float32), p.astype(jnp.float32)
    m = features.average(m, g, decays.momentum)
    v = decays.square * v + (1.0 - decays.square) * (g * g)
    square = lambda g: g * g + 1e-30
    if g.ndim < 2:
        row = features.average(row, square(g), decays.factored)
    else:
        row, col = features.average_factored(row, col, g, decays.factored, of=square)
    return Tensor(g, p, m, v, row, col)


def _inputs(g, p, m, v, inverse, factors):
    """Returns the features that differ from element to element, in their order."""
    x = [g, p, *m, v, *(a * inverse for a in m), inverse]
    x += [g * f for f in factors]
    return x + [a * f for a, f in zip(m, factors, strict=True)]


def _linear(weights, accumulator, axis):
    """Applies the first layer to `x` and `1 / sqrt(x)` of a row or column average."""
    x = jnp.concatenate([accumulator, jax.lax.rsqrt(accumulator + 1e-8)])
    mean_square = jnp.mean(x * x, axis=tuple(range(1, x.ndim)))
    weights = weights * features.inverse_rms(mean_square)[:, None]
    product = jnp.tensordot(weights, x, axes=(0, 0), precision="highest")
    return jnp.expand_dims(product, 1 + axis)
