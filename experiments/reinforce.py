"""REINFORCE."""

from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.networks import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.launch import RunConfig

if __name__ == "__main__":
    main(reinforce, REINFORCEConfig(), actor_critic, NetworkConfig(), RunConfig(), __doc__)
