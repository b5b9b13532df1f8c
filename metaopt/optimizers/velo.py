"""VeLO: an LSTM per tensor that makes the weights of an MLP per parameter."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers import features, velo_features, velo_start
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.mixed_lstm import mixed_lstm
from metaopt.optimizers.network import init_network
from metaopt.optimizers.run_features import (
    NUM_RUN_FEATURES,
    RunState,
    init_run,
    observe,
)
from metaopt.optimizers.tensor_features import relative_sizes

_RANKS = 5


class VeLOState(NamedTuple):
    """What `VeLO` remembers of `k` tensors; those without elements do not count.

    Attributes:
        run: progress and loss of the run.
        averages: averages of the clipped gradient of all tensors.
        lstm: hidden and cell state, each `[k, width]`.
    """

    run: RunState
    averages: velo_features.Averages
    lstm: hk.LSTMState


@dataclasses.dataclass(frozen=True)
class VeLO(LearnedOptimizer):
    """A hypernetwork: an LSTM per tensor mixes a bank of MLPs that run per parameter.

    The LSTM reads 18 features of the progress and the loss of the run, one-hot how many
    axes are longer than 1, and the sizes of the tensor's gradient averages as they were
    before the current gradient, in units of the tensor's root mean square; one input
    layer also passes on the maximum over all tensors. It returns weights `c` of the
    bank and a factor `s`, which may be negative. The MLP of a tensor has the weights
    `bank_scale * mean(c * bank)`, reads 30 features of the parameter and its gradient,
    and returns a direction `d` and a magnitude `m` (and a third number that is not
    used). The update is `-step_size * s * RMS(p) * d * exp(magnitude_scale * m)`.
    Gradients are clipped elementwise to `[-1000, 1000]`.

    The rule plans over `num_steps` and goes on after them; it needs the loss.

    The default has the published sizes and 2,304,513 weights, of which 1,024 are the
    learned initial state, which starts at zero. The published code has 15,872 more, in
    an input layer without effect. For meta-training on a small machine
    `VeLO(width=32, bank_size=16)` has 13,473.

    Attributes:
        width: units of the LSTM.
        bank_size: number of MLPs in the bank.
        widths: hidden layer sizes of each MLP.
        decays: decay rates of the gradient averages, and of the factored averages of
            its square.
        square_decay: decay rate of the full average of its square.
        bank_scale: factor on the mean of the bank.
        step_size: update size relative to the parameters at `s = d = 1`, `m = 0`.
        magnitude_scale: how strongly `m` changes the update size.
        smallest: what the root mean square of parameters that are zero counts as; with
            the published one a bias that starts at zero moves so little that a network
            for regression may never use it.
        start: what meta-training starts from: "random" weights, as published, or
            "lamb", under which the rule is LAMB with Nesterov momentum, a decay of
            0.05 and a cosine schedule, times 2.7 for vectors; `step_size` is then its
            learning rate.
        horizon: in runs of more than these inner steps, steps are shorter by
            `sqrt(horizon / num_steps)`, so that those that go nowhere lead no farther
            than in a run of `horizon`; None, as published, for steps of one size.

    References:
        Metz et al., 2022, https://arxiv.org/abs/2211.09760

    >>> import jax
    >>> theta = VeLO(width=32, bank_size=16).init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    13473
    """

    needs_value: ClassVar[bool] = True
    needs_num_steps: ClassVar[bool] = True

    width: int = 512
    bank_size: int = 256
    widths: tuple[int, ...] = (4, 4)
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    square_decay: float = 0.999
    bank_scale: float = 100.0
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3
    smallest: float = velo_features.SMALLEST
    start: str = "random"
    horizon: int | None = None

    def __post_init__(self):
        validate.integer("width", self.width)
        validate.integer("bank_size", self.bank_size)
        validate.integers("widths", self.widths)
        validate.numbers("decays", self.decays, low=0.0, high=1.0, open_high=True)
        validate.number(
            "square_decay", self.square_decay, low=0.0, high=1.0, open_high=True
        )
        for name in ("bank_scale", "step_size", "smallest"):
            validate.number(name, getattr(self, name), low=0.0, open_low=True)
        validate.number("magnitude_scale", self.magnitude_scale, low=0.0)
        validate.one_of("start", self.start, ("random", "lamb"))
        if self.horizon is not None:
            validate.integer("horizon", self.horizon)
        if self.start == "lamb" and min(self.width, *self.widths) < 2:
            raise ValueError(
                'width and widths must be at least 2 where start="lamb", got '
                f"width={self.width} and widths={self.widths}."
            )

    @functools.cached_property
    def _lstm(self):
        def network(x, state):
            y, state = mixed_lstm(x, state, self.width)
            weights = hk.Linear(self.bank_size, name="weights")(y)
            return weights, hk.Linear(1, name="factor")(y)[:, 0], state

        return hk.without_apply_rng(hk.transform(network))

    def init_theta(self, key):
        lstm_key, bank_key = jax.random.split(key)
        k = len(self.decays)
        sizes = (velo_features.num_features(k), *self.widths, 3)
        keys = jax.random.split(bank_key, self.bank_size)
        start = jnp.zeros((2, self.width))
        x = jnp.zeros((1, NUM_RUN_FEATURES + _RANKS + 1 + 2 * k))
        state = hk.LSTMState(*start[:, None])
        theta = {
            "bank": jax.vmap(lambda key: init_network(key, sizes))(keys),
            "initial_lstm": start,
            "lstm": self._lstm.init(lstm_key, x, state),
        }
        return (
            velo_start.lamb(theta, k, self.bank_scale)
            if self.start == "lamb"
            else theta
        )

    def init(self, theta, params, *, num_steps=None, key=None):
        del key
        k = sum(jnp.size(p) > 0 for p in jax.tree.leaves(params))
        return VeLOState(
            run=init_run(num_steps),
            averages=velo_features.init_averages(params, len(self.decays)),
            lstm=hk.LSTMState(*(features.rows(x, k) for x in theta["initial_lstm"])),
        )

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del extra
        run_features, run = observe(state.run, value)
        leaves, treedef = jax.tree.flatten(params)
        averages = velo_features.split_averages(state.averages, params)
        full = [i for i, p in enumerate(leaves) if p.size]
        if not full:
            return params, state._replace(run=run)
        rows = [_lstm_inputs(leaves[i], averages[i], run_features) for i in full]
        weights, factors, lstm = self._lstm.apply(
            theta["lstm"], jnp.stack(rows), state.lstm
        )
        networks = self._networks(theta["bank"], weights)
        if self.horizon is not None:
            length = jnp.maximum(run.num_steps, self.horizon)
            factors = factors * jnp.sqrt(self.horizon / length)

        updates, gradients = leaves[:], treedef.flatten_up_to(grads)
        for n, i in enumerate(full):
            g = velo_features.clip_gradient(gradients[i])
            averages[i] = velo_features.update_averages(
                averages[i], g, self.decays, self.square_decay
            )
            step = velo_features.relative_step(
                jax.tree.map(lambda x, n=n: x[n], networks),
                self.step_size * factors[n],
                self.magnitude_scale,
                g,
                leaves[i].astype(jnp.float32),
                averages[i],
                self.smallest,
            )
            updates[i] = step.astype(leaves[i].dtype)
        joined = velo_features.join_averages(averages, params)
        return treedef.unflatten(updates), VeLOState(run, joined, lstm)

    def _networks(self, bank, weights):
        """Mixes the bank with `weights` `[n, bank_size]` into `n` networks."""
        weights = self.bank_scale / self.bank_size * weights
        mix = lambda x: jnp.tensordot(weights, x, axes=1, precision="highest")
        return jax.tree.map(mix, bank)


def _lstm_inputs(p, averages, run_features):
    """Returns what the LSTM reads of one tensor and of the run."""
    sizes = relative_sizes(p.astype(jnp.float32), averages.momenta, averages.square)
    rank = jax.nn.one_hot(sum(n > 1 for n in p.shape), _RANKS)
    return jnp.concatenate([run_features, sizes[:1], rank, sizes[1:]])
