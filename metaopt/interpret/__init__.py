"""What a learned optimizer or an in-context learner computes."""

from metaopt.interpret.agreement import (
    Agreement,
    agreement,
    implied_weights,
    sensitivities,
)
from metaopt.interpret.anomalous_diffusion import (
    LangevinRates,
    Moments,
    diffusion_exponent,
    expected_displacement,
    expected_velocity_correlation,
    global_displacement,
    langevin_rates,
    local_displacement,
    modified_loss,
    stationary_moments,
    velocity_correlation,
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
from metaopt.interpret.critical_points import CriticalPoints, critical_points
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
    "CriticalPoints",
    "FixedPoints",
    "HeadScores",
    "LangevinRates",
    "Linear",
    "Modes",
    "Moments",
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
    "critical_points",
    "diffusion_exponent",
    "embedded_cell",
    "examine",
    "expected_displacement",
    "expected_velocity_correlation",
    "fixed_points",
    "global_displacement",
    "gradient_histogram",
    "head_outputs",
    "head_scores",
    "implied_weights",
    "in_context_score",
    "interpolate",
    "langevin_rates",
    "learning_phase",
    "linear_cell",
    "linear_loss",
    "linearise",
    "local_displacement",
    "losses_between",
    "modes",
    "modified_loss",
    "optimum",
    "phase_change",
    "prefix_matching_score",
    "previous_token_score",
    "principal_components",
    "probe_layers",
    "record",
    "sensitivities",
    "separable_cell",
    "stationary_moments",
    "update_functions",
    "velocity_correlation",
]
