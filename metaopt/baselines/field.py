"""The field: every hand-designed optimizer that enters a comparison, by name."""

from typing import Any

import jax
import optax
from optax import contrib

from metaopt import validate
from metaopt.baselines.bfgs import bfgs
from metaopt.baselines.entry import Entry
from metaopt.baselines.kfac import kfac
from metaopt.baselines.saddle_free_newton import saddle_free_newton
from metaopt.baselines.safe_rate import safe_rate
from metaopt.baselines.soap import soap


def sam(learning_rate: Any, *, rho: float = 0.05, momentum: float = 0.9):
    """Returns SGD with momentum on the gradient at the worst point within `rho`.

    Sharpness-aware minimisation, Foret et al., 2020, https://arxiv.org/abs/2010.01412;
    one further gradient per step.

    >>> import jax.numpy as jnp
    >>> sam(0.1).init(jnp.ones(2)).steps_since_sync.tolist()
    0
    """
    outer = optax.sgd(learning_rate, momentum=momentum)
    ascend = optax.chain(contrib.normalize(), optax.sgd(rho))
    return contrib.sam(outer, ascend, sync_period=2, opaque_mode=True)


def sophia(learning_rate: Any, *, key: jax.Array | None = None, **options: Any):
    """Returns Sophia with Hutchinson's estimator drawn from `key`, for `obj_fn`.

    Liu et al., 2023, https://arxiv.org/abs/2305.14342. Options as in `contrib.sophia`.

    >>> import jax.numpy as jnp
    >>> sophia(1e-3).init(jnp.ones(2))[0].count.tolist()
    0
    """
    diagonal = contrib.hutchinson_estimator_diag_hessian(key)
    return contrib.sophia(learning_rate, hessian_diagonal_fn=diagonal, **options)


# Default learning rates are those of the papers or, where these give none, the usual
# ones for small networks; comparisons tune them.
BASELINES: dict[str, Entry] = {
    "adabelief": Entry(optax.adabelief, 1e-3),
    "adafactor": Entry(optax.adafactor, 1e-2),
    "adagrad": Entry(optax.adagrad, 1e-2),
    "adam": Entry(optax.adam, 1e-3),
    "adamw": Entry(optax.adamw, 1e-3),
    "ademamix": Entry(contrib.ademamix, 1e-3),
    "adopt": Entry(contrib.adopt, 1e-3),
    "bfgs": Entry(bfgs, None, needs=("value", "grad", "value_fn")),
    "kfac": Entry(kfac, 1e-1, needs=("value_fn",), random=True),
    "lamb": Entry(optax.lamb, 1e-2),
    "lbfgs": Entry(optax.lbfgs, None, needs=("value", "grad", "value_fn")),
    "lion": Entry(optax.lion, 1e-4),
    "momentum": Entry(optax.sgd, 1e-2, {"momentum": 0.9}),
    # With the root mean square of its updates at 0.2, like those of Adam, matrices and
    # the vectors that Muon leaves to Adam share one learning rate.
    "muon": Entry(contrib.muon, 1e-3, {"consistent_rms": 0.2}),
    "nadamw": Entry(optax.nadamw, 1e-3),
    "nesterov": Entry(optax.sgd, 1e-2, {"momentum": 0.9, "nesterov": True}),
    # It estimates the scale of its steps, and is meant to be left at 1: Mishchenko and
    # Defazio, 2023, https://arxiv.org/abs/2306.06101.
    "prodigy": Entry(contrib.prodigy, 1.0, rates=(0.1, 10.0)),
    "rmsprop": Entry(optax.rmsprop, 1e-3),
    # At 1 the step is that of Newton, to where the quadratic model has its minimum.
    "saddle-free-newton": Entry(
        saddle_free_newton, 1.0, needs=("value_fn",), rates=(0.1, 10.0)
    ),
    "safe-rate": Entry(safe_rate, None, needs=("value_fn",)),
    "sam": Entry(sam, 1e-2, needs=("grad_fn",)),
    # Its average takes the place of a schedule: Defazio et al., 2024,
    # https://arxiv.org/abs/2405.15682.
    "schedule-free": Entry(
        contrib.schedule_free_adamw,
        2.5e-3,
        eval_params=contrib.schedule_free_eval_params,
        schedule="constant",
    ),
    "sgd": Entry(optax.sgd, 1e-1),
    "soap": Entry(soap, 3e-3),
    "sophia": Entry(sophia, 1e-3, needs=("obj_fn",), random=True),
}


def get(name: str) -> Entry:
    """Returns the entry called `name`.

    Raises:
        ValueError: if there is none; the nearest name is suggested.
    """
    validate.one_of("baseline", name, BASELINES)
    return BASELINES[name]


def make(
    name: str, learning_rate: Any = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns the optax transformation of the baseline `name`.

    Args:
        name: a key of `BASELINES`.
        learning_rate: a float, a traced scalar or a schedule; the entry's default if
            it is None, as it must be for rules without a learning rate.
        **options: arguments of the entry's factory.

    Raises:
        ValueError: for an unknown name or option, for a learning rate of a rule that
            has none, and on `update` if an argument that the rule needs is missing.

    >>> import jax.numpy as jnp
    >>> tx = make("lbfgs")
    >>> loss_fn = lambda x: jnp.sum((x - 3.0) ** 2)
    >>> x = jnp.zeros(2)
    >>> value, grad = jax.value_and_grad(loss_fn)(x)
    >>> updates, _ = tx.update(grad, tx.init(x), x, value=value, value_fn=loss_fn)
    >>> bool(loss_fn(x + updates) < value)
    True
    """
    entry = get(name)
    if learning_rate is not None and entry.learning_rate is None:
        raise ValueError(
            f"baseline {name} has no learning rate: learning_rate must be None, got "
            f"learning_rate={learning_rate!r}."
        )
    entry.check_options(name, options)
    return entry.make(learning_rate, **options)
