"""PPO on Breakout-MinAtar, with dense layers over the raw 10 x 10 x 4 bits."""

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = PPOConfig(
    num_envs=64,
    num_steps=128,
    num_epochs=4,
    num_minibatches=8,
    learning_rate=5e-3,
    anneal_learning_rate=True,
    gamma=0.99,
    gae_lambda=0.8,
    entropy_coef=0.02,
)
NETWORK = NetworkConfig(hidden=(64, 64), activation="relu")
RUN = RunConfig(env="Breakout-MinAtar", total_steps=1_000_000)
EXPERIMENT = ppo, CONFIG, actor_critic, NETWORK, RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
