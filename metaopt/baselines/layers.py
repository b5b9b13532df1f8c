"""Finds the dense and convolutional layers of a loss, and taps them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from metaopt import validate
from metaopt.baselines import programs
from metaopt.baselines.programs import Constant, Flat, Step

DISTRIBUTIONS = ("bernoulli", "categorical", "normal")
_PREFIX = "predicts "


def predicts(outputs: jax.Array, distribution: str) -> jax.Array:
    """Returns `outputs` unchanged, marked as what parametrises the prediction.

    Curvature of the Fisher kind needs to know where a network ends and its loss begins.

    Args:
        outputs: what parametrises the distributions of the targets, `[N, ..., K]`:
            logits of independent bits for "bernoulli", logits of a softmax over the
            last axis for "categorical", means of variance 1 for "normal".
        distribution: one of these. The loss should be, up to a constant factor, the
            mean over `N` of the negative log-likelihoods.

    >>> predicts(jnp.ones(2), "normal").tolist()
    [1.0, 1.0]
    """
    validate.one_of("distribution", distribution, DISTRIBUTIONS)
    return checkpoint_name(outputs, _PREFIX + distribution)


class Layer(NamedTuple):
    """A linear map whose weight is a parameter that nothing else uses.

    Attributes:
        step: position of its equation in the flat program.
        weight: position of the weight among the leaves of the parameters.
        bias: position of the bias that is added to its output, None without one.
    """

    step: int
    weight: int
    bias: int | None


class Tapped(NamedTuple):
    """A loss taken apart.

    Attributes:
        flat: its program; the arguments are the leaves of the parameters.
        layers: what was found.
        outputs: slot of the marked prediction, None without one.
        distribution: of the prediction, "" without one.
    """

    flat: Flat
    layers: tuple[Layer, ...]
    outputs: int | None
    distribution: str


def tap(value_fn: Callable[[Any], jax.Array], params: chex.ArrayTree) -> Tapped:
    """Finds the layers of `value_fn`.

    A layer is `x @ w` or a convolution without groups, with `w` a parameter that occurs
    once and has its outputs on the last axis, and with or without a bias that occurs
    once. What is inside a loop is not looked at.

    >>> w = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "scale": jnp.ones(())}
    >>> loss = lambda p: jnp.sum(p["scale"] * (jnp.ones((4, 3)) @ p["w"] + p["b"]))
    >>> [(layer.weight, layer.bias) for layer in tap(loss, w).layers]
    [(2, 0)]
    """
    leaves, treedef = jax.tree.flatten(params)
    function = lambda *leaves: value_fn(treedef.unflatten(leaves))
    flat = programs.inline(jax.make_jaxpr(function)(*leaves))
    uses = [x for step in flat.steps for x in step.inputs if type(x) is int]
    layers, outputs, distribution = [], None, ""
    biases = _biases(flat, uses)
    for i, step in enumerate(flat.steps):
        name = str(step.equation.params.get("name"))
        if step.equation.primitive.name == "name" and name.startswith(_PREFIX):
            outputs, distribution = step.outputs[0], name.removeprefix(_PREFIX)
        weight = _weight(step, flat.num_inputs)
        if weight is not None and uses.count(weight) == 1:
            alone = uses.count(step.outputs[0]) == 1
            bias = biases.get(step.outputs[0]) if alone else None
            layers.append(Layer(i, weight, bias))
    return Tapped(flat, tuple(layers), outputs, distribution)


def _weight(step: Step, num_params: int) -> int | None:
    """Returns the parameter that a linear map multiplies by, None if it is none."""
    equation = step.equation
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return None
    x, w = step.inputs
    if type(w) is not int or w >= num_params or x == w:
        return None
    if equation.primitive.name == "dot_general":
        last = _type(equation.invars[0]).ndim - 1
        plain = equation.params["dimension_numbers"] == (((last,), (0,)), ((), ()))
        return w if plain and _type(equation.invars[1]).ndim == 2 else None
    p = equation.params
    outputs = p["dimension_numbers"].rhs_spec[0]
    whole = p["feature_group_count"] == p["batch_group_count"] == 1
    return w if whole and outputs == _type(equation.invars[1]).ndim - 1 else None


def _type(variable: Any) -> Any:
    """Returns the shape and dtype of a variable of a program."""
    return variable.aval


def _biases(flat: Flat, uses: list[int]) -> dict[int, int]:
    """Returns the bias that is added to a slot, by slot."""
    spread: dict[int, tuple[int, int]] = {}
    found: dict[int, int] = {}
    for step in flat.steps:
        name, inputs = step.equation.primitive.name, step.inputs
        if name in ("broadcast_in_dim", "reshape") and type(inputs[0]) is int:
            b, shape = inputs[0], _type(step.equation.outvars[0]).shape
            vector = _type(step.equation.invars[0]).ndim == 1
            last = _type(step.equation.invars[0]).size == (shape or (0,))[-1]
            ones = all(d == 1 for d in shape[:-1])
            dims = step.equation.params.get("broadcast_dimensions")
            straight = ones if dims is None else dims == (len(shape) - 1,)
            parameter = b < flat.num_inputs and uses.count(b) == 1
            if parameter and vector and last and straight:
                spread[step.outputs[0]] = (b, uses.count(step.outputs[0]))
            elif b in spread:
                spread[step.outputs[0]] = spread[b]
        if name == "add" and all(type(x) is int for x in inputs):
            for y, b in (inputs, inputs[::-1]):
                if b in spread and spread[b][1] == 1:
                    found[y] = spread[b][0]
    return found


def replay(
    tapped: Tapped,
    leaves: list[jax.Array],
    nudges: list[jax.Array],
) -> tuple[tuple[jax.Array, Any], list[jax.Array]]:
    """Evaluates the loss with something added to the output of every layer.

    Args:
        tapped: what `tap` returned.
        leaves: the leaves of the parameters.
        nudges: what to add, like the outputs of the layers; `nudges_like` gives zeros.

    Returns:
        The loss and the marked prediction, `()` without one; and the input of every
        layer.
    """
    place: dict[int, Any] = dict(enumerate(leaves))
    find = lambda x: x.value if isinstance(x, Constant) else place[x]
    position = {layer.step: i for i, layer in enumerate(tapped.layers)}
    inputs: list[Any] = [None] * len(tapped.layers)
    for i, step in enumerate(tapped.flat.steps):
        values = [find(x) for x in step.inputs]
        outputs = programs.evaluate(step.equation, values)
        if i in position:
            inputs[position[i]] = values[0]
            outputs = [outputs[0] + nudges[position[i]]]
        place.update(zip(step.outputs, outputs, strict=True))
    prediction = () if tapped.outputs is None else place[tapped.outputs]
    return (find(tapped.flat.results[0]), prediction), inputs


def nudges_like(tapped: Tapped) -> list[jax.Array]:
    """Returns zeros with the shapes of the outputs of all layers."""
    steps = [tapped.flat.steps[layer.step] for layer in tapped.layers]
    outputs = [_type(step.equation.outvars[0]) for step in steps]
    return [jnp.zeros(x.shape, x.dtype) for x in outputs]


def rows(tapped: Tapped, layer: Layer, x: jax.Array, g: jax.Array):
    """Brings a layer into the form of one matrix product.

    Args:
        tapped: what `tap` returned.
        layer: one of its layers.
        x: its input.
        g: a gradient with respect to its output.

    Returns:
        Inputs `[N, T, i]` and gradients `[N, T, o]`, with `N` examples and `T` places
        where the weight is used in each; for a convolution the inputs are patches in
        the order of the weight's axes but the last.
    """
    equation = tapped.flat.steps[layer.step].equation
    if equation.primitive.name == "conv_general_dilated":
        p = equation.params
        numbers, weight = p["dimension_numbers"], _type(equation.invars[1])
        spatial = [weight.shape[d] for d in numbers.rhs_spec[2:]]
        x = jax.lax.conv_general_dilated_patches(
            x,
            spatial,
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=numbers,
        )
        batch, features, *places = numbers.out_spec
        x, g = (jnp.transpose(a, (batch, *places, features)) for a in (x, g))
        # Patches count the input channel first; the weight has its own order.
        inner = (x.shape[-1] // _product(spatial), *spatial)
        order = [numbers.rhs_spec[1], *numbers.rhs_spec[2:]]
        lead = x.ndim - 1
        x = x.reshape(*x.shape[:-1], *inner)
        axes = [lead + order.index(d) for d in range(len(order))]
        x = jnp.transpose(x, (*range(lead), *axes))
        x = x.reshape(*x.shape[:lead], -1)
    if x.ndim == 1:
        x, g = x[None], g[None]
    flat = lambda a: a.reshape(a.shape[0], -1, a.shape[-1]).astype(jnp.float32)
    return flat(x), flat(g)


def _product(numbers):
    total = 1
    for n in numbers:
        total *= n
    return total
