"""Optimus: a Transformer that learns the rank-one updates of a preconditioner."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers import curvature, features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.curvature import Memory
from metaopt.optimizers.encoder import encode, init_encoders
from metaopt.optimizers.small_fc import SmallFC, SmallFCState
from metaopt.optimizers.tokens import (
    SECANT_INPUTS,
    ravel,
    secant_inputs,
    split,
    token_features,
)

# Inputs per coordinate beside the features of SmallFC.
_CURVATURES = {"none": 0, "preconditioned": 1, "secant": SECANT_INPUTS}
_GATE_RANGE = 10.0


class Block(NamedTuple):
    """What `Optimus` remembers of `n` coordinates that share a preconditioner.

    Attributes:
        matrix: preconditioner `B` `[n, n]`, None without encoders.
        memory: of the last step.
        log_step: sum of all gates so far, `[]`; stays 0 unless they accumulate.
        penalty: distance from the secant equation at the last update, `[]`.
    """

    matrix: jax.Array | None
    memory: Memory
    log_step: jax.Array
    penalty: jax.Array


class OptimusState(NamedTuple):
    """What `Optimus` remembers.

    Attributes:
        small_fc: averages, as of `SmallFC`.
        blocks: one for all tensors together, or one per tensor beyond `max_dense`.
    """

    small_fc: SmallFCState
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Optimus(LearnedOptimizer):
    """SmallFC times a preconditioner that attention over the coordinates builds up.

    A labelled reconstruction: the paper gives the structure, its exact constants are
    not public. Tokens are the coordinates of all tensors, described by the features of
    `SmallFC` and without a position, so the weights serve any dimension. Encoder `l`
    ends in a linear head with one value per coordinate, `u_l` `[n]`, shrunk to a root
    mean square below 1. From the identity on,

        B <- (1 - forget) B + forget I + rank_scale / n * sum_l u_l u_l^T,

    by default scaled to trace `n`: with `forget > 0`, `B` is symmetric positive
    definite. The update is `exp(gate) * B @ d`, with `d` the update of `small_fc` and a
    gate that starts at 0. With heads of zero it therefore equals `small_fc`, where all
    coordinates are in use. That point is a saddle, the gradient in the heads is exactly
    0 there, so by default heads start small instead.

    A coordinate is in use once it had a gradient other than 0. All others get no
    update, no attention and no share in means, so one compiled program serves problems
    of many dimensions, padded to the largest. Cost per update is `O(n^2)`.

    Attributes:
        small_fc: the rule that is preconditioned, and its fields.
        encoders: number of encoders, 3 in the paper; without any, `B` is the identity.
            In a short meta-training one encoder learned fastest.
        width: numbers per token.
        heads: attention heads, a divisor of `width`.
        feedforward: hidden units of an encoder's feed-forward network.
        rank_scale: largest eigenvalue that one encoder adds to `B` in a step.
        forget: share of `B` that is replaced by the identity at each step.
        trace: "normalised" to the number of coordinates, or "free".
        curvature: what encoders read beside the features. "none"; "preconditioned": `B`
            times the gradient; "secant": the last step `s`, the change `y` of the
            gradient, `B y`, the residual `s - B y` and the rank-one term of BFGS, made
            free of scale, and the scalars of the gate.
        gate: how a step is scaled by a network of scalars such as the log of the
            gradient's size, the cosine of successive gradients and the curvature along
            the last step, and of the mean token. "none"; "pooled": by the exponential
            of its output; "accumulated": by that of the sum of its outputs so far.
        head_scale: how far from zero heads start.
        max_dense: up to so many coordinates in all tensors together there is one `B`,
            beyond there is one per tensor, with attention inside a tensor.

    References:
        Gaertner et al., 2023, https://arxiv.org/abs/2212.01055

    >>> import jax
    >>> theta = Optimus().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    7801
    """

    small_fc: SmallFC = dataclasses.field(default_factory=SmallFC)
    encoders: int = 3
    width: int = 16
    heads: int = 2
    feedforward: int = 32
    rank_scale: float = 1.0
    forget: float = 0.05
    trace: str = "normalised"
    curvature: str = "secant"
    gate: str = "pooled"
    head_scale: float = 0.1
    max_dense: int = 4096

    def __post_init__(self):
        validate.instance("small_fc", self.small_fc, SmallFC, "SmallFC()")
        validate.integer("encoders", self.encoders, minimum=0)
        for name in ("width", "heads", "feedforward", "max_dense"):
            validate.integer(name, getattr(self, name))
        if self.width % self.heads:
            raise ValueError(
                "heads must divide width, "
                f"got heads={self.heads} and width={self.width}."
            )
        validate.number("rank_scale", self.rank_scale, low=0.0)
        validate.number("forget", self.forget, low=0.0, high=1.0)
        if self.trace == "free" and self.forget == 0.0:
            raise ValueError("forget must be above 0 if trace='free', got forget=0.0.")
        validate.one_of("trace", self.trace, ("normalised", "free"))
        validate.one_of("curvature", self.curvature, _CURVATURES)
        validate.one_of("gate", self.gate, ("none", "pooled", "accumulated"))
        validate.number("head_scale", self.head_scale, low=0.0)

    def init_theta(self, key):
        small_key, encoder_key = jax.random.split(key)
        times = len(features.TIMESCALES)
        theta = {"small_fc": self.small_fc.init_theta(small_key)}
        if self.encoders:
            inputs = 4 + 8 * len(self.small_fc.decays) + times
            inputs += _CURVATURES[self.curvature]
            inputs += curvature.CONTEXT * (self.curvature == "secant")
            theta["encoder"] = init_encoders(
                encoder_key,
                inputs,
                width=self.width,
                feedforward=self.feedforward,
                encoders=self.encoders,
                head_scale=self.head_scale,
            )
        if self.gate != "none":
            inputs = times + curvature.CONTEXT + self.width * (self.encoders > 0)
            theta["gate"] = {"w": jnp.zeros(inputs), "b": jnp.zeros(())}
        return theta

    def init(self, theta, params, *, num_steps=None, key=None):
        small_state = self.small_fc.init(theta["small_fc"], params)
        sizes = [p.size for p in jax.tree.leaves(params)]
        blocks = []
        for leaves in self._partition(params):
            n = sum(sizes[i] for i in leaves)
            matrix = jnp.eye(n) if self.encoders else None
            memory = curvature.init_memory(n)
            blocks.append(Block(matrix, memory, jnp.zeros(()), jnp.zeros(())))
        return OptimusState(small_state, tuple(blocks))

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del value, extra
        count, small_theta = state.small_fc.step, theta["small_fc"]
        leaves, treedef = jax.tree.flatten(params)
        tensors, small_state = self.small_fc.accumulate(
            small_theta, grads, state.small_fc, params
        )
        updates, blocks = [jnp.zeros(p.shape, p.dtype) for p in leaves], []
        for own, block in zip(self._partition(params), state.blocks, strict=True):
            group = [tensors[i] for i in own]
            grad = ravel([x.grad for x in group])
            active, pair = curvature.observe(block.memory, grad)
            masks = split(active, group)
            direction = ravel(self.small_fc.steps(small_theta, group, count, masks))
            tokens = None
            if self.encoders:
                pairs = zip(group, masks, strict=True)
                tokens = jnp.concatenate([token_features(*x) for x in pairs], axis=1)
            signals = _Signals(grad, direction, active, pair, tokens, count)
            step, block = self._advance(theta, signals, block)
            blocks.append(block)
            for i, update in zip(own, split(step, group), strict=True):
                updates[i] = update.astype(leaves[i].dtype)
        return treedef.unflatten(updates), OptimusState(small_state, tuple(blocks))

    def secant_penalty(self, state: OptimusState) -> jax.Array:
        """Returns how far the last update of `B` is from the secant equation, `[]`.

        It is `|s - B y|^2 / (|s|^2 + |B y|^2)` for the last step `s`, up to a running
        scale, and the change `y` of the gradient along it, averaged over the blocks; 0
        before the second update. See `metaopt.secant.SecantPenalty`.
        """
        total = sum((block.penalty for block in state.blocks), jnp.float32(0.0))
        return total / max(1, len(state.blocks))

    def _partition(self, params):
        """Returns the indices of the tensors in each block."""
        named = jax.tree_util.tree_leaves_with_path(params)
        own = [i for i, (_, p) in enumerate(named) if p.size]
        if not self.encoders or sum(named[i][1].size for i in own) <= self.max_dense:
            return [own] if own else []
        for i in own:
            path, p = named[i]
            if p.size > self.max_dense:
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} has {p.size} elements, more "
                    f"than max_dense={self.max_dense}: raise max_dense, which costs "
                    "memory for its square, or use LSR1, which needs none."
                )
        return [[i] for i in own]

    @functools.partial(jax.jit, static_argnums=0)
    def _advance(self, theta, signals, block):
        """Updates the preconditioner of one block and applies it.

        Compiled as one: outside of `jax.jit` its hundreds of small operations would
        each be compiled by themselves.
        """
        grad, direction, active, pair, tokens, count = signals
        memory, matrix = block.memory, block.matrix
        product = pair.change if matrix is None else _times(matrix, pair.change)
        before = curvature.secant(memory, pair, product, active)
        context, log_grad = curvature.context(memory, pair, before, grad, active)
        shared = jnp.concatenate([features.time_features(count), context])
        pooled, penalty, log_scale = shared, block.penalty, before.log_scale
        if matrix is not None:
            inputs = self._curvatures(matrix, signals, before)
            seen = shared if self.curvature == "secant" else shared[: -len(context)]
            vectors, z = encode(
                theta["encoder"],
                jnp.concatenate([tokens, *inputs]),
                seen,
                active,
                heads=self.heads,
            )
            pooled = jnp.concatenate([shared, curvature.active_mean(z.T, active)])
            matrix = self._rank_one(matrix, vectors, active)
            both = _times(matrix, jnp.stack([direction, pair.change], axis=1))
            direction, product = both[:, 0], both[:, 1]
            after = curvature.secant(memory, pair, product, active)
            penalty, log_scale = curvature.penalty(after, active), after.log_scale
        scale, log_step = self._gate(theta, pooled, block.log_step)
        step = jnp.where(active, scale * direction, 0.0)
        memory = Memory(active, grad, step, log_grad, log_scale)
        return step, Block(matrix, memory, log_step, penalty)

    def _curvatures(self, matrix, signals, residual):
        """Returns what the encoders read beside the features of SmallFC."""
        active, pair = signals.active, signals.pair
        if self.curvature == "none":
            return []
        if self.curvature == "preconditioned":
            product, _ = curvature.unit(_times(matrix, signals.grad), active)
            return [product[None]]
        return [secant_inputs(pair, residual, active)]

    def _rank_one(self, matrix, vectors, active):
        """Adds the vectors `[encoders, n]` to the preconditioner `[n, n]`."""
        u = curvature.bounded(jnp.where(active, vectors, 0.0), active)
        n = jnp.maximum(jnp.sum(active), 1).astype(jnp.float32)
        u = u * jnp.sqrt(self.rank_scale / n)
        # Outer products are summed one by one to keep the matrix symmetric to the bit,
        # and B + forget (I - B) keeps the identity to the bit.
        eye = jnp.eye(len(matrix))
        new = matrix + self.forget * (eye - matrix)
        new = new + sum(x[:, None] * x for x in u)
        if self.trace == "free":
            return new
        diagonal = jnp.diagonal(matrix)
        diagonal = diagonal + self.forget * (1.0 - diagonal) + jnp.sum(u * u, axis=0)
        mean = curvature.active_mean(diagonal, active)
        scale = jnp.where(mean > 0, 1.0 / jnp.where(mean > 0, mean, 1.0), 1.0)
        return jnp.where(active[:, None] & active, new * scale, new)

    def _gate(self, theta, pooled, log_step):
        if self.gate == "none":
            return jnp.float32(1.0), log_step
        change = pooled @ theta["gate"]["w"] + theta["gate"]["b"]
        if self.gate == "pooled":
            return jnp.exp(_limited(change)), log_step
        log_step = _limited(log_step + change)
        return jnp.exp(log_step), log_step


class _Signals(NamedTuple):
    """What one update knows of a block before its encoders run.

    Attributes:
        grad: gradient `[n]`.
        direction: update of `small_fc`, `[n]`.
        active: coordinates in use, `[n]` bool.
        pair: the last step and change of the gradient.
        tokens: features `[F, n]`, None without encoders.
        updates: updates made, `[]` int32.
    """

    grad: jax.Array
    direction: jax.Array
    active: jax.Array
    pair: curvature.Pair
    tokens: jax.Array | None
    updates: jax.Array


def _limited(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -_GATE_RANGE, _GATE_RANGE)


def _times(matrix: jax.Array, x: jax.Array) -> jax.Array:
    # Full precision: GPUs would round to 10 bits of mantissa.
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)
