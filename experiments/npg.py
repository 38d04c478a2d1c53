"""Natural policy gradient. By default on CartPole-v1, with steps of KL 0.01."""

from purepg.algorithms.npg import NPGConfig, npg
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = NPGConfig()
EXPERIMENT = npg, CONFIG, actor_critic, NetworkConfig(), RunConfig(total_steps=200_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
