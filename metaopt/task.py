"""Task: a distribution over training problems."""

import abc
import dataclasses

import chex
import jax


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A distribution over training problems; a single problem is a constant one.

    Subclasses are frozen dataclasses with pure methods. One problem is an `instance`,
    a pytree of arrays drawn by `sample`; many problems run side by side as
    `jax.vmap` over instances. Datasets are loaded once by `load` and passed back in as
    `data`, never closed over: a captured array becomes a constant of the compiled
    program.
    """

    def load(self) -> chex.ArrayTree:
        """Returns the arrays every instance shares; runs once, on the host.

        Returns:
            A pytree of arrays that stays on the device, `()` if the task has no data.
        """
        return ()

    def sample(self, key: jax.Array) -> chex.ArrayTree:
        """Draws one problem instance: a pytree of arrays, `()` if there is only one."""
        del key
        return ()

    def batch(
        self,
        instance: chex.ArrayTree,
        data: chex.ArrayTree,
        key: jax.Array,
        *,
        split: str = "train",
    ) -> chex.ArrayTree:
        """Draws a minibatch of `split` ("train", "valid" or "test").

        Returns:
            A pytree of arrays, `()` for deterministic objectives.
        """
        del instance, data, key, split
        return ()

    @abc.abstractmethod
    def init(self, instance: chex.ArrayTree, key: jax.Array) -> chex.ArrayTree:
        """Draws initial parameters: a pytree of float arrays."""

    @abc.abstractmethod
    def loss(
        self,
        params: chex.ArrayTree,
        batch: chex.ArrayTree,
        instance: chex.ArrayTree,
        key: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss to minimise.

        Returns:
            The loss `[]`, and a dict of further scalars such as the accuracy.
        """
