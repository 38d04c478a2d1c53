"""PPO-Clip. As it stands: sixteen seeds of CartPole-v1, solved."""

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.launch import RunConfig

if __name__ == "__main__":
    main(ppo, PPOConfig(), actor_critic, NetworkConfig(), RunConfig(), __doc__)
