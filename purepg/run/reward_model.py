"""Reward models in the folders of runs, read as rewards: of a token task, or of text from files.

`experiments/reward_model.py` trains one; `experiments/grpo_reward_model.py` and `grpo_text.py` use it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from purepg.algorithms.groups import source
from purepg.algorithms.preferences import learned_reward
from purepg.envs.tasks import Task, token_env
from purepg.language.model import LanguageModel, LanguageModelConfig
from purepg.run.load import load, stored_network
from purepg.run.start import language_model
from purepg.types import Env, Params, UsageError

NUM_MEASURED = 256  # prompts to which the start's responses standardise the reward of a task
AT_ONCE = 16  # rows that are scored by one call of a compiled program


def read_reward_model(folder: str | Path, task: Task) -> tuple[LanguageModel, Params]:
    """The best reward model of a run: a language model, whose V after the last token of a response is its reward, and
    what it has learned.

    Args:
      task: whose responses it judges; both have one vocabulary.
    Raises:
      UsageError: the folder holds no run of a reward model, or its model reads another vocabulary.
    """
    if not Path(folder).exists():
        raise UsageError(f"{folder} does not exist: python experiments/reward_model.py --out {folder} makes it")
    agent = load(folder, best=True)
    config = stored_network(folder, agent.setting)
    if not isinstance(config, LanguageModelConfig) or not config.value_head:
        raise UsageError(f"{folder} must hold a run of experiments/reward_model.py, whose model has a value head")
    if (found := agent.env.task.num_tokens) != task.num_tokens:
        raise UsageError(f"{folder} holds a reward model for {found} tokens; {task.name} has {task.num_tokens}")
    return language_model(agent.env, config), agent.state.learner.params


def with_learned_reward(env: Env, folder: str | Path) -> Env:
    """A token task whose responses earn what a reward model says, with mean 0 and deviation 1 among the responses that
    the reward model's start gives to one prompt. Held-out prompts keep the task's own reward.

    Raises:
      UsageError: the environment has no tokens, or the folder no reward model for them.
    """
    if env.task is None:
        raise UsageError(f"{env.name} has no tokens: a reward model needs a token task, such as --env addition")
    model, params = read_reward_model(folder, env.task)
    raw, groups = learned_reward(model, params), source(env, model)

    @jax.jit
    def measure(key):
        own = groups.sample(key, groups.init(key), NUM_MEASURED, 4)
        learned = model.apply(params, own.obs)[1]
        # Rewards of different prompts are not compared by any pair, so their spread means nothing.
        return jnp.mean(learned), jnp.sqrt(jnp.mean(jnp.var(learned, axis=1, ddof=1)))

    with jax.ensure_compile_time_eval():
        mean, deviation = map(float, measure(jax.random.key(0)))
    standardised = token_env(env.task, reward=lambda *answer: (raw(*answer) - mean) / deviation)
    return standardised._replace(held_out=env.held_out or env)


class LearnedReward:
    """The reward model of a run as a function of tokens, for rewards between compiled programs."""

    def __init__(self, folder: Path, task: Task):
        model, params = read_reward_model(folder, task)
        self._params = jax.device_put((model.frozen, params))
        self._value = jax.jit(lambda params, token: model._replace(start=params[0]).apply(params[1], token)[1])

    def __call__(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        """The rewards `[B]` of responses `[B, R]` to prompts `[B, L]`."""
        token = np.concatenate([prompt, response], axis=1)
        full = np.pad(token, ((0, -len(token) % AT_ONCE), (0, 0)), mode="edge")
        chunks = full.reshape(-1, AT_ONCE, token.shape[1])
        return np.concatenate([self._value(self._params, chunk) for chunk in chunks])[: len(token)]
