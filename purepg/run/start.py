"""Where a language model's parameters come from: a folder on this disk, or nowhere."""

import functools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax

from purepg.pretrained import load_pretrained
from purepg.run.load import load, stored_network
from purepg.tokens import LanguageModel, LanguageModelConfig
from purepg.tokens import language_model as with_params
from purepg.transformer import TransformerConfig
from purepg.types import Env, Params, UsageError


def language_model(env: Env, config: LanguageModelConfig) -> LanguageModel:
    """The language model of a config for a token task's environment, with the parameters of `config.start`.

    Raises:
      UsageError: the environment is no token task, or `start` holds no parameters of a model of its tokens.
    """
    if config.start is None or env.task is None:
        return with_params(env, config)
    folder = Path(config.start)
    shape, num_tokens, params = _read(folder.absolute())
    wanted = len(env.task.vocabulary)
    if num_tokens != wanted:
        raise UsageError(f"start ({folder}) is a model of {num_tokens} tokens; {env.name} needs one of {wanted}")
    sizes = {field.name: getattr(shape, field.name) for field in fields(TransformerConfig)}
    return with_params(env, replace(config, **sizes | {"value_head": config.value_head}), params)


@functools.cache
def _read(folder: Path) -> tuple[TransformerConfig, int, Params]:
    """What a folder holds, as NumPy arrays: it is asked for again inside of traces, where nothing can be read."""
    shape, num_tokens, params = load_pretrained(folder) if any(folder.glob("*.safetensors")) else _trained(folder)
    return shape, num_tokens, jax.device_get(params)


def _trained(folder: Path) -> tuple[TransformerConfig, int, Params]:
    """The best agent of a run."""
    if not folder.exists():
        raise UsageError(f"start ({folder}) does not exist: make it with python experiments/clone.py --out {folder}")
    agent = load(folder, best=True)
    shape = stored_network(folder, agent.setting)
    if not isinstance(shape, TransformerConfig):
        raise UsageError(f"start ({folder}) holds a run without a language model")
    if isinstance(shape, LanguageModelConfig) and shape.start:  # then that is where its sizes are from
        shape = _read(Path(shape.start).absolute())[0]
    learner: Any = agent.state.learner.learner
    params = {"params": {name: x for name, x in learner.params["params"].items() if name != "value_head"}}
    return shape, params["params"]["embedding"].shape[0], params
