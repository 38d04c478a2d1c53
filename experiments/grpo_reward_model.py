"""RLOO on the learned reward that `python experiments/reward_model.py` trains; held-out prompts have the true one."""

from dataclasses import replace

from purepg.algorithms.family import FAMILY
from purepg.algorithms.grpo import grpo
from purepg.envs.registry import make
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.plan import RunConfig
from purepg.run.reward_model import with_learned_reward
from purepg.run.start import language_model
from purepg.types import Env


def addition() -> Env:
    return with_learned_reward(make("addition"), "runs/reward_model")


if __name__ == "__main__":
    config = replace(FAMILY["rloo"], num_prompts=64, learning_rate=3e-4, kl_coef=0.2)
    run = RunConfig(total_steps=500_000, num_seeds=4, eval_episodes=512)
    main(grpo, config, language_model, LanguageModelConfig(start="runs/clone"), run, __doc__, env=addition)
