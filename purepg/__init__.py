"""purepg: policy gradients in JAX, as pure functions; a whole training run is one XLA program.

Import it before the first JAX computation: it keeps JAX's CPU runtime from deadlocking (`purepg.runtime`).
"""

from purepg.runtime import make_cpu_safe

make_cpu_safe()

from purepg.algorithms.a2c import A2CConfig, a2c  # noqa: E402
from purepg.algorithms.npg import NPGConfig, npg  # noqa: E402
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg  # noqa: E402
from purepg.algorithms.ppo import PPOConfig, ppo  # noqa: E402
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty  # noqa: E402
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce  # noqa: E402
from purepg.algorithms.trpo import TRPOConfig, trpo  # noqa: E402
from purepg.envs import gymnax_env, mdp_env  # noqa: E402
from purepg.envs.finite_mdp import FiniteMDP  # noqa: E402
from purepg.networks import NetworkConfig, actor_critic  # noqa: E402
from purepg.train import EpisodeStats, evaluate, guard  # noqa: E402
from purepg.types import (  # noqa: E402
    Algorithm,
    Box,
    Discrete,
    Env,
    Network,
    State,
    TimeStep,
    Transition,
    UsageError,
)

__all__ = [
    "A2CConfig",
    "Algorithm",
    "Box",
    "Discrete",
    "Env",
    "EpisodeStats",
    "FiniteMDP",
    "NPGConfig",
    "Network",
    "NetworkConfig",
    "OffPolicyPGConfig",
    "PPOConfig",
    "PPOPenaltyConfig",
    "REINFORCEConfig",
    "State",
    "TRPOConfig",
    "TimeStep",
    "Transition",
    "UsageError",
    "a2c",
    "actor_critic",
    "evaluate",
    "guard",
    "gymnax_env",
    "mdp_env",
    "npg",
    "off_policy_pg",
    "ppo",
    "ppo_penalty",
    "reinforce",
    "trpo",
]
