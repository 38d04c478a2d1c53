"""A reward that was learned from pairs: that of a reward model in a run's folder."""

from pathlib import Path

import jax
import numpy as np

from purepg.envs.tasks import Task
from purepg.language.model import LanguageModelConfig
from purepg.run.load import load, stored_network
from purepg.run.start import language_model
from purepg.types import UsageError

AT_ONCE = 16  # rows that are scored by one call of the compiled program


class LearnedReward:
    """The best reward model of a run, as a function of tokens.

    Args:
      folder: that of a run of `experiments/reward_model.py`.
      task: whose responses it judges; both have one vocabulary.
    Raises:
      UsageError: the folder holds no such run, or its model reads another vocabulary.
    """

    def __init__(self, folder: Path, task: Task):
        agent = load(folder, best=True)
        config = stored_network(folder, agent.setting)
        if not isinstance(config, LanguageModelConfig) or not config.value_head:
            raise UsageError(f"reward ({folder}) must be a run of experiments/reward_model.py, whose model has a value")
        if (found := agent.env.task.num_tokens) != task.num_tokens:
            raise UsageError(f"reward ({folder}) reads {found} tokens, and the policy writes {task.num_tokens}")
        model = language_model(agent.env, config)
        self._params = jax.device_put((model.frozen, agent.state.learner.params))
        self._value = jax.jit(lambda params, token: model._replace(start=params[0]).apply(params[1], token)[1])

    def __call__(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        """The rewards `[B]` of responses `[B, R]` to prompts `[B, L]`."""
        token = np.concatenate([prompt, response], axis=1)
        full = np.pad(token, ((0, -len(token) % AT_ONCE), (0, 0)), mode="edge")
        chunks = full.reshape(-1, AT_ONCE, token.shape[1])
        return np.concatenate([self._value(self._params, chunk) for chunk in chunks])[: len(token)]
