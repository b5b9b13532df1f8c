"""The noisy quadratic: what a nominal term does for the stability of a black box."""

import io
import pathlib
from typing import Any

import numpy as np

from metaopt._files import write_atomically
from metaopt.stability.linear import (
    expected_meta_loss,
    quadratic_loop,
    spectral_radius,
    theorem_1,
)

CLAIM = (
    "A learned update keeps inner training stable if a nominal gradient term is added, "
    "if its output is preconditioned, or if its weights decay (Harrison et al., 2022, "
    "https://arxiv.org/abs/2209.11208, Theorem 1, Lemmas 2 and 3, Figure 1)."
)
NOMINAL = 0.3
INTERVENTIONS = (
    "none",
    "nominal term",
    "nominal term, preconditioned output",
    "nominal term, weight decay",
)


def random_symmetric(rng: np.random.Generator, dim: int, scale: float) -> np.ndarray:
    """Draws a symmetric matrix whose eigenvalues lie within about 1.4 `scale`."""
    x = rng.normal(size=(dim, dim))
    return scale * (x + x.T) / np.sqrt(2.0 * dim)


def random_hessian(
    rng: np.random.Generator, dim: int, low: float, high: float
) -> np.ndarray:
    """Draws eigenvalues log-uniform from `low` to `high`, which is the largest."""
    h = np.exp(rng.uniform(np.log(low), np.log(high), dim))
    h[0] = high
    q, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    return (q * h) @ q.T


def square_root(hessian: np.ndarray) -> np.ndarray:
    """Returns the symmetric square root of a positive definite matrix."""
    values, vectors = np.linalg.eigh(hessian)
    return (vectors * np.sqrt(values)) @ vectors.T


