"""The stability suite: know whether an optimizer can be trusted before a long run."""

from metaopt.stability.coverage import (
    Coverage,
    fit_coverage,
    generic_features,
    load_coverage,
    save_coverage,
)
from metaopt.stability.guard_state import guard_report
from metaopt.stability.observer import observe, observed_features
from metaopt.stability.online_guard import guard
from metaopt.stability.report import write_report
from metaopt.stability.results import Report
from metaopt.stability.suite import run_suite

__all__ = [
    "Coverage",
    "Report",
    "fit_coverage",
    "generic_features",
    "guard",
    "guard_report",
    "load_coverage",
    "observe",
    "observed_features",
    "run_suite",
    "save_coverage",
    "write_report",
]
