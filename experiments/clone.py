"""Supervised fine-tuning on your own demonstrations, with --data (experiments/own_data.md says how), or by default on
a token task's, stopped early. The clone is the warm start of GRPO and DPO.
"""

import sys

from purepg.algorithms.clone import CloneConfig, clone
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.start import language_model
from purepg.run.text.config import DemonstrationsRunConfig

if __name__ == "__main__":
    config = CloneConfig()
    run = DemonstrationsRunConfig(env="addition", total_steps=180_000, num_seeds=6, eval_episodes=512)
    if any(argument.startswith("--data") for argument in sys.argv):  # of a pretrained model, and a few passes
        config = CloneConfig(batch_size=16, learning_rate=1e-4)
        run = DemonstrationsRunConfig(total_steps=10**9, epochs=3, num_seeds=1)
    main(clone, config, language_model, LanguageModelConfig(), run, __doc__)
