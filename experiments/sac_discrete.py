"""SAC with discrete actions, on CartPole-v1."""

from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

if __name__ == "__main__":
    config = DiscreteSACConfig(num_envs=8, batch_size=128, tau=0.02, target_entropy=0.6)
    network = ActorQConfig(policy="categorical", num_critics=2)
    run = RunConfig(env="CartPole-v1", total_steps=200_000, num_seeds=10)
    main(sac_discrete, config, actor_q, network, run, __doc__)
