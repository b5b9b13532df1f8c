"""STAR: a learned step that is scaled like Adam's and added to a nominal one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.optimizers.network import scaled
from metaopt.optimizers.small_fc import SmallFC

_NOMINAL = ("gradient", "momentum", "aggmo", "adam", "adam-aggmo")


@dataclasses.dataclass(frozen=True)
class STAR(SmallFC):
    """SmallFC with a stable rule at its side and a scale on what the network adds.

    Features, averages, decay rates and their start are those of `SmallFC`. The network
    returns a direction `d` and magnitudes `m`, `n` and `r`; one step is

        p - step_size * d * exp(magnitude_scale * m) / sqrt(v + 1e-6)
          - nominal_step_size * exp(nominal_scale * n) * G
          - parameter_decay * exp(decay_scale * r) * p

    with the nominal direction `G`, such as Adam's, and the average `v` of the squared
    gradient. `v` starts at 0 and is not corrected for bias: where gradients are 0 the
    network's step is a thousand times `step_size * d`.

    `parameter_decay` shrinks the parameters. The heavy decay of the meta-parameters
    that keeps the network's part small belongs to the outer optimizer, such as
    `optax.adamw`; in `experiments` it is `Outer.weight_decay`.

    Attributes:
        nominal: the direction `G`: "gradient"; "momentum", the slowest average of the
            gradient; "aggmo", the mean of these averages; "adam" and "adam-aggmo", the
            same two with averages divided by `sqrt(v + 1e-6)`.
        normalize_blackbox: whether the network's step is divided by `sqrt(v + 1e-6)`.
        selfnormalize_blackbox: whether it is multiplied by the tensor's mean gradient.
        nominal_controller: whether the network returns `n`; it is 1 if not.
        regularization_controller: whether the network returns `r`; it is 0 if not.
        nominal_step_size: size of the nominal step, in parameter units.
        nominal_scale: how strongly `n` changes the nominal step.
        parameter_decay: share of a parameter that is taken off at each step.
        decay_scale: how strongly `r` changes that share.
        average_magnitude: whether `m` is averaged over each tensor.
        average_nominal: whether `n` is.
        average_decay: whether `r` is.

    References:
        Harrison et al., 2022, https://arxiv.org/abs/2209.11208

    >>> import jax
    >>> theta = STAR().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    202
    """

    nominal: str = "adam-aggmo"
    normalize_blackbox: bool = True
    selfnormalize_blackbox: bool = False
    nominal_controller: bool = True
    regularization_controller: bool = False
    nominal_step_size: float = 1e-3
    nominal_scale: float = 1e-3
    parameter_decay: float = 0.0
    decay_scale: float = 1e-3
    average_magnitude: bool = False
    average_nominal: bool = False
    average_decay: bool = False

    def __post_init__(self):
        super().__post_init__()
        validate.one_of("nominal", self.nominal, _NOMINAL)
        if not self.decays:
            raise ValueError("decays must hold at least one rate, got decays=().")
        for name in ("nominal_step_size", "nominal_scale", "decay_scale"):
            validate.number(name, getattr(self, name), low=0.0)
        validate.number("parameter_decay", self.parameter_decay, low=0.0, high=1.0)

    @property
    def _heads(self):
        return 2 + self.nominal_controller + self.regularization_controller

    def _step(self, outputs, g, p, m, v):
        d, magnitude, *rest = outputs
        n = rest.pop(0) if self.nominal_controller else jnp.float32(1.0)
        r = rest.pop(0) if self.regularization_controller else jnp.float32(0.0)
        magnitude = jnp.mean(magnitude) if self.average_magnitude else magnitude
        n = jnp.mean(n) if self.average_nominal else n
        r = jnp.mean(r) if self.average_decay else r
        inverse = jax.lax.rsqrt(v + 1e-6)
        step = scaled(self.step_size, d, self.magnitude_scale, magnitude)
        if self.normalize_blackbox:
            step = step * inverse
        if self.selfnormalize_blackbox:
            step = step * jnp.mean(g)
        direction = self._nominal_direction(g, m, inverse)
        step += scaled(self.nominal_step_size, direction, self.nominal_scale, n)
        return -step - scaled(self.parameter_decay, p, self.decay_scale, r)

    def _nominal_direction(self, g, m, inverse):
        if self.nominal == "gradient":
            return g
        if self.nominal in ("aggmo", "adam-aggmo"):
            # Element by element: XLA would store what jnp.mean returns.
            momentum = sum(m[1:], m[0]) / len(m)
        else:
            momentum = m[int(np.argmax(self.decays))]
        return momentum * inverse if self.nominal.startswith("adam") else momentum
