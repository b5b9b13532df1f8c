"""SmallFC: a tiny per-parameter network on factored second-moment features."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers import features
from metaopt.optimizers.base import LearnedOptimizer


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
            "network": features.init_network(key, (inputs, *self.widths, 2)),
        }

    def init(self, theta, params, *, num_steps=None, key=None):
        del theta, num_steps, key
        k = len(self.decays)
        leaves, treedef = jax.tree.flatten(params)
        shapes = [jnp.shape(p) for p in leaves]
        factored = [
            features.init_factored(s, k)
            if len(s) >= 2
            else (jnp.zeros((k, *s)), None)
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
        treedef = jax.tree.structure(params)
        columns = (grads, params, state.momenta, state.square, state.row, state.col)
        leaves = zip(*(treedef.flatten_up_to(c) for c in columns), strict=True)
        results = [self._update_leaf(theta, state.step, *leaf) for leaf in leaves]
        updates, *state_leaves = zip(*results, strict=True) if results else [()] * 5
        new_state = (treedef.unflatten(x) for x in state_leaves)
        return treedef.unflatten(updates), SmallFCState(state.step + 1, *new_state)

    def _update_leaf(self, theta, step, g, p, m, v, row, col):
        if p.size == 0:
            return p, m, v, row, col
        dtype, shape = p.dtype, p.shape
        g, p = g.astype(jnp.float32), p.astype(jnp.float32)
        offsets = theta["decays"]
        decays = features.learned_decays(self.decays, offsets["momentum"])
        fdecays = jnp.clip(
            features.learned_decays(self.decays, offsets["factored"]), 0, 1
        )
        vdecay = jnp.clip(
            features.learned_decays((self.square_decay,), offsets["square"]), 0, 1
        )
        m = features.average(m, g, decays)
        v = features.average(v[None], g * g, vdecay)[0]
        gg = g * g + 1e-30
        if g.ndim < 2:
            row = features.average(row, gg, fdecays)
            inv = jax.lax.rsqrt(v + 1e-6)
            fac_g = g * jax.lax.rsqrt(jnp.maximum(row + 1e-9, 1e-9))
            ir = jax.lax.rsqrt(row + 1e-8)
            x = jnp.concatenate(
                [
                    g[None],
                    p[None],
                    m,
                    v[None],
                    m * inv,
                    inv[None],
                    fac_g,
                    row,
                    row,
                    ir,
                    ir,
                    m * jax.lax.rsqrt(row + 1e-6),
                ]
            )
            x = x.reshape(len(x), -1)
            update = features.update_from_features(self, theta["network"], [x], step)
        else:
            row, col = features.average_factored(row, col, gg, fdecays)
            r, c = features.row_and_col_factors(row, col, shape)
            d1, d0 = features.factored_axes(shape)
            rr, cc = jnp.expand_dims(row, 1 + d0), jnp.expand_dims(col, 1 + d1)
            rc = jnp.expand_dims(r, 1 + d0) * jnp.expand_dims(c, 1 + d1)
            inv = jax.lax.rsqrt(v + 1e-6)
            groups = [
                jnp.concatenate(
                    [g[None], p[None], m, v[None], m * inv, inv[None], g * rc]
                ),
                rr,
                cc,
                jax.lax.rsqrt(rr + 1e-8),
                jax.lax.rsqrt(cc + 1e-8),
                m * rc,
            ]
            update = features.update_from_features(self, theta["network"], groups, step)
        return update.reshape(shape).astype(dtype), m, v, row, col
