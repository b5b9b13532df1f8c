"""Celo and CeloAdam: an update rule whose step size a learned scheduler sets."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.optimizers import velo_features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.network import init_network
from metaopt.optimizers.scheduler import Scheduler, SchedulerState


class CeloState(NamedTuple):
    """What `Celo` remembers.

    Attributes:
        scheduler: state of the scheduler.
        averages: averages of the clipped gradient of all tensors.
    """

    scheduler: SchedulerState
    averages: velo_features.Averages


@dataclasses.dataclass(frozen=True)
class Celo(LearnedOptimizer):
    """A per-parameter MLP, and an LSTM that schedules its step size.

    The MLP reads the 30 features of `VeLO` and returns a direction `d` and a magnitude
    `m` (and a third number that is not used). The update is `-step_size * c * RMS(p) *
    d * exp(magnitude_scale * m)` with the factor `c` of the scheduler, one for all
    tensors. Gradients are clipped elementwise to `[-1000, 1000]`. The scheduler plans
    over `num_steps`, goes on after them, and needs the loss.

    Meta-training has two phases on one theta. With `schedule="constant"`, where `c` is
    1, the network is trained; then with "learned" the scheduler. `frozen` names what
    rests, for the outer optimizer:

        first = Celo(schedule="constant")
        theta = first.init_theta(key)
        tx = optax.transforms.selective_transform(
            optax.adamw(3e-4), freeze_mask=first.frozen(theta)
        )

    and the same for `Celo()` from the theta so reached. Evolution strategies perturb
    frozen weights like all others, as in the published code.

    The default has 35,808 weights: 159 of the network, 35,649 of the scheduler. The
    published code has 1,281 more, in layers without effect.

    Attributes:
        schedule: "learned", or "constant" for a factor of 1.
        width: units of the scheduler's LSTM.
        widths: hidden layer sizes of the MLP.
        decays: decay rates of the gradient averages, and of the factored averages of
            its square.
        square_decay: decay rate of the full average of its square.
        step_size: update size relative to the parameters at `c = d = 1`, `m = 0`.
        magnitude_scale: how strongly `m` changes the update size.

    References:
        Moudgil et al., 2025, https://arxiv.org/abs/2501.12670

    >>> import jax
    >>> theta = Celo().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    35808
    """

    needs_value: ClassVar[bool] = True
    needs_num_steps: ClassVar[bool] = True

    schedule: str = "learned"
    width: int = 64
    widths: tuple[int, ...] = (4, 4)
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    square_decay: float = 0.999
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3

    def __post_init__(self):
        validate.one_of("schedule", self.schedule, ("learned", "constant"))
        validate.integer("width", self.width)
        validate.integers("widths", self.widths)
        validate.numbers("decays", self.decays, low=0.0, high=1.0, open_high=True)
        validate.number(
            "square_decay", self.square_decay, low=0.0, high=1.0, open_high=True
        )
        validate.number("step_size", self.step_size, low=0.0, open_low=True)
        validate.number("magnitude_scale", self.magnitude_scale, low=0.0)

    @functools.cached_property
    def _scheduler(self):
        return Scheduler(self.width)

    def init_theta(self, key):
        network_key, scheduler_key = jax.random.split(key)
        inputs = velo_features.num_features(len(self.decays))
        return {
            "network": init_network(network_key, (inputs, *self.widths, 3)),
            "scheduler": self._scheduler.init_theta(scheduler_key),
        }

    def frozen(self, theta: chex.ArrayTree) -> chex.ArrayTree:
        """Returns bools like `theta`, true for weights that rest in this phase.

        These are the scheduler's if `schedule` is "constant", else the network's.

        >>> rule = Celo()
        >>> mask = rule.frozen(jax.eval_shape(rule.init_theta, jax.random.key(0)))
        >>> mask["network"]["linear_0"], mask["scheduler"]["initial_lstm"]
        ({'b': True, 'w': True}, False)
        """
        resting = "scheduler" if self.schedule == "constant" else "network"
        return {
            part: jax.tree.map(lambda x, part=part: part == resting, weights)
            for part, weights in theta.items()
        }

    def init(self, theta, params, *, num_steps=None, key=None):
        del key
        return CeloState(
            scheduler=self._scheduler.init(theta["scheduler"], num_steps),
            averages=velo_features.init_averages(params, len(self.decays)),
        )

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del extra
        factor, scheduler = jnp.float32(1.0), state.scheduler
        if self.schedule == "learned":
            factor, scheduler = self._scheduler.update(
                theta["scheduler"], scheduler, value
            )
        leaves, treedef = jax.tree.flatten(params)
        averages = velo_features.split_averages(state.averages, params)
        updates, gradients = leaves[:], treedef.flatten_up_to(grads)
        for i, p in enumerate(leaves):
            if p.size == 0:
                continue
            g = velo_features.clip_gradient(gradients[i])
            averages[i] = velo_features.update_averages(
                averages[i], g, self.decays, self.square_decay
            )
            step = velo_features.relative_step(
                theta["network"],
                self.step_size * factor,
                self.magnitude_scale,
                g,
                p.astype(jnp.float32),
                averages[i],
            )
            updates[i] = step.astype(p.dtype)
        joined = velo_features.join_averages(averages, params)
        return treedef.unflatten(updates), CeloState(scheduler, joined)


class CeloAdamState(NamedTuple):
    """What `CeloAdam` remembers.

    Attributes:
        scheduler: state of the scheduler.
        adam: state of Adam.
    """

    scheduler: SchedulerState
    adam: optax.ScaleByAdamState


@dataclasses.dataclass(frozen=True)
class CeloAdam(LearnedOptimizer):
    """Adam whose learning rate is `step_size` times the factor of `Celo`'s scheduler.

    Gradients are clipped elementwise to `[-1000, 1000]`, and 1e-10 is added to the
    second moment before its root. The default has 35,649 weights.

    Attributes:
        width: units of the scheduler's LSTM.
        step_size: learning rate at a factor of 1.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        epsilon: is added to the root of the second moment.

    References:
        Moudgil et al., 2025, https://arxiv.org/abs/2501.12670

    >>> import jax
    >>> theta = CeloAdam().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    35649
    """

    needs_value: ClassVar[bool] = True
    needs_num_steps: ClassVar[bool] = True

    width: int = 64
    step_size: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self):
        validate.integer("width", self.width)
        validate.number("step_size", self.step_size, low=0.0, open_low=True)
        for name in ("beta1", "beta2"):
            validate.number(
                name, getattr(self, name), low=0.0, high=1.0, open_high=True
            )
        validate.number("epsilon", self.epsilon, low=0.0)

    @functools.cached_property
    def _scheduler(self):
        return Scheduler(self.width)

    @functools.cached_property
    def _adam(self):
        return optax.scale_by_adam(self.beta1, self.beta2, self.epsilon, 1e-10)

    def init_theta(self, key):
        return self._scheduler.init_theta(key)

    def init(self, theta, params, *, num_steps=None, key=None):
        del key
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p)), params)
        return CeloAdamState(
            self._scheduler.init(theta, num_steps), self._adam.init(zeros)
        )

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del extra
        factor, scheduler = self._scheduler.update(theta, state.scheduler, value)
        grads = jax.tree.map(velo_features.clip_gradient, grads)
        steps, adam = self._adam.update(grads, state.adam)
        size = self.step_size * factor
        updates = jax.tree.map(lambda u, p: (-size * u).astype(p.dtype), steps, params)
        return updates, CeloAdamState(scheduler, adam)
