"""GRPO on a token task, from the cloned model that `python experiments/clone.py --out runs/clone` trains."""

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.plan import RunConfig
from purepg.run.start import language_model

if __name__ == "__main__":
    config = GRPOConfig(num_prompts=64, num_minibatches=2, learning_rate=5e-4, kl_coef=0.001)
    run = RunConfig(env="addition", total_steps=1_600_000, num_seeds=6, eval_episodes=512)
    main(grpo, config, language_model, LanguageModelConfig(start="runs/clone"), run, __doc__)
