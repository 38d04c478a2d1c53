"""DDPG on Pendulum-v1, with one environment and one gradient step per transition."""

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = DDPGConfig(capacity=20_000, batch_size=128, gamma=0.98)
NETWORK = ActorQConfig(policy="deterministic", num_critics=1)
RUN = RunConfig(env="Pendulum-v1", total_steps=20_000, num_seeds=10)
EXPERIMENT = ddpg, CONFIG, actor_q, NETWORK, RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
