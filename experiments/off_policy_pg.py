"""Off-policy policy gradient: several gradient steps on each rollout. By default on CartPole-v1."""

from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = OffPolicyPGConfig()
EXPERIMENT = off_policy_pg, CONFIG, actor_critic, NetworkConfig(), RunConfig(total_steps=200_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
