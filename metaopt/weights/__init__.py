"""Files of meta-parameters: saving, loading, and the bundled ones."""

from metaopt.weights.bundle import available, load, load_with_info
from metaopt.weights.store import load_weights, save_weights

__all__ = ["available", "load", "load_weights", "load_with_info", "save_weights"]
