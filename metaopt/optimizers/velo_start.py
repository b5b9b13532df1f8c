"""A VeLO that is LAMB with a cosine schedule before its first meta-gradient."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from metaopt.optimizers.run_features import FRACTIONS, NUM_RUN_FEATURES

# Units of the LSTM: one follows the schedule, one tells vectors from matrices.
_SCHEDULE, _VECTORS = 0, 1
# Small, so that the two hyperbolic tangents behind it are nearly linear.
_HEIGHT = 0.5
# What opens a gate, and with a minus closes it; haiku adds 1 to the forget gate.
_OPEN, _SHUT = 4.0, -5.0
# Output gate of a matrix, and what a vector adds to it: 0.27 against 0.73.
_MATRIX, _VECTOR = -1.0, 2.0
# Part of the gradient in the direction, as in Nesterov momentum.
_GRADIENT = 0.3
# Part of the parameters in it. Steps of a size relative to theirs let them grow without
# end, by half its square per step where they go nowhere; this takes back more.
_DECAY = 0.05
# Without it all networks of the bank would be, and stay, alike.
_SPREAD = 0.01


def lamb(theta: dict[str, Any], k: int, bank_scale: float) -> dict[str, Any]:
    """Returns theta of `VeLO` with which it is LAMB with a cosine.

    The direction is the average gradient of the first decay over the root of the
    average square, divided by its root mean square, plus 0.3 of the gradient in the
    same way and 0.05 of the parameter over its root mean square. The factor on it
    follows a cosine from 1 to nearly 0 at the end of the run, times 2.7 for tensors
    with at most one axis longer than 1. The other units of the LSTM keep their
    weights, but nothing reads them yet.

    Args:
        theta: as `VeLO.init_theta` draws it, with at least two units in every layer.
        k: number of decays.
        bank_scale: that of the rule.

    References:
        You et al., 2020, https://arxiv.org/abs/1904.00962
    """
    return theta | {
        "bank": _directions(theta["bank"], k, bank_scale),
        "lstm": _schedule(theta["lstm"]),
    }


def _directions(bank, k, bank_scale):
    """Lets every network return a sum of three of its inputs as the direction."""
    parts = {2: _DECAY, 4 + k: 1.0, 5 + 3 * k: _GRADIENT}
    last = len(bank) - 1
    layers = {}
    for i in range(len(bank)):
        w = _SPREAD * bank[f"linear_{i}"]["w"]
        # Two units carry a number and its negative through the rectifiers.
        if i == 0:
            for feature, part in parts.items():
                w = w.at[:, feature, :2].add(part * jnp.array([1.0, -1.0]))
        elif i == last:
            w = w.at[:, :2, 0].add(jnp.array([1.0, -1.0]))
        else:
            w = w.at[:, :2, :2].add(jnp.eye(2))
        layers[f"linear_{i}"] = {"w": w / bank_scale, "b": bank[f"linear_{i}"]["b"]}
    return layers


def _schedule(lstm):
    """Lets one unit follow a cosine, and the factor follow that unit alone."""
    edges = [0.0, *(0.5 * (a + b) for a, b in itertools.pairwise(FRACTIONS)), 1.0]
    # The cosine falls by so much around each fraction, where a tanh goes from -1 to 1.
    falls = -0.5 * jnp.diff(jnp.cos(jnp.pi * jnp.minimum(jnp.array(edges), 1.0)))
    ranks = slice(NUM_RUN_FEATURES + 1, NUM_RUN_FEATURES + 3)
    own, units = lstm["to_one"], jnp.array([_SCHEDULE, _VECTORS])
    w = own["w"].at[:, units].set(0.0).at[ranks, _VECTORS].set(1.0)
    w = w.at[: len(FRACTIONS), _SCHEDULE].set(-0.5 * _HEIGHT * falls)
    b = own["b"].at[units].set(0.5 * _HEIGHT * jnp.array([jnp.sum(falls), 0.0]))

    # Below 0 and rectified, nothing of other tensors comes in.
    shared = jax.tree.map(lambda x: x.at[..., units].set(0.0), lstm["to_all"])
    shared["b"] = shared["b"].at[units].set(-1.0)

    gates = lstm["lstm/linear"]
    unit = jnp.arange(4) * (gates["b"].size // 4) + _SCHEDULE
    inward, outward = gates["w"].at[:, unit].set(0.0), (_SCHEDULE, _VECTORS)
    inward = inward.at[outward, unit[jnp.array([1, 3])]].set(jnp.array([1.0, _VECTOR]))
    start = gates["b"].at[unit].set(jnp.array([_OPEN, 0.0, _SHUT, _MATRIX]))

    factor, weights = (
        jax.tree.map(jnp.zeros_like, lstm[x]) for x in ("factor", "weights")
    )
    largest = jax.nn.sigmoid(_MATRIX) * jnp.tanh(jnp.tanh(_HEIGHT))
    factor["w"] = factor["w"].at[_SCHEDULE].set(1.0 / largest)
    weights["b"] = jnp.ones_like(weights["b"])
    return lstm | {
        "to_one": {"w": w, "b": b},
        "to_all": shared,
        "lstm/linear": {"w": inward, "b": start},
        "factor": factor,
        "weights": weights,
    }
