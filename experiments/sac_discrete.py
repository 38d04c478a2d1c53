"""SAC with discrete actions, on CartPole-v1."""

from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = DiscreteSACConfig(num_envs=8, batch_size=128, tau=0.02, target_entropy=0.6)
NETWORK = ActorQConfig(policy="categorical", num_critics=2)
RUN = RunConfig(env="CartPole-v1", total_steps=200_000, num_seeds=10)
EXPERIMENT = sac_discrete, CONFIG, actor_q, NETWORK, RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
