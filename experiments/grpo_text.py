"""GRPO on your own prompts, with rewards in Python: experiments/own_rewards.md says how. The learning rate is 1e-5 by
default, and 5e-4 with --network.lora-rank, since adapters need larger steps.
"""

import sys

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.start import language_model
from purepg.run.text.config import TextRunConfig

if __name__ == "__main__":
    adapted = any(argument.startswith(("--network.lora-rank", "--network.lora_rank")) for argument in sys.argv)
    config = GRPOConfig(num_prompts=8, learning_rate=5e-4 if adapted else 1e-5, kl_coef=0.001)
    run = TextRunConfig(total_steps=500_000, num_seeds=1)
    main(grpo, config, language_model, LanguageModelConfig(rows_at_once=8, tokens_at_once=256), run, __doc__)
