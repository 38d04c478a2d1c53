"""purepg: policy gradients in JAX, as pure functions; a whole training run is one XLA program.

Import it before the first JAX computation: it keeps JAX's CPU runtime from deadlocking (`purepg.runtime`).
"""

from purepg.runtime import make_cpu_safe

make_cpu_safe()

from purepg.algorithms.a2c import A2CConfig, a2c  # noqa: E402
from purepg.algorithms.clone import CloneConfig, clone  # noqa: E402
from purepg.algorithms.ddpg import DDPGConfig, ddpg  # noqa: E402
from purepg.algorithms.dpg import DPGConfig, dpg  # noqa: E402
from purepg.algorithms.dpo import DPOConfig, dpo  # noqa: E402
from purepg.algorithms.family import FAMILY  # noqa: E402
from purepg.algorithms.grpo import GRPOConfig, grpo  # noqa: E402
from purepg.algorithms.npg import NPGConfig, npg  # noqa: E402
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg  # noqa: E402
from purepg.algorithms.ppo import PPOConfig, ppo  # noqa: E402
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty  # noqa: E402
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic  # noqa: E402
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce  # noqa: E402
from purepg.algorithms.sac import SACConfig, sac  # noqa: E402
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete  # noqa: E402
from purepg.algorithms.td3 import TD3Config, td3  # noqa: E402
from purepg.algorithms.trpo import TRPOConfig, trpo  # noqa: E402
from purepg.envs import gymnax_env, lqr_env, mdp_env  # noqa: E402
from purepg.envs.finite_mdp import FiniteMDP  # noqa: E402
from purepg.envs.lqr import LQR  # noqa: E402
from purepg.envs.tasks import Task, token_env  # noqa: E402
from purepg.language.model import LanguageModel, LanguageModelConfig, generate  # noqa: E402
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q  # noqa: E402
from purepg.run.start import language_model  # noqa: E402
from purepg.train import EpisodeStats, evaluate, guard  # noqa: E402
from purepg.types import (  # noqa: E402
    Algorithm,
    Box,
    Discrete,
    Env,
    Network,
    QNetwork,
    State,
    TimeStep,
    Transition,
    UsageError,
)

__all__ = [
    "FAMILY",
    "LQR",
    "A2CConfig",
    "ActorQConfig",
    "Algorithm",
    "Box",
    "CloneConfig",
    "DDPGConfig",
    "DPGConfig",
    "DPOConfig",
    "Discrete",
    "DiscreteSACConfig",
    "Env",
    "EpisodeStats",
    "FiniteMDP",
    "GRPOConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "NPGConfig",
    "Network",
    "NetworkConfig",
    "OffPolicyPGConfig",
    "PPOConfig",
    "PPOPenaltyConfig",
    "QActorCriticConfig",
    "QNetwork",
    "REINFORCEConfig",
    "SACConfig",
    "State",
    "TD3Config",
    "TRPOConfig",
    "Task",
    "TimeStep",
    "Transition",
    "UsageError",
    "a2c",
    "actor_critic",
    "actor_q",
    "clone",
    "ddpg",
    "dpg",
    "dpo",
    "evaluate",
    "generate",
    "grpo",
    "guard",
    "gymnax_env",
    "language_model",
    "lqr_env",
    "mdp_env",
    "npg",
    "off_policy_pg",
    "ppo",
    "ppo_penalty",
    "q_actor_critic",
    "reinforce",
    "sac",
    "sac_discrete",
    "td3",
    "token_env",
    "trpo",
]
