"""Motion reconstruction in the plane: control that makes a chain follow a track."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.task import Task

# Joints have mass 1, links have length 1 and no mass; with 1 kg and 1 m, SI units.
GRAVITY = 9.81
STIFFNESS, DAMPING = 100.0, 5.0  # of the joints
GROUND_STIFFNESS, GROUND_DAMPING, FRICTION = 5000.0, 50.0, 50.0
GROUND_SOFTNESS = 0.01  # height over which contact sets in


class ChainState(NamedTuple):
    """Position and velocity of a chain of `n` links and `n + 1` joints.

    Attributes:
        base: position of the first joint, `[2]`.
        angles: direction of each link against the horizontal, `[n]`.
        base_velocity: `[2]`.
        spins: angular velocity of each link, `[n]`.
    """

    base: jax.Array
    angles: jax.Array
    base_velocity: jax.Array
    spins: jax.Array


def _directions(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the unit vectors along the links and across them, each `[n, 2]`."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([cos, sin], axis=-1), jnp.stack([-sin, cos], axis=-1)


def _along(base: jax.Array, links: jax.Array) -> jax.Array:
    """Adds up what each link contributes, from the first joint on: `[n + 1, 2]`."""
    return jnp.concatenate([base[None], base + jnp.cumsum(links, axis=0)])


def joints(state: ChainState) -> jax.Array:
    """Computes the positions of all joints, `[n + 1, 2]`."""
    return _along(state.base, _directions(state.angles)[0])


def joint_velocities(state: ChainState) -> jax.Array:
    """Computes the velocities of all joints, `[n + 1, 2]`."""
    across = _directions(state.angles)[1]
    return _along(state.base_velocity, state.spins[:, None] * across)


def contact(state: ChainState) -> jax.Array:
    """Computes the force of the ground, the line `y = 0`, on each joint, `[n + 1, 2]`.

    A spring that sets in smoothly, and damping in both directions while in contact.
    """
    height = joints(state)[:, 1] / GROUND_SOFTNESS
    touch = jax.nn.sigmoid(-height)
    push = GROUND_STIFFNESS * GROUND_SOFTNESS * jax.nn.softplus(-height)
    velocity = joint_velocities(state)
    return jnp.stack(
        [
            -FRICTION * touch * velocity[:, 0],
            push - GROUND_DAMPING * touch * velocity[:, 1],
        ],
        axis=-1,
    )


def accelerations(
    state: ChainState, torques: jax.Array, forces: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Solves the equations of motion of a chain of point masses on rigid links.

    The tensions that keep all lengths at 1 solve a tridiagonal system, so the cost is
    linear in the number of links.

    Args:
        state: positions and velocities.
        torques: at the inner joints, on the next link and against the one before,
            `[n - 1]`.
        forces: on each joint, gravity included, `[n + 1, 2]`.

    Returns:
        The acceleration of the base `[2]` and the angular ones of the links `[n]`.
    """
    along, across = _directions(state.angles)
    # A torque on a link of length 1 is a pair of opposite forces on its two ends.
    zero = jnp.zeros(1)
    couple = jnp.concatenate([zero, torques]) - jnp.concatenate([torques, zero])
    pull = couple[:, None] * across
    forces = forces.at[1:].add(pull).at[:-1].add(-pull)
    relative = forces[1:] - forces[:-1]
    cosines = jnp.sum(along[1:] * along[:-1], axis=-1)
    tensions = jax.lax.linalg.tridiagonal_solve(
        jnp.concatenate([zero, -cosines]),
        jnp.full_like(state.spins, 2.0),
        jnp.concatenate([-cosines, zero]),
        (state.spins**2 + jnp.sum(along * relative, axis=-1))[:, None],
    )
    tensions = tensions * along
    forces = forces.at[:-1].add(tensions).at[1:].add(-tensions)
    spin_rates = jnp.sum(across * (forces[1:] - forces[:-1]), axis=-1)
    return forces[0], spin_rates


def euler_step(
    state: ChainState, torques: jax.Array, forces: jax.Array, dt: float
) -> ChainState:
    """Takes one semi-implicit Euler step: positions move with the new velocities."""
    base_rate, spin_rates = accelerations(state, torques, forces)
    base_velocity = state.base_velocity + dt * base_rate
    spins = state.spins + dt * spin_rates
    return ChainState(
        state.base + dt * base_velocity,
        state.angles + dt * spins,
        base_velocity,
        spins,
    )


def simulate(start: ChainState, targets: jax.Array, dt: float) -> jax.Array:
    """Simulates a chain whose joints are driven towards target angles.

    Args:
        start: the state at time 0.
        targets: angle between neighbouring links that the joint's spring pulls to, for
            each time step, `[steps, n - 1]`.
        dt: time step.

    Returns:
        Joint positions after each step, `[steps, n + 1, 2]`.
    """
    weight = jnp.array([0.0, -GRAVITY])

    def step(state, target):
        bend, bend_rate = jnp.diff(state.angles), jnp.diff(state.spins)
        torques = STIFFNESS * (target - bend) - DAMPING * bend_rate
        state = euler_step(state, torques, contact(state) + weight, dt)
        return state, joints(state)

    return jax.lax.scan(step, start, targets)[1]


