"""PPO-Clip. By default sixteen seeds on CartPole-v1, which each solves in 25,600 environment steps."""

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = PPOConfig(
    num_envs=4,
    num_steps=32,
    num_epochs=8,
    num_minibatches=4,
    learning_rate=2e-3,
    anneal_learning_rate=True,
    anneal_clip_eps=True,
    gamma=0.98,
    gae_lambda=0.9,
)
EXPERIMENT = ppo, CONFIG, actor_critic, NetworkConfig(), RunConfig(total_steps=25_600)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
