"""Behaviour cloning of a token task's demonstrations, stopped early. The clone is the warm start of GRPO and DPO."""

from purepg.algorithms.clone import CloneConfig, clone
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.plan import RunConfig
from purepg.run.start import language_model

if __name__ == "__main__":
    run = RunConfig(env="addition", total_steps=180_000, num_seeds=6, eval_episodes=512)
    main(clone, CloneConfig(), language_model, LanguageModelConfig(), run, __doc__)
