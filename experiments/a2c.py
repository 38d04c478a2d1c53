"""A2C. By default on CartPole-v1, with 8 environments x 8 steps per update and 8-step advantages (lambda = 1)."""

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = A2CConfig(num_envs=8, num_steps=8, learning_rate=4e-3, anneal_learning_rate=True, gamma=0.98, gae_lambda=1.0)
EXPERIMENT = a2c, CONFIG, actor_critic, NetworkConfig(), RunConfig(total_steps=200_000, log_every=100)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
