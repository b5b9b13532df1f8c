"""ConformanceError: how a conformance check names what a component does wrong."""

from typing import Any


class ConformanceError(AssertionError):
    """A component breaks the contract of its base class or protocol."""


def require(condition: Any, component: Any, complaint: str) -> None:
    """Raises `ConformanceError` with the component's repr unless `condition` holds."""
    if not condition:
        raise ConformanceError(f"{component!r}: {complaint}")
