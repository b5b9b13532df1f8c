"""Permuted images: the same classes, the pixels of every task in another order."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.task import Task
from tasks import data as datasets
from tasks.classification import cross_entropy
from tasks.images import ACTIVATIONS, ImageTask


@dataclasses.dataclass(frozen=True)
class PermutedImages(ImageTask):
    """Classifies images whose pixels are shuffled, by one permutation per instance.

    A multi-layer perceptron finds every instance as hard as the next, and none helps
    with another; learned one after the other they measure forgetting. Goodfellow et
    al., 2013, https://arxiv.org/abs/1312.6211; Zenke et al., 2017,
    https://arxiv.org/abs/1703.04200.

    Attributes:
        widths: hidden layer sizes.
        activation: a name of `ACTIVATIONS`.

    >>> task = PermutedImages(widths=(8,))
    >>> task.sample(jax.random.key(0)).shape
    (64,)
    """

    widths: tuple[int, ...] = (32,)
    activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        validate.integers("widths", self.widths)
        validate.one_of("activation", self.activation, ACTIVATIONS)

    @functools.cached_property
    def _net(self):
        activation = getattr(jax.nn, self.activation)
        classes = datasets.num_classes(self.dataset)

        def mlp(x, y):
            net = hk.nets.MLP((*self.widths, classes), activation=activation)
            return cross_entropy(net(x.reshape(len(x), -1)), y)

        return hk.transform(mlp)

    def sample(self, key):
        height, width, channels = self.shape
        return jax.random.permutation(key, height * width * channels)

    def batch(self, instance, data, key, *, split="train"):
        x, y = super().batch(instance, data, key, split=split)
        shuffled = x.reshape(len(x), -1)[:, instance]
        return shuffled.reshape(x.shape), y


def accuracies(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    num_tasks: int,
    num_steps: int,
    data: object = None,
    split: str = "test",
    eval_batches: int = 8,
) -> jax.Array:
    """Trains one network on instance after instance and tests it on all of them.

    The state of `tx` is kept from one instance to the next; in the first step of every
    instance but the first, `update` is told `new_task=True`. The whole sequence is one
    compiled program, and may be mapped over `key`.

    Args:
        task: has the metric "accuracy".
        tx: any optax transformation, such as
            `metaopt.baselines.synaptic_intelligence(optax.adam(1e-3))`.
        key: randomness of instances, parameters and batches; equal keys give equal
            ones whatever `tx` is.
        num_tasks: instances, learned one after the other.
        num_steps: steps on each.
        data: device arrays, by default what `task.load()` returns.
        split: "train", "valid" or "test", the data of the accuracies.
        eval_batches: batches of it that are averaged.

    Returns:
        Accuracy on instance `j` after learning instance `i`, `[num_tasks, num_tasks]`.
    """
    validate.integer("num_tasks", num_tasks)
    validate.integer("num_steps", num_steps)
    validate.one_of("split", split, datasets.Splits._fields)
    data = task.load() if data is None else data
    return _accuracies(task, tx, data, key, num_tasks, num_steps, split, eval_batches)


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5, 6, 7))
def _accuracies(task, tx, data, key, num_tasks, num_steps, split, eval_batches):
    tx = optax.with_extra_args_support(tx)
    instance_key, params_key, train_key, eval_key = jax.random.split(key, 4)
    instances = jax.vmap(task.sample)(jax.random.split(instance_key, num_tasks))
    take = lambda i: jax.tree.map(lambda x: x[i], instances)
    params = task.init(take(0), params_key)

    def step(carry, inputs):
        params, state = carry
        i, first, key = inputs
        instance = take(i)
        batch_key, loss_key = jax.random.split(key)
        batch = task.batch(instance, data, batch_key)
        value_fn = lambda p: task.loss(p, batch, instance, loss_key)[0]
        value, grads = jax.value_and_grad(value_fn)(params)
        new_task = first & (i > 0)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=value_fn, new_task=new_task
        )
        return (optax.apply_updates(params, updates), state), None

    def accuracy(params, instance):
        def one(key):
            batch_key, loss_key = jax.random.split(key)
            batch = task.batch(instance, data, batch_key, split=split)
            return task.loss(params, batch, instance, loss_key)[1]["accuracy"]

        return jnp.mean(jax.lax.map(one, jax.random.split(eval_key, eval_batches)))

    def learn(carry, i):
        keys = jax.random.split(jax.random.fold_in(train_key, i), num_steps)
        first = jnp.arange(num_steps) == 0
        number = jnp.full((num_steps,), i)
        carry, _ = jax.lax.scan(step, carry, (number, first, keys))
        test = lambda instance: accuracy(carry[0], instance)
        return carry, jax.lax.map(test, instances)

    return jax.lax.scan(learn, (params, tx.init(params)), jnp.arange(num_tasks))[1]
