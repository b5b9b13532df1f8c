"""Sequence models: what a black-box learner does with the tokens of an episode."""

import abc
import dataclasses

import chex
import jax


@dataclasses.dataclass(frozen=True)
class SequenceModel(abc.ABC):
    """A parametric map from tokens to outputs, one row for every token.

    Subclasses are frozen dataclasses with pure methods.
    """

    @abc.abstractmethod
    def init(self, key: jax.Array, tokens: jax.Array, outputs: int) -> chex.ArrayTree:
        """Draws parameters for tokens like these, `[length, width]`, or fewer.

        Args:
            key: randomness.
            tokens: as long as they will ever be.
            outputs: numbers per output.
        """

    @abc.abstractmethod
    def apply(
        self, params: chex.ArrayTree, tokens: jax.Array, *, causal: bool = True
    ) -> jax.Array:
        """Computes the outputs, `[length, outputs]` float32.

        Args:
            params: what `init` drew.
            tokens: `[length, width]`.
            causal: whether output `t` may depend on the tokens up to `t` only.

        Raises:
            ValueError: if there are more tokens than the model was initialised for, or
                if it has no other mode than the one asked for.
        """

    def apply_batch(
        self, params: chex.ArrayTree, tokens: jax.Array, *, causal: bool = True
    ) -> jax.Array:
        """Computes the outputs of a batch, `[batch, length, outputs]`; see `apply`.

        Args:
            params: what `init` drew.
            tokens: `[batch, length, width]`.
            causal: see `apply`.
        """
        return jax.vmap(lambda t: self.apply(params, t, causal=causal))(tokens)

    @abc.abstractmethod
    def state_size(self, length: int) -> int:
        """Returns how many numbers the model remembers of `length` tokens.

        That is what it would have to keep to go on with the next token: keys and values
        of a transformer, the state of a recurrent network.
        """
