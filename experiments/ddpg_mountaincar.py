"""DDPG on MountainCarContinuous-v0. Only the goal is rewarded, so the exploration noise is correlated in time."""

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

if __name__ == "__main__":
    config = DDPGConfig(
        num_envs=8,
        batch_size=128,
        policy_learning_rate=3e-4,
        tau=0.02,
        exploration_std=0.5,
        noise_correlation=0.9,
    )
    network = ActorQConfig(policy="deterministic", num_critics=1)
    run = RunConfig(env="MountainCarContinuous-v0", total_steps=300_000, num_seeds=10)
    main(ddpg, config, actor_q, network, run, __doc__)
