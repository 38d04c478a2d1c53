"""TRPO. By default on CartPole-v1."""

from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = TRPOConfig()
EXPERIMENT = trpo, CONFIG, actor_critic, NetworkConfig(), RunConfig(total_steps=100_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
