"""Celo2: a learned direction of unit size; learning rate and decay are the user's."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.optimizers import features, velo_features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.network import init_network

_EPSILON = 1e-9
_SQUARE_EPSILON = 1e-8
# The root of 0 has no derivative; this much under it is lost beside Adam's epsilon.
_ROOT_EPSILON = 1e-30
_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Part of the gradient in the direction, by start.
_GRADIENT_PART = {"momentum": 0.0, "nesterov": 0.3}


@dataclasses.dataclass(frozen=True)
class Celo2(LearnedOptimizer):
    """A per-parameter MLP whose output is divided by its root mean square.

    The network reads 30 features of a matrix. Only its first output, a direction, is
    used; it is orthogonalised if asked and divided by its root mean square. There is no
    feature of time or loss and no learned decay, so that the user's schedule acts as in
    any optax optimizer: see `celo2_adamw` and `scale_by_celo2`.

    As a `LearnedOptimizer`, which is meta-trained, the rule takes steps of
    `learning_rate` and leaves vectors and scalars to Adam.

    Reconstructions: in tensors of more than two axes every pair of the last two is
    orthogonalised alone, and the size is taken over the whole tensor; meta-training
    uses `learning_rate`. Not in the paper are the starts other than "random" and
    `schedule="cosine"`, with which meta-training meets the schedule that users run.

    Attributes:
        widths: hidden layer sizes.
        decays: decay rates of the gradient averages, and of the factored averages of
            its square.
        square_decay: decay rate of the full average of its square.
        orthogonalize: whether five Newton-Schulz iterations bring the singular values
            of the direction close to each other.
        learning_rate: update size when used without `celo2_adamw`.
        adam_multiplier: learning rate of Adam as a multiple of the network's.
        weight_decay: decay of the parameters per step, times the learning rate; used
            without `celo2_adamw`.
        start: what meta-training starts from: "random" weights; "momentum", a network
            whose direction is the average gradient of the first decay, which with
            `orthogonalize` is Muon (Jordan et al., 2024) without Nesterov momentum; or
            "nesterov", to which 0.3 of the gradient is added, both divided by their
            root mean square.
        schedule: "constant", or "cosine" down to 0 at `num_steps`; used without
            `celo2_adamw`, and constant where `num_steps` is not given.

    References:
        Celo2, 2026, https://arxiv.org/abs/2602.19142

    >>> import jax
    >>> theta = Celo2().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    347
    """

    widths: tuple[int, ...] = (8, 8)
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    square_decay: float = 0.95
    orthogonalize: bool = True
    learning_rate: float = 1e-3
    adam_multiplier: float = 20.0
    weight_decay: float = 0.0
    start: str = "random"
    schedule: str = "constant"

    def __post_init__(self):
        validate.integers("widths", self.widths)
        validate.numbers("decays", self.decays, low=0.0, high=1.0, open_high=True)
        validate.number(
            "square_decay", self.square_decay, low=0.0, high=1.0, open_high=True
        )
        for name in ("learning_rate", "adam_multiplier"):
            validate.number(name, getattr(self, name), low=0.0, open_low=True)
        validate.number("weight_decay", self.weight_decay, low=0.0)
        validate.one_of("start", self.start, ("random", *_GRADIENT_PART))
        if self.start != "random" and min(self.widths) < 2:
            raise ValueError(
                f'widths must be at least 2 where start="{self.start}", '
                f"got widths={self.widths}."
            )
        validate.one_of("schedule", self.schedule, ("constant", "cosine"))

    def init_theta(self, key):
        inputs = velo_features.num_features(len(self.decays))
        theta = init_network(key, (inputs, *self.widths, 3))
        if self.start == "random":
            return theta
        return _carry_momentum(theta, _GRADIENT_PART[self.start])

    def init(self, theta, params, *, num_steps=None, key=None):
        del key
        end = 0 if num_steps is None else num_steps
        inner = self._transformation(theta, end).init(_float32(params))
        return Scheduled(inner, jnp.asarray(end, jnp.int32))

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del value, extra
        updates, inner = self._transformation(theta, state.num_steps).update(
            _float32(grads), state.inner, _float32(params)
        )
        updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
        return updates, Scheduled(inner, state.num_steps)

    def _transformation(self, theta, num_steps):
        rate: optax.ScalarOrSchedule = self.learning_rate
        if self.schedule == "cosine":
            # A cosine that never ends is constant.
            end = jnp.where(num_steps > 0, num_steps, jnp.inf)
            part = lambda step: jnp.minimum(step / end, 1.0)
            rate = lambda step: (
                self.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * part(step)))
            )
        return celo2_adamw(theta, rate, rule=self, weight_decay=self.weight_decay)


class Scheduled(NamedTuple):
    """The state of `Celo2` as it is meta-trained.

    Attributes:
        inner: state of `celo2_adamw`.
        num_steps: length of the run in steps, `[]` int32; 0 if not known.
    """

    inner: optax.OptState
    num_steps: jax.Array


_DEFAULT = Celo2()


class Celo2State(NamedTuple):
    """What `scale_by_celo2` remembers; `k` is the number of decays.

    Attributes:
        momenta: averages of the gradient, leaves `[k, *shape]`.
        square: average of the squared gradient, leaves `[*shape]`.
        row: averages of the squared gradient over the largest axis, leaves
            `[k, *shape without it]`.
        col: the same over the second largest axis.
    """

    momenta: chex.ArrayTree
    square: chex.ArrayTree
    row: chex.ArrayTree
    col: chex.ArrayTree


def celo2_adamw(
    theta: chex.ArrayTree,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rule: Celo2 = _DEFAULT,
    weight_decay: float = 0.0,
    embeddings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Celo2 for matrices with AdamW for vectors, scalars and embeddings.

    A matrix moves by `-learning_rate * (direction + weight_decay * p)`. AdamW has decay
    rates 0.9 and 0.95, epsilon 1e-8, the same `weight_decay`, and `learning_rate` times
    `rule.adam_multiplier`; that its decay grows with the multiplier is a
    reconstruction.

    Args:
        theta: meta-parameters, as returned by `Celo2.init_theta` or meta-training.
        learning_rate: number or optax schedule.
        rule: the settings that theta was trained with; its `learning_rate`, `schedule`
            and `weight_decay` are not used.
        weight_decay: decay of the parameters per step, times the learning rate.
        embeddings: pytree of bools like the parameters, true where Adam takes over, or
            a function that makes it from a pytree like them.

    >>> theta = Celo2().init_theta(jax.random.key(0))
    >>> schedule = optax.cosine_decay_schedule(1e-3, decay_steps=1000)
    >>> tx = celo2_adamw(theta, schedule, weight_decay=0.1)
    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates["w"].shape
    (2, 3)
    """
    multiplier = rule.adam_multiplier
    if callable(learning_rate):
        adam_rate = lambda step: multiplier * learning_rate(step)
    else:
        adam_rate = multiplier * learning_rate
    network = optax.chain(
        scale_by_celo2(theta, rule),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    adam = optax.adamw(
        adam_rate,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        eps_root=_ROOT_EPSILON,
        weight_decay=weight_decay,
    )

    def labels(params):
        chosen = embeddings(params) if callable(embeddings) else embeddings
        if chosen is None:
            chosen = jax.tree.map(lambda p: False, params)
        label = lambda p, e: "adam" if e or jnp.ndim(p) < 2 else "network"
        return jax.tree.map(label, params, chosen)

    return optax.multi_transform({"network": network, "adam": adam}, labels)


def scale_by_celo2(
    theta: chex.ArrayTree, rule: Celo2 = _DEFAULT
) -> optax.GradientTransformationExtraArgs:
    """Returns the direction alone, of root mean square 1 in every tensor.

    Like other `scale_by_` transformations it does not change the sign: chain it with
    `optax.scale_by_learning_rate`.

    Args:
        theta: meta-parameters, as returned by `Celo2.init_theta` or meta-training.
        rule: the settings that theta was trained with.

    Raises:
        ValueError: on `init`, if a tensor has fewer than two axes; on `update`, if
            `params` is missing.

    >>> theta = Celo2().init_theta(jax.random.key(0))
    >>> tx = optax.chain(scale_by_celo2(theta), optax.scale_by_learning_rate(1e-3))
    >>> params = jnp.ones((2, 3))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    """

    def init(params):
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(p) < 2:
                name = f"params{jax.tree_util.keystr(path)}"
                raise ValueError(
                    f"scale_by_celo2 updates tensors of two or more axes, got {name} "
                    f"with shape {jnp.shape(p)}; celo2_adamw updates the others too."
                )
        return Celo2State(*velo_features.init_averages(params, len(rule.decays)))

    def update(grads, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError(
                "scale_by_celo2 reads the parameters: call "
                "tx.update(grads, state, params)."
            )
        treedef = jax.tree.structure(params)
        columns = (treedef.flatten_up_to(x) for x in (grads, params, *state))
        leaves = zip(*columns, strict=True)
        results = [_update_leaf(rule, theta, *leaf) for leaf in leaves]
        updates, *averages = zip(*results, strict=True) if results else [()] * 5
        new_state = Celo2State(*(treedef.unflatten(x) for x in averages))
        return treedef.unflatten(updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _update_leaf(rule, theta, g, p, m, v, row, col):
    if p.size == 0:
        return p, m, v, row, col
    dtype = p.dtype
    g, p = g.astype(jnp.float32), p.astype(jnp.float32)
    averages = velo_features.update_averages(
        velo_features.Averages(m, v, row, col), g, rule.decays, rule.square_decay
    )
    # Mean squares are taken over the last two axes.
    direction, *_ = velo_features.outputs(
        theta,
        g,
        p,
        averages,
        square_epsilon=_SQUARE_EPSILON,
        epsilon=_EPSILON,
        alone=g.ndim - 2,
    )
    if rule.orthogonalize:
        direction = _orthogonalize(direction)
    (mean_square,) = features.mean_squares(lambda u: [u * u], direction)
    direction = direction * jax.lax.rsqrt(mean_square + _EPSILON)
    return direction.astype(dtype), *averages


def _carry_momentum(theta, part):
    """Lets the first two units of each layer carry the momentum to the direction.

    One carries its positive part and one its negative part, undisturbed, with `part` of
    the gradient added to it; what the other weights do is scaled down, so that it
    changes the direction little by little.
    """
    gradient, momentum, scale = 0, 3, 0.3
    pair = jnp.array([1.0, -1.0])
    theta = jax.tree.map(lambda x: scale * x, theta)
    last = len(theta) - 1
    for i in range(last + 1):
        w = theta[f"linear_{i}"]["w"]
        if i == 0:
            w = w.at[:, :2].set(0.0).at[momentum, :2].set(pair)
            w = w.at[gradient, :2].set(part * pair)
        elif i < last:
            w = w.at[:, :2].set(0.0).at[:2, :2].set(jnp.eye(2))
        else:
            w = w.at[:, 0].set(0.0).at[:2, 0].set(pair)
        theta[f"linear_{i}"]["w"] = w
    return theta


def _orthogonalize(x):
    """Brings the singular values of the last two axes close to 1."""
    if x.shape[-2] > x.shape[-1]:
        return jnp.swapaxes(_orthogonalize(jnp.swapaxes(x, -1, -2)), -1, -2)
    x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True) + 1e-14)
    a, b, c = _COEFFICIENTS
    # The default precision of a GPU, ten bits, is enough: they only come near 1.
    for _ in range(_ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
