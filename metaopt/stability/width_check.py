"""The coordinate check of an optimizer: do features move alike at every width?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.coordinate_check import coordinate_changes, slopes
from metaopt.stability.probe import Arrays
from metaopt.stability.problems import MoonsNet, draw_moons
from metaopt.stability.subject import Subject

PARAMETRISATIONS = ("standard", "muP")
LAYERS = ("input", "hidden", "output")
# What the coordinate check allows a slope, in Yang et al., 2022 and muLO.
FLAT = 0.1


def _init(width: int, key: jax.Array, *, mup: bool):
    """Draws a net of two hidden layers; muP draws the last weights with variance 1."""
    params = MoonsNet((width, width)).init((), key)
    if mup:
        params["layer_2"]["w"] *= jnp.sqrt(1.0 * width)
    return params


def _preactivations(params, x: jax.Array, *, mup: bool) -> dict[str, jax.Array]:
    found = {}
    for i, name in enumerate(LAYERS):
        layer = params[f"layer_{i}"]
        fan_in = layer["w"].shape[0]
        divisor = fan_in if mup and name == "output" else 1
        found[name] = x @ layer["w"] / divisor + layer["b"]
        x = jnp.tanh(found[name])
    return found


def _hidden_shrunk() -> optax.GradientTransformation:
    """Divides the update of the hidden matrix by its fan-in."""

    def shrink(updates, params=None):
        del params
        w = updates["layer_1"]["w"]
        return updates | {"layer_1": updates["layer_1"] | {"w": w / w.shape[0]}}

    return optax.stateless(shrink)


def coordinate_check(
    subject: Subject,
    widths: tuple[int, ...],
    key: jax.Array,
    *,
    num_steps: int,
    num_seeds: int,
) -> Arrays:
    """Measures how far pre-activations move at several widths, in two parametrisations.

    A tanh net of two hidden layers classifies two moons, all points at every step.
    "standard" is what the suite trains everywhere. "muP" divides the logits and the
    steps of the hidden matrix by the fan-in and draws the last weights with variance 1:
    the form for steps that are free of the size of the gradient, as those of Adam, Lion
    and most learned rules (Therien et al., 2024, https://arxiv.org/abs/2406.00153). The
    step of SGD follows the gradient, which the divided logits make smaller.

    Args:
        subject: the optimizer.
        widths: the widths to compare, at least two.
        key: randomness of data and starts.
        num_steps: steps of training.
        num_seeds: nets that are averaged.

    Returns:
        `coordinate_widths` `[w]`; `coordinate_changes`, standard deviation of the
        change after the last step, `[2, 3, w]` over `PARAMETRISATIONS` and `LAYERS`;
        and `coordinate_slopes` of its logarithm over that of the width, `[2, 3]`.
    """
    data_key, net_key = jax.random.split(key)
    points = draw_moons(data_key, count=128, noise=0.1)
    changes, rows = [], []
    for mup in (False, True):
        tx = subject.transformation(num_steps)

        def activations(params, mup=mup):
            return _preactivations(params, points.x, mup=mup)

        def loss(params, mup=mup):
            logits = activations(params, mup=mup)["output"][:, 0]
            losses = optax.losses.sigmoid_binary_cross_entropy(logits, 1.0 * points.y)
            return jnp.mean(losses)

        found = coordinate_changes(
            functools.partial(_init, mup=mup),
            activations,
            loss,
            optax.chain(tx, _hidden_shrunk()) if mup else tx,
            widths,
            net_key,
            num_steps=num_steps,
            num_seeds=num_seeds,
        )
        late = {name: found[name][:, -1:] for name in LAYERS}
        changes.append([late[name][:, 0] for name in LAYERS])
        steepness = slopes(late, widths)
        rows.append([steepness[name][0] for name in LAYERS])
    return {
        "coordinate_widths": np.asarray(widths),
        "coordinate_changes": np.asarray(changes, float),
        "coordinate_slopes": np.asarray(rows, float),
    }


def told(measured: Arrays) -> str:
    """Returns one sentence about the slopes of a `coordinate_check`."""
    parts = []
    for name, row in zip(PARAMETRISATIONS, measured["coordinate_slopes"], strict=True):
        steepest = float(row[np.argmax(np.nan_to_num(np.abs(row), nan=np.inf))])
        parts.append(f"{steepest:+.2f} ({name})")
    return (
        f"Features move with the width to the power {' and '.join(parts)}; "
        f"within {FLAT:g} of 0 they are free of it."
    )
