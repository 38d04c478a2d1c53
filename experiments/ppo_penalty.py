"""PPO with an adaptive KL penalty. By default on CartPole-v1."""

from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = PPOPenaltyConfig(num_steps=32, learning_rate=1e-3, gamma=0.98, target_kl=0.003)
EXPERIMENT = ppo_penalty, CONFIG, actor_critic, NetworkConfig(), RunConfig(total_steps=200_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
