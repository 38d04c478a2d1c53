"""What a folder holds that a language model may start from."""

import functools
from pathlib import Path
from typing import Any

import jax

from purepg.pretrained import load_pretrained
from purepg.run.load import load, stored_network
from purepg.transformer import TransformerConfig
from purepg.types import Params, UsageError


@functools.cache
def read_start(folder: Path) -> tuple[TransformerConfig, int, Params]:
    """Sizes, vocabulary size and parameters of a checkpoint, or of the best agent of a run.

    Args:
      folder: absolute, since what it holds is remembered, as NumPy arrays: programs that are traced ask for it too.
    Raises:
      UsageError: it holds neither, or something that cannot be read.
    """
    with jax.ensure_compile_time_eval():
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
    learner: Any = agent.state.learner.learner
    params = {"params": {name: x for name, x in learner.params["params"].items() if name != "value_head"}}
    return shape, params["params"]["embedding"].shape[0], params
