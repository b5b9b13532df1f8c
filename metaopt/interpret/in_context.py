"""Diagnostics of learners in context: what they compute, where, and since when.

Which algorithm a predictor computes:

- `agreement`: squared differences of predictions (SPD, and MSPD by `Agreement.mspd`)
  and of implied linear weights (ILWD), and linearity in the question (Akyurek et al.,
  2023, sections 4.1 and F); differences of predictions, sensitivity cosine and model
  difference (von Oswald et al., 2023, section 3).
- `implied_weights`: linear weights behind the answers (Akyurek et al., section 4.1).
- `sensitivities`: gradients of the answers in the question (von Oswald et al., section
  3).
- `interpolate`, `losses_between`: whether trained and written weights lie in one
  minimum (von Oswald et al., section 3).

Where it is in a transformer:

- `probe_layers`: what a linear `Probe` or a network reads from each layer, moments and
  weights for example (Akyurek et al., section 4.3 and appendix D).
- `previous_token_score`, `prefix_matching_score`: where a head looks; `head_scores`:
  both, for all heads (Olsson et al., 2022).
- `copying_scores`: whether a head raises what it looks at (Elhage et al., 2021; Olsson
  et al., 2022).
- `head_outputs`, `ablate_head`: what a head adds, and the model without it (Olsson et
  al., 2022).

How far meta-training got:

- `in_context_score`: late minus early loss of a context (Olsson et al., 2022).
- `phase_change`: when a loss falls fastest (Olsson et al., 2022).
- `learning_phase`: one of `PHASES`, from failing and memorising to learning in general
  (Kirsch et al., 2022).

References:
    Akyurek et al., 2023, https://arxiv.org/abs/2211.15661; Elhage et al., 2021,
    https://transformer-circuits.pub/2021/framework; Kirsch et al., 2022,
    https://arxiv.org/abs/2212.04458; Olsson et al., 2022,
    https://arxiv.org/abs/2209.11895; von Oswald et al., 2023,
    https://arxiv.org/abs/2212.07677
"""

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
from metaopt.interpret.interpolation import interpolate, losses_between
from metaopt.interpret.phases import (
    PHASES,
    PhaseChange,
    in_context_score,
    learning_phase,
    phase_change,
)
from metaopt.interpret.probes import Probe, ProbeResult, probe_layers

__all__ = [
    "PHASES",
    "Agreement",
    "HeadScores",
    "PhaseChange",
    "Probe",
    "ProbeResult",
    "ablate_head",
    "agreement",
    "copying_scores",
    "head_outputs",
    "head_scores",
    "implied_weights",
    "in_context_score",
    "interpolate",
    "learning_phase",
    "losses_between",
    "phase_change",
    "prefix_matching_score",
    "previous_token_score",
    "probe_layers",
    "sensitivities",
]
