import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaopt import registry
from metaopt.estimators import PES, Mixture
from metaopt.learner import LogUniform, TrainTask
from metaopt.optimizers import Fixed, Hyper
from metaopt.testing import Quadratic


@dataclasses.dataclass(frozen=True)
class Leaf:
    number: float
    name: str = "x"
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Node:
    values: tuple
    child: object = None


CLASSES = {"Leaf": Leaf, "Node": Node}

leaves = st.builds(
    Leaf,
    number=st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    name=st.text(),
    flag=st.booleans(),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
values = st.recursive(
    plain | st.text() | leaves,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.builds(Node, values=st.lists(inner, max_size=3).map(tuple), child=inner)
    ),
    max_leaves=8,
)


@given(values)
def test_every_component_survives_json(value):
    component = Node((value,), value)
    text = json.dumps(registry.to_config(component))
    assert repr(registry.from_config(json.loads(text), CLASSES)) == repr(component)


def test_a_whole_experiment_survives_json():
    learner = TrainTask(Quadratic(dim=3), Hyper("adam"), horizon=LogUniform(4, 40))
    mixture = Mixture(
        (PES(learner, window=2), PES(learner, window=4, std=0.5)), (1.0, 3.0)
    )
    classes = registry.COMPONENTS | {"Quadratic": Quadratic}
    text = json.dumps(registry.to_config(mixture))
    again = registry.from_config(json.loads(text), classes)
    assert again == mixture
    assert hash(again) == hash(mixture)


def test_every_name_is_that_of_its_class():
    assert all(name == cls.__name__ for name, cls in registry.COMPONENTS.items())


def test_fields_that_json_cannot_hold_are_all_named():
    rule = Node(([1],), Leaf({"a": 1}, name=len))
    with pytest.raises(TypeError) as caught:
        registry.to_config(rule)
    for where in ("Node.values[0] is a list", "Node.child.number", "Node.child.name"):
        assert where in str(caught.value)


@pytest.mark.parametrize("component", [Leaf, 3, None, {"type": "Leaf"}])
def test_only_instances_have_a_config(component):
    with pytest.raises(TypeError, match="component must be a dataclass instance"):
        registry.to_config(component)


def test_an_unknown_class_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"config\['type'\].*Did you mean 'Fixed'"):
        registry.from_config({"type": "Fixd"}, registry.OPTIMIZERS)


@pytest.mark.parametrize("config", [{}, {"type": None}, {"type": ["Leaf"]}])
def test_a_config_without_a_class_is_refused(config):
    with pytest.raises(ValueError, match=r"config\['type'\] must be one of"):
        registry.from_config(config, CLASSES)


@pytest.mark.parametrize("config", [None, "Leaf", [1], 3.0])
def test_a_config_must_be_a_dict(config):
    with pytest.raises(TypeError, match="config must be a dict"):
        registry.from_config(config, CLASSES)


def test_all_unknown_and_missing_fields_are_listed():
    config = {"type": "Node", "child": {"type": "Leaf", "nam": "a", "size": 1}}
    with pytest.raises(ValueError) as caught:
        registry.from_config(config | {"values": []}, CLASSES)
    message = str(caught.value)
    assert "config.child: fields of Leaf" in message
    for part in ("unknown 'nam' Did you mean 'name'?", "unknown 'size'"):
        assert part in message
    assert "missing 'number'" in message
    assert "missing 'name'" not in message


def test_the_checks_of_a_class_say_where_it_stands():
    config = registry.to_config(Fixed("sgd", (("learning_rate", 0.1),)))
    with pytest.raises(ValueError, match="config: Fixed: name must be"):
        registry.from_config({**config, "name": "sdg"}, registry.OPTIMIZERS)
