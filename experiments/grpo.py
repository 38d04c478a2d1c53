"""GRPO on CartPole-v1: the episodes of a group all start from the same initial state."""

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

if __name__ == "__main__":
    config = GRPOConfig(
        num_prompts=2, group_size=8, num_epochs=4, num_minibatches=2, aggregation="token_mean", kl_coef=0.0
    )
    main(grpo, config, actor_critic, NetworkConfig(), RunConfig(total_steps=200_000), __doc__)
