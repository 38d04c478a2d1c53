"""DPO on a token task, from the cloned model that `python experiments/clone.py --out runs/clone` trains."""

from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.plan import RunConfig
from purepg.run.start import language_model

if __name__ == "__main__":
    run = RunConfig(env="addition", total_steps=400_000, num_seeds=4, eval_episodes=512)
    main(dpo, DPOConfig(), language_model, LanguageModelConfig(start="runs/clone"), run, __doc__)