class Recording(NamedTuple):
    """A motion to reconstruct.

    Attributes:
        start: the chain at time 0, at rest, `n` links.
        knots: the hidden control that made the motion, `[knots, n - 1]`.
        joints: true joint positions in each frame, `[frames, n + 1, 2]`.
        track: the same with noise; what the loss compares with.
    """

    start: ChainState
    knots: jax.Array
    joints: jax.Array
    track: jax.Array


@dataclasses.dataclass(frozen=True)
class Motion(Task):
    """Finds the joint control that makes a simulated chain follow a noisy 2-D track.

    A planar stand-in, without body model or video, for reconstructing human motion by
    optimising through a physics simulation (Gartner et al., 2022,
    https://arxiv.org/abs/2205.12256). A chain of rigid links falls on soft ground and
    moves by springs and dampers at its inner joints. The parameters are knots in time,
    `[knots, links - 1]`, of the springs' target angles relative to the first pose,
    interpolated linearly and bent softly to at most pi either way. The track comes from
    hidden knots, normal with deviation `strength`.

    The loss is the mean squared distance from the track, `2 * noise**2` on average for
    the hidden knots. The metric "mpjpe" is the mean distance from the true joints, in
    link lengths. The default has 60 parameters; `links=11, knots=60` has 600.

    Attributes:
        links: number of links.
        knots: number of knots in time.
        steps: simulated time steps.
        dt: time step in seconds, at most 0.01.
        stride: time steps between the frames of the track, a divisor of `steps`.
        strength: standard deviation of the hidden knots, in radians.
        noise: standard deviation of the track's error, in link lengths.
        init_scale: standard deviation of the initial knots, in radians.

    >>> task = Motion(links=3, knots=4, steps=20)
    >>> recording = task.sample(jax.random.key(0))
    >>> params = task.init(recording, jax.random.key(1))
    >>> params.shape, recording.track.shape
    ((4, 2), (4, 4, 2))
    """

    links: int = 7
    knots: int = 10
    steps: int = 100
    dt: float = 0.01
    stride: int = 5
    strength: float = 1.0
    noise: float = 0.02
    init_scale: float = 0.1

    def __post_init__(self):
        validate.integer("links", self.links, minimum=2)
        validate.integer("knots", self.knots, minimum=2)
        validate.integer("steps", self.steps)
        validate.integer("stride", self.stride)
        if self.steps % self.stride:
            raise ValueError(
                "stride must divide steps, got "
                f"stride={self.stride} and steps={self.steps}."
            )
        # At 0.012 the stiffest springs and dampers make explicit steps unstable.
        validate.number("dt", self.dt, low=0.0, open_low=True, high=0.01)
        for name in ("strength", "noise", "init_scale"):
            validate.number(name, getattr(self, name), low=0.0)

    def sample(self, key):
        pose_key, bend_key, knots_key, noise_key = jax.random.split(key, 4)
        first = jax.random.uniform(pose_key, (1,), minval=0.0, maxval=jnp.pi)
        bends = 0.5 * jax.random.normal(bend_key, (self.links - 1,))
        angles = jnp.cumsum(jnp.concatenate([first, bends]))
        start = ChainState(jnp.zeros(2), angles, jnp.zeros(2), jnp.zeros(self.links))
        lowest = jnp.min(joints(start)[:, 1])
        start = start._replace(base=jnp.stack([0.0, 0.1 - lowest]))
        shape = (self.knots, self.links - 1)
        knots = self.strength * jax.random.normal(knots_key, shape)
        truth = self.frames(knots, start)
        track = truth + self.noise * jax.random.normal(noise_key, truth.shape)
        return Recording(start, knots, truth, track)

    def init(self, instance, key):
        return self.init_scale * jax.random.normal(key, (self.knots, self.links - 1))

    def loss(self, params, batch, instance, key):
        moved = self.frames(params, instance.start)
        loss = jnp.mean(jnp.sum((moved - instance.track) ** 2, axis=-1))
        error = jnp.linalg.norm(moved - instance.joints, axis=-1)
        return loss, {"mpjpe": jnp.mean(error)}

    def frames(self, knots: jax.Array, start: ChainState) -> jax.Array:
        """Simulates the control `knots`: `[frames, links + 1, 2]` joint positions."""
        position = np.linspace(0.0, self.knots - 1.0, self.steps)
        distance = np.abs(position[:, None] - np.arange(self.knots))
        weights = np.maximum(1.0 - distance, 0.0).astype(knots.dtype)
        targets = jnp.diff(start.angles) + jnp.pi * jnp.tanh(weights @ knots / jnp.pi)
        moved = simulate(start, targets, self.dt)
        return moved[self.stride - 1 :: self.stride]
