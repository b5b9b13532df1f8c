"""What a learned optimizer or an in-context learner computes."""

from metaopt.interpret.cell import Cell, as_optax, embedded_cell, separable_cell
from metaopt.interpret.fixed_points import (
    Components,
    FixedPoints,
    fixed_points,
    principal_components,
)
from metaopt.interpret.linearise import (
    Linear,
    Modes,
    Optimum,
    linear_cell,
    linearise,
    modes,
    optimum,
)
from metaopt.interpret.optimizer import Panel, examine, linear_loss
from metaopt.interpret.phases import (
    PHASES,
    PhaseChange,
    in_context_score,
    learning_phase,
    phase_change,
)
from metaopt.interpret.record import Record, record
from metaopt.interpret.update_functions import (
    Adaptation,
    adaptation,
    autonomous_schedule,
    gradient_histogram,
    update_functions,
)

__all__ = [
    "PHASES",
    "Adaptation",
    "Cell",
    "Components",
    "FixedPoints",
    "Linear",
    "Modes",
    "Optimum",
    "Panel",
    "PhaseChange",
    "Record",
    "adaptation",
    "as_optax",
    "autonomous_schedule",
    "embedded_cell",
    "examine",
    "fixed_points",
    "gradient_histogram",
    "in_context_score",
    "learning_phase",
    "linear_cell",
    "linear_loss",
    "linearise",
    "modes",
    "optimum",
    "phase_change",
    "principal_components",
    "record",
    "separable_cell",
    "update_functions",
]
