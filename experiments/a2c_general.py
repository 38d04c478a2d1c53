"""A2C with settings for any environment with discrete actions: it scales observations and rewards itself."""

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = A2CConfig(
    num_envs=8,
    num_steps=8,
    learning_rate=1e-3,
    anneal_learning_rate=True,
    gamma=0.98,
    gae_lambda=1.0,
    normalize_obs=True,
    scale_reward=True,
)
RUN = RunConfig(env="MountainCar-v0", total_steps=500_000, log_every=100)
EXPERIMENT = a2c, CONFIG, actor_critic, NetworkConfig(), RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
