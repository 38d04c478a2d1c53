"""Writes a model as a folder in Hugging Face's layout, which `transformers` and other programs load.

The reverse of `pretrained` and `tokenizer`: what they read is what is written here.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from purepg.envs.contract import first_difference
from purepg.language.pretrained import LLAMA3_FREQUENCIES, SINGLE, is_kernel, stored_parameters, write_json
from purepg.language.tokenizer import Tokenizer
from purepg.language.transformer import TransformerConfig, check_transformer
from purepg.types import Params, UsageError

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def save_pretrained(
    folder: str | Path,
    config: TransformerConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: Any = jnp.float32,
    context: int = 8192,
) -> None:
    """Writes `config.json`, `model.safetensors`, and with a tokenizer its files and `generation_config.json`.

    Args:
      folder: new or empty.
      params: of `Transformer(config, num_tokens)`. A value head is left out, because the layout has no place for it.
      dtype: float32, or bfloat16, which rounds.
      context: longest text that other programs shall accept; nothing here depends on it.
    Raises:
      UsageError: the folder holds something, the parameters are not the transformer's, the layout has no name for the
        architecture, or the tokenizer has ids that the model has not.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} must be a new or an empty folder")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise UsageError(f"dtype ({dtype}) must be float32 or bfloat16")
    sizes = {field.name: getattr(config, field.name) for field in fields(TransformerConfig)}
    config = replace(check_transformer(TransformerConfig(**sizes)), value_head=False)
    held = {"params": {name: x for name, x in params["params"].items() if name != "value_head"}}
    num_tokens = held["params"]["embedding"].shape[0]
    entries = config_json(config, num_tokens) | {"max_position_embeddings": context, "torch_dtype": str(dtype)}
    names, shapes = stored_parameters(config, num_tokens)
    if difference := first_difference(shapes, held, ("shape",)):
        raise UsageError(f"params{difference}, to fit the config that is saved with them")
    if tokenizer is not None and max(*tokenizer.stop, tokenizer.backend.get_vocab_size() - 1) >= num_tokens:
        raise UsageError(f"the tokenizer has {tokenizer.backend.get_vocab_size()} ids, but the model {num_tokens}")
    tensors = {}
    for name, x in zip(jax.tree.leaves(names), jax.tree.leaves(held), strict=True):
        x = np.asarray(jnp.asarray(x, dtype))
        tensors[name] = np.ascontiguousarray(x.T if is_kernel(name, x.shape) else x)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder, context)
        entries["eos_token_id"] = list(tokenizer.stop)
    write_json(folder / "config.json", entries)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def config_json(config: TransformerConfig, num_tokens: int) -> dict[str, Any]:
    """Returns the entries of `config.json`. Raises UsageError if no architecture there has both biases and norms."""
    if config.qkv_bias and config.qk_norm:
        raise UsageError("qkv_bias and qk_norm together are neither Qwen2 nor Qwen3: the layout has no name for them")
    kind = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    rope = None
    if config.rope_context is not None:
        rope = {"rope_type": "llama3", "factor": config.rope_factor, **LLAMA3_FREQUENCIES}
        rope |= {"original_max_position_embeddings": config.rope_context}
    elif config.rope_factor != 1:
        rope = {"rope_type": "linear", "factor": config.rope_factor}
    entries = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": num_tokens,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size if config.qk_norm else config.head_dim,  # Qwen3's is not hidden_size / num_heads
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tied_head,
    }
    return {name: x for name, x in entries.items() if x is not None}
