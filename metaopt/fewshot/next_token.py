"""NextToken: a sequence model that learns to continue sequences of tokens."""

import abc
import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.fewshot.accumulation import block_size, mean_in_blocks
from metaopt.fewshot.sequence_model import SequenceModel
from metaopt.learner import StepOut


@dataclasses.dataclass(frozen=True)
class TokenSource(abc.ABC):
    """A distribution over sequences of tokens.

    Subclasses are frozen dataclasses with pure methods.

    >>> class Same(TokenSource):
    ...     vocabulary, length = 5, 3
    ...
    ...     def draw(self, data, key):
    ...         return jnp.full(3, jax.random.randint(key, (), 0, 5))
    >>> Same().draw((), jax.random.key(0)).shape
    (3,)
    """

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Number of different tokens."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens of a sequence."""

    def load(self) -> chex.ArrayTree:
        """Returns the arrays every sequence shares; runs once, on the host."""
        return ()

    @abc.abstractmethod
    def draw(self, data: chex.ArrayTree, key: jax.Array) -> jax.Array:
        """Draws one sequence, `[length]` int32 below `vocabulary`."""


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The learner of a sequence model: each token is predicted from those before it.

    An episode of one step is a batch of sequences; the meta-loss is the mean
    cross-entropy, in nats, over all tokens but the first.

    Attributes:
        source: where the sequences come from.
        model: reads the tokens, one-hot.
        batch_size: sequences of a step.
        block: sequences whose activations are kept at a time, a divisor of
            `batch_size`; see `InContext`.
    """

    source: TokenSource
    model: SequenceModel
    batch_size: int = 64
    block: int | None = None

    def __post_init__(self):
        validate.instance("source", self.source, TokenSource, "RepeatedBlocks()")
        validate.instance("model", self.model, SequenceModel, "Transformer()")
        validate.integer("batch_size", self.batch_size)
        if self.block is not None:
            block_size(self.batch_size, self.block)

    @property
    def horizon(self) -> int:
        """Inner steps of an episode: one."""
        return 1

    def load(self):
        """Returns the source's data."""
        return self.source.load()

    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws initial parameters of the model."""
        size = self.source.vocabulary
        return self.model.init(key, jnp.zeros((self.source.length - 1, size)), size)

    def reset(self, theta, data, key, *, length):
        """Draws the sequences, `[batch, length]`; see `Learner`."""
        del theta, length
        keys = jax.random.split(key, self.batch_size)
        return jax.vmap(self.source.draw, in_axes=(None, 0))(data, keys)

    def step(self, theta, state, data, key):
        """Predicts; see `Learner`."""
        del data, key
        mean = lambda theta, tokens, _: jnp.mean(self.losses(theta, tokens))
        loss = mean_in_blocks(mean, theta, state, block=self.block)
        return state, StepOut(loss, jnp.float32(1.0))

    def losses(self, theta: chex.ArrayTree, tokens: jax.Array) -> jax.Array:
        """Returns the cross-entropy of every token but the first, `[batch, n - 1]`."""
        logits = self.model.apply_batch(theta, self.encode(tokens[:, :-1]))
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        )

    def predict(self, theta: chex.ArrayTree, tokens: jax.Array) -> jax.Array:
        """Returns the logits of what follows each of `tokens` `[n]`, `[n, vocabulary]`.

        Column `t` of row `i` is the logit of `t` after the tokens up to `i`.
        """
        return self.model.apply(theta, self.encode(tokens))

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Writes tokens `[n]` one-hot, as the model reads them, `[n, vocabulary]`."""
        return jax.nn.one_hot(tokens, self.source.vocabulary)
