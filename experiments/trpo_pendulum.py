"""TRPO on Pendulum-v1, with a plain Gaussian policy."""

from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = TRPOConfig(
    max_kl=0.004,
    value_learning_rate=4e-3,
    gamma=0.95,
    gae_lambda=0.9,
    normalize_obs=True,
    scale_reward=True,
)
EXPERIMENT = trpo, CONFIG, actor_critic, NetworkConfig(), RunConfig(env="Pendulum-v1", total_steps=100_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