def intervened(P: np.ndarray, hessian: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the map `A` of one step under each intervention.

    The nominal term adds 0.3 times the gradient. A preconditioned output is multiplied
    by `H^(-1/2)`; weight decay of the black box is taken to halve its gain `P`.
    """
    eye = np.eye(len(P))
    shifted = (NOMINAL * eye + P) @ hessian
    preconditioned = np.linalg.solve(square_root(hessian), shifted)
    decayed = (NOMINAL * eye + 0.5 * P) @ hessian
    maps = (eye - P @ hessian, eye - shifted, eye - preconditioned, eye - decayed)
    return dict(zip(INTERVENTIONS, maps, strict=True))


def eigenvalue_clouds(
    *, count: int, dim: int, scale: float, seed: int
) -> dict[str, np.ndarray]:
    """Returns the eigenvalues of `A`, `[count, dim]` complex, per intervention.

    The black box is a Gaussian matrix with eigenvalues in a disc of radius `scale`: it
    knows nothing about descent. Curvatures reach from 0.1 to 4.
    """
    rng = np.random.default_rng(seed)
    clouds = {name: [] for name in INTERVENTIONS}
    for _ in range(count):
        P = scale * rng.normal(size=(dim, dim)) / np.sqrt(dim)
        maps = intervened(P, random_hessian(rng, dim, 0.1, 4.0))
        for name, A in maps.items():
            clouds[name].append(np.linalg.eigvals(A))
    return {name: np.array(values) for name, values in clouds.items()}


def stability_region(
    nominal: np.ndarray, blackbox: np.ndarray, *, dim: int, count: int, seed: int
) -> dict[str, np.ndarray]:
    """Measures the spectral radius over nominal and black-box gains.

    The black box has eigenvalues `p` and `-p` in random directions, the worst of its
    size. The certificate holds where Theorem 1 grants stability.

    Returns:
        "radius": the largest of `count` draws, `[nominal, blackbox]`; "certified": bool
        of the same shape.
    """
    rng = np.random.default_rng(seed)
    signs = np.where(np.arange(dim) % 2, -1.0, 1.0)
    draws = []
    for _ in range(count):
        q, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
        draws.append(((q * signs) @ q.T, random_hessian(rng, dim, 0.1, 1.0)))
    radius = np.zeros((len(nominal), len(blackbox)))
    certified = np.zeros(radius.shape, bool)
    for i, alpha in enumerate(nominal):
        for j, p in enumerate(blackbox):
            loops = [quadratic_loop(p * P, H, nominal=alpha) for P, H in draws]
            radius[i, j] = max(spectral_radius(loop.A) for loop in loops)
            P, H = draws[0]
            certified[i, j] = theorem_1(p * P, H, nominal=alpha).stable
    return {"radius": radius, "certified": certified}


def certificate(*, count: int, seed: int) -> dict[str, int]:
    """Counts on random draws how often Theorem 1 and the spectral radius agree."""
    rng = np.random.default_rng(seed)
    counts = {"certified": 0, "certified and stable": 0, "stable, not certified": 0}
    for _ in range(count):
        dim = int(rng.integers(2, 7))
        H = random_hessian(rng, dim, 0.1, 4.0)
        P = random_symmetric(rng, dim, 0.1)
        alpha = rng.uniform(0.0, 0.5)
        granted = theorem_1(P, H, nominal=alpha).stable
        stable = spectral_radius(quadratic_loop(P, H, nominal=alpha).A) < 1.0
        counts["certified"] += granted
        counts["certified and stable"] += granted and stable
        counts["stable, not certified"] += stable and not granted
    return counts


def simulated_losses(
    A: np.ndarray,
    hessian: np.ndarray,
    *,
    noise: float,
    runs: int,
    length: int,
    seed: int,
) -> np.ndarray:
    """Returns the mean loss of simulated runs from `(1, ..., 1)`, `[length]`."""
    rng = np.random.default_rng(seed)
    dim = len(A)
    x = np.ones((runs, dim))
    losses = []
    for _ in range(length):
        xi = noise * rng.normal(size=(runs, dim))
        losses.append(0.5 * np.mean(np.sum((x - xi) @ hessian * (x - xi), axis=1)))
        x = x @ A.T + xi @ (np.eye(dim) - A).T
    return np.array(losses)


def loss_curves(*, runs: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Compares the expected loss with simulation, for four nominal gains.

    Returns:
        "nominal" `[4]`, "radius" `[4]`, "theory" and "measured" `[4, length]`.
    """
    rng = np.random.default_rng(seed)
    dim, noise = 6, 0.3
    H = random_hessian(rng, dim, 0.1, 1.0)
    P = random_symmetric(rng, dim, 0.15)
    nominal = np.array([0.0, 0.1, 0.3, 1.0])
    curves: dict[str, list] = {"radius": [], "theory": [], "measured": []}
    for alpha in nominal:
        loop = quadratic_loop(P, H, nominal=alpha)
        S = noise**2 * np.eye(dim)
        theory = expected_meta_loss(loop, H, S, np.ones(dim), length=length)
        curves["radius"].append(spectral_radius(loop.A))
        curves["theory"].append(theory)
        measured = simulated_losses(
            loop.A, H, noise=noise, runs=runs, length=length, seed=seed
        )
        curves["measured"].append(measured)
    return {"nominal": nominal} | {k: np.array(x) for k, x in curves.items()}


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Computes the tables, saves `noisy-quadratic.png` in `out`.

    Args:
        out: an existing folder.
        full: whether to take many draws.

    Returns:
        {"claim", "paper", "ours", "tables"}, all of it JSON.
    """
    count = 2000 if full else 200
    clouds = eigenvalue_clouds(count=count // 10, dim=16, scale=0.3, seed=0)
    steps = 41 if full else 21
    nominal, blackbox = np.linspace(0.0, 2.5, steps), np.linspace(0.0, 1.5, steps)
    region = stability_region(nominal, blackbox, dim=6, count=count // 20, seed=1)
    agreement = certificate(count=count, seed=2)
    curves = loss_curves(runs=50 * count, length=60, seed=3)
    _draw(out / "noisy-quadratic.png", clouds, nominal, blackbox, region, curves)
    outside = {k: float(np.mean(np.abs(v) >= 1.0)) for k, v in clouds.items()}
    stable = region["radius"] < 1.0
    error = np.max(np.abs(curves["measured"] / curves["theory"] - 1.0))
    granted, kept = agreement["certified"], agreement["certified and stable"]
    return {
        "claim": CLAIM,
        "paper": {
            "Theorem 1": "its bounds imply stability",
            "Figure 1": "each intervention moves the eigenvalues into the unit circle",
        },
        "ours": {
            "certified loops that are stable": f"{kept} of {granted}",
            "stable loops that are not certified": agreement["stable, not certified"],
            "share of eigenvalues outside of the unit circle": outside,
            "largest relative error of the expected loss": float(error),
        },
        "tables": {
            "certificate": [agreement],
            "eigenvalues outside": [
                {"intervention": name, "share": share}
                for name, share in outside.items()
            ],
            "region": [
                {
                    "cells": int(stable.size),
                    "stable": int(stable.sum()),
                    "certified": int(region["certified"].sum()),
                    "certified, not stable": int((region["certified"] & ~stable).sum()),
                }
            ],
            "expected loss": [
                {
                    "nominal": float(a),
                    "spectral radius": float(r),
                    "theory": float(t.mean()),
                    "measured": float(m.mean()),
                }
                for a, r, t, m in zip(*curves.values(), strict=True)
            ],
        },
    }


def _draw(path, clouds, nominal, blackbox, region, curves) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    angle = np.linspace(0.0, 2.0 * np.pi, 200)
    for axis, (name, values) in zip(axes.flat, clouds.items(), strict=False):
        inside = np.mean(np.abs(values) < 1.0)
        axis.plot(values.real, values.imag, "C0.", markersize=2, alpha=0.5)
        axis.plot(np.cos(angle), np.sin(angle), "C1-", linewidth=1)
        axis.set(title=f"{name}:\n{inside:.0%} inside", xlabel="real part")
        axis.set(
            ylabel="imaginary part", aspect="equal", xlim=(-1.6, 2.6), ylim=(-1.5, 1.5)
        )
    axis = axes.flat[4]
    levels = axis.contourf(
        blackbox, nominal, np.log10(np.maximum(region["radius"], 1e-3)), cmap="viridis"
    )
    figure.colorbar(levels, ax=axis, label="log10 of the spectral radius")
    axis.contour(blackbox, nominal, region["radius"], [1.0], colors="white")
    axis.contour(
        blackbox,
        nominal,
        1.0 * region["certified"],
        [0.5],
        colors="C1",
        linestyles="--",
    )
    axis.set(title="stable inside white, certified inside dashes")
    axis.set(xlabel="gain of the black box", ylabel="nominal gain")
    axis = axes.flat[5]
    pairs = zip(*curves.values(), strict=True)
    for i, (alpha, radius, theory, measured) in enumerate(pairs):
        label = f"nominal {alpha:g}, radius {radius:.3f}"
        axis.plot(measured, f"C{i}.", markersize=4)
        axis.plot(theory, f"C{i}-", linewidth=1, label=label)
    axis.set(title="expected loss: lines theory, points measured", yscale="log")
    axis.set(xlabel="inner steps", ylabel="loss")
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
