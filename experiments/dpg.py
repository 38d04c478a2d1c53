"""DPG on linear-quadratic regulation, with a linear policy and a quadratic Q."""

from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.networks.linear import LinearQuadraticConfig, linear_quadratic
from purepg.run.cli import main
from purepg.run.plan import RunConfig

# For Q to learn the value of actions, the noise must be as large as the actions themselves. Gradients shrink more
# than a hundredfold; if they were not clipped, Adam would keep dividing by their earlier size.
CONFIG = DPGConfig(
    num_envs=16,
    num_steps=8,
    num_critic_steps=20,
    policy_learning_rate=0.03,
    critic_learning_rate=0.03,
    anneal_learning_rate=True,
    gamma=0.95,
    exploration_std=4.0,
    max_grad_norm=1.0,
)
RUN = RunConfig(env="lqr", total_steps=51_200, num_seeds=10)
EXPERIMENT = dpg, CONFIG, linear_quadratic, LinearQuadraticConfig(), RUN

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
