"""SAC on Pendulum-v1, with one environment and one gradient step per transition."""

from purepg.algorithms.sac import SACConfig, sac
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

if __name__ == "__main__":
    config = SACConfig(capacity=20_000, batch_size=128, gamma=0.98)
    network = ActorQConfig(policy="tanh_gaussian", num_critics=2)
    run = RunConfig(env="Pendulum-v1", total_steps=20_000, num_seeds=10)
    main(sac, config, actor_q, network, run, __doc__)
