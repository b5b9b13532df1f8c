"""The command `compare`: tasks x optimizers x seeds, one tuning protocol for all."""
