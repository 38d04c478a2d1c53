"""TRPO on MountainCar-v0. The reward is -1 at every step, so the agent must first reach the goal by chance."""

from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = TRPOConfig(num_envs=4, gae_lambda=0.9, value_learning_rate=3e-3, normalize_obs=True)
EXPERIMENT = trpo, CONFIG, actor_critic, NetworkConfig(), RunConfig(env="MountainCar-v0", total_steps=100_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
