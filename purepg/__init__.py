"""purepg: policy gradients in JAX, as pure functions; a whole training run is one XLA program.

Import it before the first JAX computation: it keeps JAX's CPU runtime from deadlocking (`purepg.runtime`).
"""

from purepg.runtime import make_cpu_safe

make_cpu_safe()

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.algorithms.family import FAMILY
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.npg import NPGConfig, npg
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.td3 import TD3Config, td3
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.envs import gymnax_env, lqr_env, mdp_env
from purepg.envs.finite_mdp import FiniteMDP
from purepg.envs.lqr import LQR
from purepg.envs.suites.gymnasium import gym_env
from purepg.envs.tasks import Task, token_env
from purepg.language.model import LanguageModel, LanguageModelConfig
from purepg.language.sampling import generate
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.run.arguments import arguments
from purepg.run.experiment import train_population
from purepg.run.load import load
from purepg.run.plan import RunConfig
from purepg.run.search import Uniform
from purepg.run.start import language_model
from purepg.train import EpisodeStats, evaluate, guard
from purepg.types import (
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
