"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate


class SOAPState(NamedTuple):
    """State of every tensor; axes that have no factor hold None.

    Attributes:
        steps: updates seen, `[]` int32.
        mu: average of the gradients, like `params`.
        nu: average of the squared gradients in the eigenbasis, like `params`.
        factors: per tensor a tuple with one average of `G G^T` per axis, `[d, d]`.
        bases: per tensor a tuple with the eigenvectors of each factor, `[d, d]`.
    """

    steps: jax.Array
    mu: chex.ArrayTree
    nu: chex.ArrayTree
    factors: tuple[tuple[Any, ...], ...]
    bases: tuple[tuple[Any, ...], ...]


def scale_by_soap(
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    max_dim: int = 1024,
) -> optax.GradientTransformation:
    """Returns the direction of SOAP.

    Each axis of a tensor of rank 2 or more has the running average `L` of `G G^T`, `G`
    the gradient unfolded along it, and a basis near its eigenvectors. Adam runs on
    gradients rotated into the bases; its directions are rotated back. Every `every`
    steps the bases take one step of power iteration and are made orthonormal by QR.
    Tensors of rank 0 and 1, and axes longer than `max_dim`, keep their own coordinates.
    The first gradient only fills the averages: its update is 0.

    Vyas et al., 2024, https://arxiv.org/abs/2409.11321, algorithm 3 and section 4.

    Args:
        b1: decay rate of `mu`.
        b2: decay rate of `nu`.
        shampoo_beta: decay rate of the factors.
        eps: added to the root of `nu`.
        every: steps between two changes of the bases.
        max_dim: longest axis that gets a factor.

    >>> tx = scale_by_soap()
    >>> state = tx.init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})
    >>> [[f.shape for f in factors] for factors in state.factors]
    [[], [(3, 3), (2, 2)]]
    """
    for name, value in (("b1", b1), ("b2", b2), ("shampoo_beta", shampoo_beta)):
        validate.number(name, value, low=0.0, high=1.0, open_high=True)
    validate.number("eps", eps, low=0.0, open_low=True)
    validate.integer("every", every)
    validate.integer("max_dim", max_dim)

    def axes(p):
        if p.ndim < 2 or not p.size:
            return ()
        return tuple(d if d <= max_dim else None for d in p.shape)

    def init(params):
        zeros = optax.tree.zeros_like(params, dtype=float)
        sizes = [axes(p) for p in jax.tree.leaves(params)]
        make = lambda of: tuple(
            tuple(None if d is None else of((d, d)) for d in dims) for dims in sizes
        )
        eye = lambda shape: jnp.eye(shape[0])
        return SOAPState(jnp.int32(0), zeros, zeros, make(jnp.zeros), make(eye))

    def update(grads, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(grads)
        columns = zip(
            leaves,
            treedef.flatten_up_to(state.mu),
            treedef.flatten_up_to(state.nu),
            state.factors,
            state.bases,
            strict=True,
        )
        decays = (b1, b2, shampoo_beta, eps, every)
        results = [_one_tensor(state.steps, decays, *column) for column in columns]
        parts = list(zip(*results, strict=True)) or [()] * 5
        updates, mu, nu = (treedef.unflatten(x) for x in parts[:3])
        return updates, SOAPState(state.steps + 1, mu, nu, *parts[3:])

    return optax.GradientTransformation(init, update)


def soap(
    learning_rate: Any = 3e-3, *, weight_decay: float = 0.0, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns SOAP with decoupled weight decay; options as in `scale_by_soap`.

    >>> tx = soap(0.1)
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    >>> updates.tolist()
    [-0.0, -0.0]
    """
    return optax.chain(
        scale_by_soap(**options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _one_tensor(count, decays, grad, mu, nu, factors, bases):
    """Returns update, mu, nu, factors and bases of one tensor."""
    b1, b2, beta, eps, every = decays
    g = grad.astype(jnp.float32)
    first = count == 0
    seen = jnp.maximum(count, 1).astype(jnp.float32)
    new_mu = jnp.where(first, mu, b1 * mu + (1 - b1) * g)
    rotated = _rotate(g, bases)
    new_nu = jnp.where(first, nu, b2 * nu + (1 - b2) * rotated**2)
    mean = _rotate(new_mu, bases) / (1 - b1**seen)
    direction = mean / (jnp.sqrt(new_nu / (1 - b2**seen)) + eps)
    update = jnp.where(first, 0.0, _rotate(direction, bases, back=True))
    factors = tuple(
        None if f is None else beta * f + (1 - beta) * _gram(g, axis)
        for axis, f in enumerate(factors)
    )

    def refreshed(bases):
        return tuple(
            None if f is None else _new_basis(first, f, q)
            for f, q in zip(factors, bases, strict=True)
        )

    bases = jax.lax.cond(count % every == 0, refreshed, lambda b: b, bases)
    return update.astype(grad.dtype), new_mu, new_nu, factors, bases


def _rotate(x, bases, *, back=False):
    """Multiplies every axis of `x` by its basis, transposed unless `back`."""
    for axis, q in enumerate(bases):
        if q is not None:
            x = jnp.tensordot(x, q, axes=(axis, 1 if back else 0))
            x = jnp.moveaxis(x, -1, axis)
    return x


def _gram(g, axis):
    """Returns `G G^T` of `g` unfolded along `axis`."""
    others = [i for i in range(g.ndim) if i != axis]
    return jnp.tensordot(g, g, axes=(others, others))


def _new_basis(first, factor, basis):
    """Returns eigenvectors at the first step, one step of power iteration later."""
    values, vectors = jnp.linalg.eigh(factor)
    del values
    turned, _ = jnp.linalg.qr(factor @ basis)
    return jax.lax.stop_gradient(jnp.where(first, vectors[:, ::-1], turned))
