"""DDPG on MountainCarContinuous-v0. Only the goal is rewarded, so the exploration noise is correlated in time."""

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = DDPGConfig(
    num_envs=8,
    batch_size=128,
    policy_learning_rate=3e-4,
    tau=0.02,
    exploration_std=0.5,
    noise_correlation=0.9,
)
NETWORK = ActorQConfig(policy="deterministic", num_critics=1)
RUN = RunConfig(env="MountainCarContinuous-v0", total_steps=300_000, num_seeds=10)
EXPERIMENT = ddpg, CONFIG, actor_q, NETWORK, RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
