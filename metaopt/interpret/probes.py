"""Probes: what can be read from the stream of a transformer, layer by layer."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import validate


@dataclasses.dataclass(frozen=True)
class Probe:
    """Reads a vector from a stream whose position it does not know.

    The stream is averaged over the positions, with learned weights that sum to 1, then
    mapped to the target: linearly, or by a GELU network of two layers on a linear
    projection. Appendix D of Akyurek et al., 2023, https://arxiv.org/abs/2211.15661;
    the published code reads the last token alone.

    Attributes:
        hidden: units of the projection and of the network; None for a linear probe.
        steps: Adam steps.
        batch_size: prompts per step.
        learning_rate: of Adam; it falls to zero along a cosine.

    >>> Probe(hidden=None).steps
    2000
    """

    hidden: int | None = 512
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self):
        if self.hidden is not None:
            validate.integer("hidden", self.hidden)
        validate.integer("steps", self.steps)
        validate.integer("batch_size", self.batch_size)
        rate = self.learning_rate
        validate.number("learning_rate", rate, low=0.0, open_low=True)

    def init(self, stream: jax.Array, outputs: int, key: jax.Array) -> chex.ArrayTree:
        """Draws parameters for streams like `stream`, `[positions, width]`."""
        positions, width = stream.shape
        sizes = [width, outputs]
        if self.hidden is not None:
            sizes = [width, self.hidden, self.hidden, outputs]
        keys = jax.random.split(key, len(sizes) - 1)
        layers = [
            {"w": jax.random.normal(k, (n, m)) / n**0.5, "b": jnp.zeros(m)}
            for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]
        return {"scores": jnp.zeros(positions), "layers": layers}

    def attention(self, params: chex.ArrayTree, seen: jax.Array) -> jax.Array:
        """Returns the weights of the positions, `[positions]`, zero where not seen."""
        return jax.nn.softmax(jnp.where(seen, params["scores"], -jnp.inf))

    def apply(
        self, params: chex.ArrayTree, stream: jax.Array, seen: jax.Array
    ) -> jax.Array:
        """Reads the target, `[..., outputs]`, from `[..., positions, width]`."""
        mean = jnp.einsum("p,...pw->...w", self.attention(params, seen), stream)
        first, *rest = params["layers"]
        value = mean @ first["w"] + first["b"]
        for i, layer in enumerate(rest):
            value = jax.nn.gelu(value) if i else value
            value = value @ layer["w"] + layer["b"]
        return value


class ProbeResult(NamedTuple):
    """How well every target can be read from every layer.

    Attributes:
        error: mean squared error on prompts that the probe was not trained on,
            `[layers, targets]`.
        unexplained: the same over the variance of the target, `[layers, targets]`; 1
            for a probe that knows nothing.
        attention: weights of the positions, `[layers, targets, positions]`.
    """

    error: np.ndarray
    unexplained: np.ndarray
    attention: np.ndarray


def probe_layers(
    streams: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    probe: Probe = Probe(),
    seen: jax.Array | None = None,
    held_out: float = 0.25,
) -> ProbeResult:
    """Trains one probe per layer and target, all at once, and tests them.

    Streams and targets are standardised with the mean and variance of the training
    prompts, which changes no error that is reported.

    Args:
        streams: of many prompts, `[prompts, layers, positions, width]`, such as
            `Activations.residual`.
        targets: what to read, `[prompts, targets, outputs]`.
        key: randomness of the parameters and of the batches.
        probe: what is trained.
        seen: positions that the probe of a target may look at, `[targets, positions]`
            bool; all by default.
        held_out: share of the prompts, the last ones, that is kept for the test.

    Raises:
        ValueError: if the shapes do not belong together, or too few prompts are left.

    >>> key = jax.random.key(0)
    >>> streams = jax.random.normal(key, (400, 1, 2, 3))
    >>> there, not_there = streams[:, 0, 1, :1], jax.random.normal(key, (400, 1))
    >>> targets = jnp.stack([there, not_there], axis=1)
    >>> linear = Probe(hidden=None, steps=300, learning_rate=0.03)
    >>> result = probe_layers(streams, targets, key, probe=linear)
    >>> (result.unexplained < 0.1).tolist()
    [[True, False]]
    """
    streams, targets = jnp.asarray(streams), jnp.asarray(targets)
    _check(streams, targets, seen, held_out)
    count, _, positions, _ = streams.shape
    train = count - round(held_out * count)
    if seen is None:
        seen = jnp.ones((targets.shape[1], positions), bool)
    fitted = _fit_all(probe, streams[:train], targets[:train], jnp.asarray(seen), key)
    error, attention = _test_all(
        probe, fitted, streams[train:], targets[train:], jnp.asarray(seen)
    )
    variance = jnp.mean(jnp.var(targets[train:], axis=0), axis=-1)
    unexplained = error / jnp.maximum(variance, 1e-30)
    return ProbeResult(*(np.asarray(x) for x in (error, unexplained, attention)))


def _check(streams, targets, seen, held_out) -> None:
    if streams.ndim != 4 or targets.ndim != 3 or len(streams) != len(targets):
        raise ValueError(
            "streams must be [prompts, layers, positions, width] and targets [prompts, "
            f"targets, outputs], got {streams.shape} and {targets.shape}."
        )
    wanted = targets.shape[1], streams.shape[2]
    if seen is not None and jnp.shape(seen) != wanted:
        raise ValueError(
            f"seen must be [targets, positions] = {wanted}, got {jnp.shape(seen)}."
        )
    validate.number(
        "held_out", held_out, low=0.0, high=1.0, open_low=True, open_high=True
    )
    if not 1 < round(held_out * len(streams)) < len(streams) - 1:
        raise ValueError(
            "streams must hold at least two prompts for each side, got "
            f"{len(streams)} and held_out={held_out}."
        )


class _Fitted(NamedTuple):
    """Parameters `[layers, targets, ...]` and what standardises both sides."""

    params: chex.ArrayTree
    mean: jax.Array
    std: jax.Array
    target_mean: jax.Array
    target_std: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _fit_all(probe: Probe, streams, targets, seen, key) -> _Fitted:
    mean, std = _moments(streams, (0, 2))
    target_mean, target_std = _moments(targets, (0, 2))
    x = jnp.moveaxis((streams - mean) / std, 1, 0)
    y = jnp.moveaxis((targets - target_mean) / target_std, 1, 0)
    tx = optax.adam(optax.cosine_decay_schedule(probe.learning_rate, probe.steps))
    init_key, batch_key = jax.random.split(key)

    def fit(x, y, seen):
        def step(carry, key):
            params, state = carry
            index = jax.random.randint(key, (probe.batch_size,), 0, len(x))

            def loss(params):
                guess = probe.apply(params, x[index], seen)
                return jnp.mean(jnp.square(guess - y[index]))

            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = probe.init(x[0], y.shape[1], init_key)
        keys = jax.random.split(batch_key, probe.steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    over_targets = jax.vmap(fit, in_axes=(None, 0, 0))
    params = jax.vmap(over_targets, in_axes=(0, None, None))(x, y, seen)
    return _Fitted(params, mean, std, target_mean, target_std)


@functools.partial(jax.jit, static_argnums=0)
def _test_all(probe: Probe, fitted: _Fitted, streams, targets, seen):
    x = jnp.moveaxis((streams - fitted.mean) / fitted.std, 1, 0)

    def test(params, x, target, mean, std, seen):
        guess = mean + std * probe.apply(params, x, seen)
        return jnp.mean(jnp.square(guess - target)), probe.attention(params, seen)

    per_target = (
        jnp.moveaxis(targets, 1, 0),
        jnp.ravel(fitted.target_mean),
        jnp.ravel(fitted.target_std),
        seen,
    )
    over_targets = jax.vmap(test, in_axes=(0, None, 0, 0, 0, 0))
    over_layers = jax.vmap(over_targets, in_axes=(0, 0, None, None, None, None))
    return over_layers(fitted.params, x, *per_target)


def _moments(values: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation; the latter is 1 where all are equal."""
    mean = jnp.mean(values, axis=axes, keepdims=True)
    std = jnp.std(values, axis=axes, keepdims=True)
    # Relative to the mean: rounding errors of a constant are no signal.
    constant = std <= 1e-6 * jnp.abs(mean) + 1e-30
    return mean, jnp.where(constant, 1.0, std)
