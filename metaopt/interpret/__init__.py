"""What a learned optimizer or an in-context learner computes."""

from metaopt.interpret.agreement import (
    Agreement,
    agreement,
    implied_weights,
    sensitivities,
)
from metaopt.interpret.attention_heads import (
    HeadScores,
    ablate_head,
    copying_scores,
    head_outputs,
    head_scores,
    prefix_matching_score,
    previous_token_score,
)
from metaopt.interpret.cell import Cell, as_optax, embedded_cell, separable_cell
from metaopt.interpret.fixed_points import (
    Components,
    FixedPoints,
    fixed_points,
    principal_components,
)
from metaopt.interpret.interpolation import interpolate, losses_between
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
from metaopt.interpret.probes import Probe, ProbeResult, probe_layers
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
    "Agreement",
    "Cell",
    "Components",
    "FixedPoints",
    "HeadScores",
    "Linear",
    "Modes",
    "Optimum",
    "Panel",
    "PhaseChange",
    "Probe",
    "ProbeResult",
    "Record",
    "ablate_head",
    "adaptation",
    "agreement",
    "as_optax",
    "autonomous_schedule",
    "copying_scores",
    "embedded_cell",
    "examine",
    "fixed_points",
    "gradient_histogram",
    "head_outputs",
    "head_scores",
    "implied_weights",
    "in_context_score",
    "interpolate",
    "learning_phase",
    "linear_cell",
    "linear_loss",
    "linearise",
    "losses_between",
    "modes",
    "optimum",
    "phase_change",
    "prefix_matching_score",
    "previous_token_score",
    "principal_components",
    "probe_layers",
    "record",
    "sensitivities",
    "separable_cell",
    "update_functions",
]
