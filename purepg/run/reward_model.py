"""Reward models on disk: trained from preferences among a language model's own responses, and read as a task's reward.

`experiments/reward_model.py` trains one, and `experiments/grpo_reward_model.py` uses it.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from purepg.algorithms.groups import source
from purepg.algorithms.preferences import (
    Preferences,
    RewardModelConfig,
    fit_reward_model,
    learned_reward,
    sample_preferences,
)
from purepg.config import Count, Seed, check
from purepg.envs.registry import make
from purepg.envs.tasks import token_env
from purepg.language.model import LanguageModel, LanguageModelConfig
from purepg.language.model import language_model as with_params
from purepg.run.cli import leave, parse_flags
from purepg.run.folder.files import RecordError, read_json, write_json, write_whole
from purepg.run.start import language_model
from purepg.types import Env, Params, UsageError

SIZES, PARAMETERS = "reward_model.json", "reward_model.safetensors"
NUM_MEASURED = 256  # prompts to which the model's responses standardise the reward, and show how well it ranks


@dataclass(frozen=True)
class Choice(RewardModelConfig):
    """What a reward model is trained from, and how.

    Attributes:
      start: the language model that answers, and with whose parameters the reward model starts: the folder of a run, or
        of a checkpoint.
      out: the folder that the reward model is written to.
      env: name of the token task, whose reward decides which of two responses is preferred.
      num_pairs: prompts; one whose responses all earned the same gives no pair.
      num_candidates: responses to each prompt, of which the best and the worst make a pair.
      num_steps: gradient steps.
      batch_size: pairs in the minibatch of a gradient step.
      learning_rate: Adam's.
      seed: seed of all random numbers.
    """

    start: Path = Path("runs/clone")
    out: Path = Path("runs/reward_model")
    env: str = "addition"
    num_pairs: Count = 2048
    num_candidates: Count = 4
    seed: Seed = 0


def main(description: str | None = None) -> None:
    """Trains a reward model, writes it, and prints how well it ranks; exits with 2 if an argument is bad."""
    script = Path(sys.argv[0]).stem
    try:
        print(train_reward_model(check(parse_flags(Choice, sys.argv[1:], description))))
    except UsageError as error:
        leave(script, error, 2)
    except RecordError as error:
        leave(script, error, 1)


def train_reward_model(choice: Choice) -> str:
    """Trains and writes a reward model; returns how well it ranks, in a line."""
    if choice.num_candidates < 2:
        raise UsageError(f"num_candidates ({choice.num_candidates}) must be at least 2, to make a pair")
    env = make(choice.env)
    model = language_model(env, LanguageModelConfig(start=str(choice.start), value_head=True))

    @jax.jit
    def fit(key):
        k_init, k_pairs, k_unseen, k_fit, k_own = jax.random.split(key, 5)
        start = source(env, model).init(k_init)
        pairs = sample_preferences(k_pairs, env, model, start, choice.num_pairs, choice.num_candidates)
        unseen = sample_preferences(k_unseen, env.held_out or env, model, start, NUM_MEASURED, choice.num_candidates)
        params, _ = fit_reward_model(k_fit, model, start, pairs, choice)
        own = source(env, model).sample(k_own, start, NUM_MEASURED, 4)
        learned = model.apply(params, own.obs)[1]
        # Rewards of different prompts are not compared by any pair, so their spread means nothing.
        standard = jnp.mean(learned), jnp.sqrt(jnp.mean(jnp.var(learned, axis=1, ddof=1)))
        ranked = [(jnp.sum(x.weight), _ranked_right(model, params, x)) for x in (pairs, unseen)]
        return params, standard, ranked

    params, (mean, deviation), ((num_pairs, seen), (_, unseen)) = jax.device_get(fit(jax.random.key(choice.seed)))
    if num_pairs == 0:
        raise UsageError(f"num_pairs ({choice.num_pairs}) gave no pair: all responses to each prompt earned the same")
    choice.out.mkdir(parents=True, exist_ok=True)
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    write_whole(choice.out / PARAMETERS, lambda file: file.write(save(leaves)))
    sizes = {
        "model": asdict(model.transformer.config) | {"start": None},
        "mean": float(mean),
        "deviation": float(deviation),
    }
    write_json(choice.out / SIZES, sizes)
    return f"{num_pairs:.0f} pairs, of which {seen:.1%} are ranked right, and {unseen:.1%} of unseen ones; {choice.out}"


def _ranked_right(model: LanguageModel, params: Params, pairs: Preferences) -> Any:
    margin = model.apply(params, pairs.chosen)[1] - model.apply(params, pairs.rejected)[1]
    return jnp.sum(pairs.weight * (margin > 0)) / jnp.maximum(jnp.sum(pairs.weight), 1.0)


def with_learned_reward(env: Env, folder: str | Path) -> Env:
    """A token task whose responses earn what a reward model says, with mean 0 and deviation 1 for the responses of the
    model that it was trained with. Held-out prompts keep the task's own reward.

    Raises:
      UsageError: the environment has no tokens, or the folder no reward model for them.
    """
    folder = Path(folder)
    if env.task is None:
        raise UsageError(f"{env.name} has no tokens: a reward model needs a token task, such as --env addition")
    found = read_json(folder / SIZES, "make it with python experiments/reward_model.py")
    try:
        leaves = load_file(folder / PARAMETERS)
        config = LanguageModelConfig(**found["model"])
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UsageError(f"{folder} holds no reward model that can be read: {error}") from None
    model = with_params(env, config)
    wanted: Any = jax.eval_shape(source(env, model).init, jax.random.key(0))
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(wanted)}
    if shapes != {name: x.shape for name, x in leaves.items()}:
        raise UsageError(f"{folder} holds a reward model for other tokens than those of {env.name}")
    raw = learned_reward(model, jax.tree.unflatten(jax.tree.structure(wanted), [leaves[name] for name in shapes]))

    def reward(prompt, response):
        return (raw(prompt, response) - found["mean"]) / found["deviation"]

    return token_env(env.task, reward=reward)._replace(held_out=env.held_out or env)
