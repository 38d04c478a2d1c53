"""REINFORCE over whole episodes. By default on CartPole-v1, with a leave-one-out baseline over four episodes."""

from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = REINFORCEConfig(num_episodes=4, learning_rate=4e-3, gamma=0.99, baseline="leave_one_out")
EXPERIMENT = reinforce, CONFIG, actor_critic, NetworkConfig(), RunConfig(total_steps=200_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
