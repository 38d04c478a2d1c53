"""PPO-Clip with settings for any environment with discrete actions: it scales observations and rewards itself."""

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = PPOConfig(
    num_envs=16,
    num_steps=64,
    num_epochs=4,
    num_minibatches=4,
    learning_rate=2e-3,
    anneal_learning_rate=True,
    entropy_coef=0.01,
    normalize_obs=True,
    scale_reward=True,
)
RUN = RunConfig(env="MountainCar-v0", total_steps=500_000)
EXPERIMENT = ppo, CONFIG, actor_critic, NetworkConfig(), RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
