"""A reward model of your own pairs, with --pairs (experiments/own_data.md says how), or by default of a cloned model's
responses to a token task. `python experiments/grpo_text.py --reward runs/reward_model` trains by it.
"""

import sys

from purepg.algorithms.reward_model import RewardConfig, reward_model
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.start import language_model
from purepg.run.text.config import PairsRunConfig

if __name__ == "__main__":
    config, network = RewardConfig(), LanguageModelConfig(start="runs/clone", value_head=True)
    run = PairsRunConfig(env="addition", total_steps=400_000, num_seeds=4)
    if any(argument.startswith("--pairs") for argument in sys.argv):  # of a pretrained model, and one pass
        config, network = RewardConfig(batch_size=8, learning_rate=1e-4), LanguageModelConfig(value_head=True)
        run = PairsRunConfig(total_steps=10**9, epochs=1, num_seeds=1)
    main(reward_model, config, language_model, network, run, __doc__)
