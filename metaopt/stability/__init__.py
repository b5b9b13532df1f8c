"""The stability suite: know whether an optimizer can be trusted before a long run."""

from metaopt.stability.guard_state import guard_report
from metaopt.stability.online_guard import guard
from metaopt.stability.report import write_report
from metaopt.stability.results import Report
from metaopt.stability.suite import run_suite

__all__ = ["Report", "guard", "guard_report", "run_suite", "write_report"]
