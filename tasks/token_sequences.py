"""Sequences of tokens that can be continued only with the help of their beginning."""

import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.next_token import TokenSource


@dataclasses.dataclass(frozen=True)
class RepeatedBlocks(TokenSource):
    """A block of random tokens, repeated to the end of the sequence.

    Tokens are uniform and independent, the block's length is uniform, and both are
    drawn anew for every sequence: the first block is pure chance, what follows can be
    copied. So induction heads are made to form (Olsson et al., 2022,
    https://arxiv.org/abs/2209.11895).

    Attributes:
        vocabulary: number of different tokens.
        length: tokens of a sequence.
        shortest: length of the shortest block.
        longest: length of the longest block.

    >>> source = RepeatedBlocks(length=9, shortest=3, longest=3)
    >>> blocks = source.draw((), jax.random.key(0)).reshape(3, 3)
    >>> bool(jnp.all(blocks == blocks[0]))
    True
    """

    vocabulary: int = 64
    length: int = 48
    shortest: int = 8
    longest: int = 24

    def __post_init__(self):
        validate.integer("vocabulary", self.vocabulary, minimum=2)
        validate.integer("length", self.length, minimum=2)
        validate.integer("shortest", self.shortest)
        validate.integer("longest", self.longest, minimum=self.shortest)

    def draw(self, data, key):
        block_key, period_key = jax.random.split(key)
        block = jax.random.randint(block_key, (self.longest,), 0, self.vocabulary)
        period = jax.random.randint(period_key, (), self.shortest, self.longest + 1)
        return block[jnp.arange(self.length) % period]


@dataclasses.dataclass(frozen=True)
class MarkovChains(TokenSource):
    """A Markov chain with random transitions, drawn anew for every sequence.

    Every row of the transition matrix is uniform over the distributions, the first
    token over the states. Edelman et al., 2024, https://arxiv.org/abs/2402.11004.

    Attributes:
        states: number of states, which are the tokens.
        length: tokens of a sequence.

    >>> tokens = MarkovChains(states=3, length=10).draw((), jax.random.key(0))
    >>> tokens.shape, bool(jnp.all(tokens < 3))
    ((10,), True)
    """

    states: int = 3
    length: int = 100

    def __post_init__(self):
        validate.integer("states", self.states, minimum=2)
        validate.integer("length", self.length, minimum=2)

    @property
    def vocabulary(self):
        return self.states

    def draw(self, data, key):
        matrix_key, first_key, rest_key = jax.random.split(key, 3)
        rows = jax.random.dirichlet(
            matrix_key, jnp.ones(self.states), shape=(self.states,)
        )

        def follow(token, key):
            return jax.random.categorical(key, jnp.log(rows[token])), token

        first = jax.random.randint(first_key, (), 0, self.states)
        _, tokens = jax.lax.scan(follow, first, jax.random.split(rest_key, self.length))
        return tokens
