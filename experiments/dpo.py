"""DPO on your own pairs, with --pairs (experiments/own_data.md says how), or by default on a token task, from the
cloned model that `python experiments/clone.py --out runs/clone` trains.
"""

import sys

from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.start import language_model
from purepg.run.text.config import PairsRunConfig

if __name__ == "__main__":
    config, network = DPOConfig(), LanguageModelConfig(start="runs/clone")
    run = PairsRunConfig(env="addition", total_steps=400_000, num_seeds=4, eval_episodes=512)
    if any(argument.startswith("--pairs") for argument in sys.argv):  # of a pretrained model, and one pass
        config, network = DPOConfig(batch_size=8, learning_rate=2e-5), LanguageModelConfig()
        run = PairsRunConfig(total_steps=10**9, epochs=1, num_seeds=1)
    main(dpo, config, language_model, network, run, __doc__)
