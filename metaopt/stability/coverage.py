"""Where the inputs of an optimizer lie, and how many of others lie beyond."""

import os
import pathlib
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from metaopt import validate
from metaopt._files import write_atomically


class Coverage(NamedTuple):
    """Where the inputs of an optimizer lie; `save_coverage` stores it.

    Attributes:
        mean: mean of the `f` features, `[f]`.
        whitening: turns a deviation into independent coordinates of variance 1,
            `[f, f]`.
        limit: squared distance that one in a thousand of the inputs exceeds, `[]`.
    """

    mean: jax.Array
    whitening: jax.Array
    limit: jax.Array


def fit_coverage(x: np.ndarray) -> Coverage:
    """Fits mean, covariance and limit to features `[n, f]`.

    Rows that are not finite are left out.

    Raises:
        ValueError: if fewer than `10 f` rows are finite.

    >>> x = np.random.default_rng(0).standard_normal((5000, 2))
    >>> coverage = fit_coverage(x)
    >>> bool(12.0 < coverage.limit < 16.0)  # chi-squared: 13.8
    True
    """
    x = np.asarray(x, np.float64)
    x = x[np.isfinite(x).all(axis=1)]
    n, f = x.shape
    if n < 10 * f:
        raise ValueError(f"x must have at least {10 * f} finite rows, got {n}.")
    mean = x.mean(axis=0)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False)))
    # Features that never vary, or copy each other, must not divide by zero.
    values = np.maximum(values, 1e-3 * max(values.max(), 1e-12))
    whitening = vectors / np.sqrt(values)
    limit = np.quantile(np.sum(((x - mean) @ whitening) ** 2, axis=1), 0.999)
    return Coverage(*(jnp.asarray(a, jnp.float32) for a in (mean, whitening, limit)))


def squared_distances(coverage: Coverage, x: jax.Array) -> jax.Array:
    """Returns the squared Mahalanobis distances `[n]` of features `[n, f]`."""
    return jnp.sum(((x - coverage.mean) @ coverage.whitening) ** 2, axis=-1)


def share_beyond(coverage: Coverage, x: jax.Array) -> jax.Array:
    """Returns the share `[]` of rows of `x` `[n, f]` beyond the limit, or not finite.

    In the runs that `coverage` was fitted to it is 0.001.
    """
    return jnp.mean(~(squared_distances(coverage, x) <= coverage.limit))


def save_coverage(path: str | os.PathLike[str], **coverages: Coverage) -> None:
    """Writes coverages into one safetensors file, each under the name it is given.

    The file appears in one step: an interrupted save leaves what was there before.

    Args:
        path: the file to write; folders above it are created.
        **coverages: at least one, with finite arrays. Names in use are "generic" for
            `generic_features`, and "inputs" and "hidden" for those that probe S15
            compares with.

    Raises:
        ValueError: listing every array that does not fit.
        OSError: naming the path, if it cannot be written.

    >>> import tempfile
    >>> known = Coverage(jnp.zeros(2), jnp.eye(2), jnp.float32(13.8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "healthy.safetensors")
    ...     save_coverage(path, generic=known)
    ...     load_coverage(path)["generic"].whitening.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if not coverages:
        raise ValueError("coverages must be given by name, as in generic=known.")
    for name, coverage in coverages.items():
        validate.instance(name, coverage, Coverage, "fit_coverage(x)")
    tensors = {
        f"{name}/{field}": np.array(x, np.float32, order="C")
        for name, coverage in coverages.items()
        for field, x in coverage._asdict().items()
    }
    if problems := _unfit(tensors):
        raise ValueError(f"coverages do not fit: {'; '.join(problems)}.")
    write_atomically(pathlib.Path(path), safetensors.numpy.save(tensors))


def load_coverage(path: str | os.PathLike[str]) -> dict[str, Coverage]:
    """Reads what `save_coverage` wrote: coverages by name.

    Raises:
        ValueError: naming the path, if it is another file or damaged.
        OSError: if the file cannot be read.
    """
    try:
        tensors = safetensors.numpy.load(pathlib.Path(path).read_bytes())
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} must be a file of save_coverage, got another or a damaged one."
        ) from error
    if problems := _unfit(tensors):
        raise ValueError(
            f"{path} must be a file of save_coverage: {'; '.join(problems)}."
        )
    names = sorted({name.rpartition("/")[0] for name in tensors})
    return {
        name: Coverage(*(jnp.asarray(tensors[f"{name}/{x}"]) for x in Coverage._fields))
        for name in names
    }


def _unfit(tensors: dict[str, np.ndarray]) -> list[str]:
    """Returns what keeps tensors from being coverages."""
    problems = [] if tensors else ["it is empty"]
    names = sorted({name.rpartition("/")[0] for name in tensors})
    for name in names:
        f = tensors.get(f"{name}/mean", np.zeros(0)).size
        wanted = {"mean": (f,), "whitening": (f, f), "limit": ()}
        for key, shape in wanted.items():
            x = tensors.get(f"{name}/{key}")
            if x is None or x.shape != shape:
                has = "is missing" if x is None else f"has shape {x.shape}"
                problems.append(f"{name}/{key} {has}, needs {shape}")
            elif x.dtype != np.float32 or not np.isfinite(x).all():
                problems.append(f"{name}/{key} must be finite float32")
    known = {f"{name}/{key}" for name in names for key in Coverage._fields}
    return problems + [f"unexpected {name}" for name in sorted(set(tensors) - known)]


def generic_features(
    grads: chex.ArrayTree,
    updates: chex.ArrayTree,
    params: chex.ArrayTree,
    *,
    count: int = 1024,
) -> jax.Array:
    """Describes what any optimizer sees and does, for a sample of coordinates.

    The features are the logarithms of the sizes of gradient, update and parameter, and
    whether update and gradient point in opposite directions. Ratios of sizes are
    differences of logarithms, so the covariance knows them.

    Args:
        grads: gradients.
        updates: what the optimizer made of them.
        params: parameters before the update.
        count: about how many coordinates to look at, evenly over all tensors.

    Returns:
        Features `[n, 4]`.

    >>> generic_features(jnp.ones(3), -jnp.ones(3), jnp.ones(3)).round(3).tolist()[0]
    [0.0, 0.0, 0.0, 1.0]
    """
    total = max(1, sum(jnp.size(p) for p in jax.tree.leaves(params)))
    stride = max(1, total // count)

    def sample(tree):
        flat = [jnp.ravel(x)[::stride] for x in jax.tree.leaves(tree)]
        return jnp.concatenate(flat).astype(jnp.float32)

    g, u, p = sample(grads), sample(updates), sample(params)
    sizes = [jnp.log(jnp.abs(x) + 1e-12) for x in (g, u, p)]
    return jnp.stack([*sizes, -jnp.sign(g * u)], axis=-1)
