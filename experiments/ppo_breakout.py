"""PPO on Breakout-MinAtar, with the batch and the widths of gymnax-blines."""

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.launch import RunConfig

if __name__ == "__main__":
    config = PPOConfig(
        num_envs=64,
        num_steps=128,
        num_epochs=4,
        num_minibatches=8,
        learning_rate=1e-3,
        anneal_learning_rate=True,
        gamma=0.99,
        gae_lambda=0.95,
        entropy_coef=0.01,
    )
    network = NetworkConfig(hidden=(256, 256), activation="relu")
    run = RunConfig(env="Breakout-MinAtar", total_steps=1_000_000)
    main(ppo, config, actor_critic, network, run, __doc__)
