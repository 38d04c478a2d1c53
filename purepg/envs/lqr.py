"""Linear-quadratic regulation (LQR). `purepg.lab.riccati` computes its values, gradient and optimum exactly.

x' = A x + B u + noise,     reward = -(x^T Q x + u^T R u)
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.types import Array, Box, Env, TimeStep, UsageError


@dataclass(frozen=True, eq=False)
class LQR:
    """A process with n state dimensions and m action dimensions. All arrays are converted to float64.

    Attributes:
      A: `[n, n]`. B: `[n, m]`.
      Q: `[n, n]`, symmetric, no negative eigenvalue. R: `[m, m]`, symmetric, positive eigenvalues.
      start_std: standard deviation of each component of the first state, which is normal with mean 0.
      noise_std: standard deviation of each component of the noise added in every step.
      gamma: the objective's discount per step, in [0, 1).
      horizon: a time limit on the experience; values and objective are those of the process without it.
      name: used in error messages.
    Raises:
      UsageError: the shapes do not fit, Q or R is not as above, or a number is out of its range.
    """

    A: np.ndarray
    B: np.ndarray
    Q: np.ndarray
    R: np.ndarray
    start_std: float = 1.0
    noise_std: float = 0.1
    gamma: float = 0.95
    horizon: int = 100
    name: str = "LQR"

    def __post_init__(self):
        for name in "ABQR":
            object.__setattr__(self, name, np.array(getattr(self, name), np.float64))
        n, m = self.B.shape if self.B.ndim == 2 else (0, 0)
        for name, shape in {"A": (n, n), "B": (n, m), "Q": (n, n), "R": (m, m)}.items():
            found = getattr(self, name).shape
            if found != shape or 0 in shape:
                raise UsageError(f"{self.name}: {name} has shape {found}, but must have {shape}, where B is [n, m]")
            if not np.all(np.isfinite(getattr(self, name))):
                raise UsageError(f"{self.name}: {name} must be finite")
        for name, least in {"Q": -1e-12, "R": 1e-12}.items():
            matrix = getattr(self, name)
            if not np.allclose(matrix, matrix.T) or np.linalg.eigvalsh(matrix).min() < least:
                kind = "semidefinite" if name == "Q" else "definite"
                raise UsageError(f"{self.name}: {name} must be symmetric and positive {kind}")
        if not 0 <= self.gamma < 1:
            raise UsageError(f"{self.name}: gamma ({self.gamma}) must be in [0, 1)")
        if not (0 <= self.start_std < np.inf and 0 <= self.noise_std < np.inf and self.horizon >= 1):
            raise UsageError(f"{self.name}: start_std and noise_std must be finite and at least 0, horizon at least 1")

    @property
    def num_states(self) -> int:
        return self.B.shape[0]

    @property
    def num_actions(self) -> int:
        return self.B.shape[1]


class LQRState(NamedTuple):
    x: Array
    t: Array  # int32, steps since the reset


def lqr_env(lqr: LQR) -> Env:
    """The process as an environment that observes the state. Actions are unbounded and used unchanged."""
    A, B, Q, R = (np.asarray(x, np.float32) for x in (lqr.A, lqr.B, lqr.Q, lqr.R))
    n, m = B.shape

    def reset(key):
        x = lqr.start_std * jax.random.normal(key, (n,))
        return LQRState(x, jnp.int32(0)), x

    def step(key, state, action):
        x, t = state
        reward = -(x @ Q @ x + action @ R @ action)
        next_x = A @ x + B @ action + lqr.noise_std * jax.random.normal(key, (n,))
        return LQRState(next_x, t + 1), TimeStep(next_x, reward, jnp.bool_(False), t + 1 >= lqr.horizon)

    observation, action = (Box(np.full(k, -np.inf, np.float32), np.full(k, np.inf, np.float32)) for k in (n, m))
    return Env(reset, step, observation, action, lqr.horizon, lqr.name)


def coupled_carts(spring: float = 0.5, friction: float = 0.1, dt: float = 0.2) -> LQR:
    """Two carts on a track, coupled by a spring, each with a motor; the goal is to rest at the centre. The state is
    position and velocity of each cart (4 dimensions), the action the force of each motor (2)."""
    accelerate = np.array(
        [[0, 1, 0, 0], [-spring, -friction, spring, 0], [0, 0, 0, 1], [spring, 0, -spring, -friction]], np.float64
    )
    push = np.array([[0, 0], [1, 0], [0, 0], [0, 1]], np.float64)
    Q, R = np.diag([1.0, 0.1, 1.0, 0.1]), 0.1 * np.eye(2)
    return LQR(np.eye(4) + dt * accelerate, dt * push, Q, R, name="lqr")


LQRS = {"lqr": coupled_carts}
