"""Trains a reward model from preferences among a language model's responses; `grpo_reward_model.py` uses it."""

from purepg.run.reward_model import main

if __name__ == "__main__":
    main(__doc__)
