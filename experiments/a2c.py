"""A2C."""

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.networks import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.launch import RunConfig

if __name__ == "__main__":
    main(a2c, A2CConfig(), actor_critic, NetworkConfig(), RunConfig(), __doc__)
