"""Language models that read a text character by character."""

import abc
import dataclasses
import functools
import math

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task
from tasks.classification import cross_entropy
from tasks.recurrent_cells import CELLS
from tasks.text import CORPORA, load
from tasks.transformer import check_transformer, transformer


@dataclasses.dataclass(frozen=True)
class LanguageTask(Task):
    """Predicts each character of a text from those before it in a window.

    A batch is windows at random positions, `[batch_size, length + 1]` int32. The loss
    is in nats per character; metrics are "accuracy" and "bits_per_character". Where
    `CORPORA[corpus].entropy` is known it is a lower bound of the expected loss; the
    first characters of a window cost more, for want of what came before.

    Attributes:
        corpus: a key of `tasks.text.CORPORA`.
        length: characters predicted per window.
        batch_size: windows per step.
    """

    corpus: str = "markov"
    length: int = dataclasses.field(default=32, kw_only=True)
    batch_size: int = dataclasses.field(default=16, kw_only=True)

    def __post_init__(self):
        validate.one_of("corpus", self.corpus, CORPORA)
        validate.integer("length", self.length)
        validate.integer("batch_size", self.batch_size)
        if self.length > 10_000:
            raise ValueError(f"length must be at most 10000, got length={self.length}.")

    @property
    @abc.abstractmethod
    def _net(self) -> hk.Transformed:
        """From characters `[N, T]` to logits of the next ones, `[N, T, alphabet]`."""

    def load(self):
        return jax.tree.map(jnp.asarray, load(self.corpus))

    def batch(self, instance, data, key, *, split="train"):
        text = getattr(data, split)
        starts = jax.random.randint(
            key, (self.batch_size, 1), 0, len(text) - self.length
        )
        index = starts + jnp.arange(self.length + 1)
        return text.at[index].get(mode="promise_in_bounds").astype(jnp.int32)

    def init(self, instance, key):
        return self._net.init(key, jnp.zeros((1, self.length), jnp.int32))

    def loss(self, params, batch, instance, key):
        logits = self._net.apply(params, batch[:, :-1])
        flat = logits.reshape(-1, logits.shape[-1])
        loss, metrics = cross_entropy(flat, batch[:, 1:].reshape(-1))
        return loss, metrics | {"bits_per_character": loss / math.log(2.0)}


@dataclasses.dataclass(frozen=True)
class LanguageRecurrent(LanguageTask):
    """Models a text with a recurrent network, whose state starts at 0 in every window.

    Attributes:
        width: size of the hidden state.
        cell: "lstm", "gru" or "vanilla".

    >>> task = LanguageRecurrent("brackets", width=8)
    >>> batch = task.batch((), task.load(), jax.random.key(0))
    >>> params = task.init((), jax.random.key(1))
    >>> batch.shape, round(float(task.loss(params, batch, (), jax.random.key(2))[0]))
    ((16, 33), 2)
    """

    width: int = 64
    cell: str = "lstm"

    def __post_init__(self):
        super().__post_init__()
        validate.integer("width", self.width)
        validate.one_of("cell", self.cell, CELLS)

    @functools.cached_property
    def _net(self):
        characters = len(CORPORA[self.corpus].alphabet)

        def predict(x):
            core = CELLS[self.cell](self.width)
            inputs = jax.nn.one_hot(x.T, characters)
            start = core.initial_state(len(x))
            outputs, _ = hk.dynamic_unroll(core, inputs, start)
            return hk.Linear(characters)(outputs).swapaxes(0, 1)

        return hk.without_apply_rng(hk.transform(predict))


@dataclasses.dataclass(frozen=True)
class LanguageTransformer(LanguageTask):
    """Models a text with a causal transformer (`tasks.transformer`).

    Attributes:
        width: size of a token, a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.

    >>> task = LanguageTransformer("arithmetic", width=8, depth=1)
    >>> params = task.init((), jax.random.key(0))
    >>> params["~"]["positions"].shape
    (32, 8)
    """

    width: int = 32
    depth: int = 2
    heads: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_transformer(self.width, self.depth, self.heads)

    @functools.cached_property
    def _net(self):
        characters = len(CORPORA[self.corpus].alphabet)

        def predict(x):
            tokens = hk.Linear(self.width)(jax.nn.one_hot(x, characters))
            mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1])))
            tokens = transformer(tokens, depth=self.depth, heads=self.heads, mask=mask)
            return hk.Linear(characters)(tokens)

        return hk.without_apply_rng(hk.transform(predict))
