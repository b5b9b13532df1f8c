"""The one entry to the diagnostics of learners in context holds and names them all."""

import importlib
import inspect

import pytest

import metaopt.interpret
from metaopt.interpret import in_context

PARTS = ("agreement", "attention_heads", "interpolation", "phases", "probes")


@pytest.mark.parametrize("part", PARTS)
def test_nothing_public_is_left_out(part):
    module = importlib.import_module(f"metaopt.interpret.{part}")
    public = {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
    }
    assert public
    for name, value in public.items():
        assert name in in_context.__all__
        # The same object everywhere, so that old imports go on to work.
        assert getattr(in_context, name) is value
        assert getattr(metaopt.interpret, name) is value


def test_every_diagnostic_is_named_with_its_paper():
    text = inspect.getdoc(in_context) or ""
    entries = [" ".join(e.split()) for e in text.split("\n- ")[1:]]
    named = [name for name in in_context.__all__ if callable(getattr(in_context, name))]
    for name in named:
        if inspect.isclass(getattr(in_context, name)) and name != "Probe":
            continue
        (entry,) = (e for e in entries if f"`{name}`" in e)
        assert "et al" in entry
