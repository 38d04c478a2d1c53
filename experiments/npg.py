"""Natural policy gradient. As it stands: CartPole-v1, steps of a KL of 0.01."""

from purepg.algorithms.npg import NPGConfig, npg
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

if __name__ == "__main__":
    config = NPGConfig()
    main(npg, config, actor_critic, NetworkConfig(), RunConfig(total_steps=200_000), __doc__)
