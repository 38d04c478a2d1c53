"""Language models with a warm start: from a pretrained checkpoint, or from the best agent of a run."""

import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax

from purepg.language.gguf import is_gguf
from purepg.language.model import LanguageModel, LanguageModelConfig, with_sizes
from purepg.language.model import language_model as with_params
from purepg.language.pretrained import load_pretrained
from purepg.language.transformer import TransformerConfig, check_transformer, stacked
from purepg.precision import in_bfloat16
from purepg.run.console import say
from purepg.run.load import load, stored_network
from purepg.run.sweep import Setting, find_field
from purepg.types import Env, Params, UsageError


def language_model(env: Env, config: LanguageModelConfig, params: Params | None = None) -> LanguageModel:
    """The language model for a token task's environment.

    Args:
      params: initial parameters of a model of these sizes, or with LoRA those that stay frozen; a missing value head is
        initialised at random. None: the parameters in `config.start`, whose sizes then replace the config's; without a
        start, all are random.
    Raises:
      UsageError: the environment is not a token task, sizes do not fit together, the model in `config.start` has
        another vocabulary than the task, or `params` do not fit the model.
    """
    config = check_transformer(config)
    if config.start is None or env.task is None:
        return with_params(env, config, params)
    if params is not None:
        raise UsageError(f"start ({config.start}) and params are two places to start from: give one of them")
    shape, found, params = read_start(Path(config.start).absolute())
    wanted = env.task.num_tokens
    if found != wanted:
        raise UsageError(f"start ({config.start}) is a model of {found} tokens; {env.name} needs one of {wanted}")
    folder, narrow = Path(config.start).absolute(), config.bfloat16 and config.lora_rank is not None
    config = with_sizes(config, shape)
    if narrow or config.scans:
        params = _converted(folder, narrow, config.scans)
    return with_params(env, config, params)


@functools.cache
def _converted(folder: Path, narrow: bool, scan: bool) -> Params:
    """The parameters of `read_start` in bfloat16, or with all layers in one array."""
    shape, _, params = read_start(folder)
    params = in_bfloat16(params) if narrow else params
    return stacked(params, shape.num_layers) if scan else params


@functools.cache
def read_start(folder: Path) -> tuple[TransformerConfig, int, Params]:
    """Reads the sizes, vocabulary size and parameters of a checkpoint, or of the best agent of a run.

    Args:
      folder: an absolute path, because results are cached. They are NumPy arrays, so that traced code can use them too.
    Raises:
      UsageError: the path holds neither, or it cannot be read.
    """
    with jax.ensure_compile_time_eval():
        is_checkpoint = is_gguf(folder) or any(folder.glob("*.safetensors"))
        shape, num_tokens, params = load_pretrained(folder) if is_checkpoint else _trained(folder)
        return shape, num_tokens, jax.device_get(params)


def _trained(folder: Path) -> tuple[TransformerConfig, int, Params]:
    """Reads a start from the best agent of a run."""
    if not folder.exists():
        kinds = "a checkpoint, or the folder of a run, such as python experiments/clone.py --out FOLDER makes"
        raise UsageError(f"{folder} does not exist: it must be {kinds}")
    agent = load(folder, best=True)
    shape = stored_network(folder, agent.setting)
    if not isinstance(shape, LanguageModelConfig):
        raise UsageError(f"start ({folder}) holds a run without a language model")
    learner: Any = agent.state.learner
    given = replace(shape, start=shape.start if shape.lora_rank else None)
    params: Any = language_model(agent.env, given).plain(learner.params)
    params = {"params": {name: x for name, x in params["params"].items() if name != "value_head"}}
    return shape, params["params"]["embedding"].shape[0], params


def with_absolute_start(config: Any) -> Any:
    """The config with `start` as an absolute path."""
    start = getattr(config, "start", None)
    return config if start is None else replace(config, start=str(Path(start).absolute()))


def with_sizes_of_starts(settings: Sequence[Setting]) -> list[Setting]:
    """The settings, with language models' sizes replaced by those of their `start`, so that config.json holds the
    sizes in use. Prints which requested sizes were overruled.

    Raises:
      UsageError: a `start` cannot be read, or the sweep sets a size that it does not have.
    """
    resolved, lines = [], []
    for setting in settings:
        config = setting.configs["network"]
        if isinstance(config, LanguageModelConfig) and config.start is not None:
            found = with_sizes(config, read_start(Path(config.start).absolute())[0])
            overruled = {
                field.name: f"{field.name} ({getattr(config, field.name)}) is {getattr(found, field.name)}"
                for field in fields(config)
                if getattr(config, field.name) not in (field.default, getattr(found, field.name))
            }
            for name in setting.hyperparameters:
                where, field = find_field(setting.configs, name)
                if where == "network" and getattr(config, field) != getattr(found, field):
                    raise UsageError(
                        f"cannot sweep {name}: start ({config.start}) has its own, {getattr(found, field)}"
                    )
            if overruled:
                lines.append(f"sizes are those of start ({config.start}): {', '.join(overruled.values())}")
            setting = setting._replace(configs=setting.configs | {"network": found})
        resolved.append(setting)
    for line in dict.fromkeys(lines):
        say(line)
    return resolved
