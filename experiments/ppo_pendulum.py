"""PPO on Pendulum-v1, where every episode ends by truncation, which must not be treated as termination.

`--sweep bootstrap_at_truncation=true,false` shows what this common bug costs.
"""

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = PPOConfig(
    num_envs=16,
    num_steps=128,
    num_epochs=4,
    num_minibatches=16,
    learning_rate=3e-4,
    anneal_learning_rate=True,
    gamma=0.95,
    gae_lambda=0.95,
    normalize_obs=True,
    scale_reward=True,
)
RUN = RunConfig(env="Pendulum-v1", total_steps=1_000_000)
EXPERIMENT = ppo, CONFIG, actor_critic, NetworkConfig(), RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
