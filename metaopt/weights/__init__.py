"""Files of meta-parameters: saving, loading, and the bundled ones."""

from metaopt.weights.bundle import available, load
from metaopt.weights.store import load_weights, save_weights

__all__ = ["available", "load", "load_weights", "save_weights"]
