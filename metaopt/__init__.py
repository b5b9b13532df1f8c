"""metaopt: meta-train, apply and analyse learned optimizers and learners."""

__version__ = "0.1.0"
