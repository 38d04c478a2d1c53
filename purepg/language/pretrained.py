"""Reads Llama, Qwen2 and Qwen3 checkpoints: a local folder in Hugging Face's layout (`config.json` and
`*.safetensors`), or a GGUF file.

Files are memory-mapped and read one tensor at a time. Nothing is downloaded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from purepg.language.gguf import is_gguf
from purepg.language.llama_cpp import read_llama_cpp
from purepg.language.transformer import Transformer, TransformerConfig, check_transformer
from purepg.types import Array, Params, UsageError

DTYPES = ("F64", "F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {  # our modules' names and theirs
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "mlp": "mlp",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LLAMA3_FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of all published models; ours are fixed


class Tensor(NamedTuple):
    """A tensor in a file: `read` returns it as an array of its own."""

    file: Path
    shape: list[int]
    read: Callable[[], np.ndarray]


def load_pretrained(path: str | Path, dtype: Any = jnp.float32) -> tuple[TransformerConfig, int, Params]:
    """Returns config, vocabulary size and parameters; the model is `Transformer(config, num_tokens)`.

    Args:
      path: a folder with `config.json`, and with `model.safetensors` or the shards that
        `model.safetensors.index.json` lists; a GGUF file; or a wheel that holds one.
      dtype: dtype of the returned parameters, whatever the files store.
    Raises:
      UsageError: a file or tensor is missing, damaged or of another shape, or `Transformer` lacks a feature it needs.
    """
    path = Path(path)
    if is_gguf(path):
        found, stored = read_llama_cpp(path)
        tensors = {name: Tensor(path, *x) for name, x in stored.items()}
        config, num_tokens = parse_config(path, found)
    elif path.is_dir():
        config, num_tokens = read_config(path / "config.json")
        tensors = read_tensors(path)
    else:
        raise UsageError(f"{path} must be a folder that holds config.json and {SINGLE}, but is no folder")
    names, expected = stored_parameters(config, num_tokens)
    ignored = {"lm_head.weight"} if config.tied_head else set()
    unknown = [x for x in tensors if x not in {*jax.tree.leaves(names), *ignored} and not x.endswith("inv_freq")]
    if unknown:
        raise UsageError(f"{tensors[unknown[0]].file} holds the tensor {unknown[0]}, which no transformer here uses")

    def parameter(name, like):
        if name not in tensors:
            raise UsageError(f"{path} has no tensor {name}")
        return _parameter(name, tensors[name], like.shape, dtype)

    return config, num_tokens, jax.tree.map(parameter, names, expected)


def stored_parameters(config: TransformerConfig, num_tokens: int) -> tuple[Params, Params]:
    """Returns the name in a checkpoint, and the shape and dtype, of every parameter of `Transformer`."""
    network = Transformer(config, num_tokens)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return jax.tree_util.tree_map_with_path(lambda path, _: _name([key.key for key in path[1:]]), shapes), shapes


def read_config(file: Path) -> tuple[TransformerConfig, int]:
    """Returns the config and vocabulary size. Raises UsageError as `parse_config` does, or if the file is not JSON."""
    return parse_config(file, read_json(file))


def parse_config(file: Path, found: dict[str, Any]) -> tuple[TransformerConfig, int]:
    """Returns the config and vocabulary size; missing entries take the defaults of Hugging Face's classes. Raises
    UsageError if a number is missing or out of range, or a feature is not supported."""
    kind = found.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UsageError(f"{file}: model_type ({kind}) must be llama, qwen2 or qwen3")
    layers = found.get("layer_types") or []
    unsupported = {
        "hidden_act": found.get("hidden_act", "silu") != "silu",
        "attention_bias": kind != "qwen2" and found.get("attention_bias", False),  # adds a bias to o_proj too
        "mlp_bias": found.get("mlp_bias", False),
        "partial_rotary_factor": found.get("partial_rotary_factor", 1) != 1,
        "sliding_window": kind == "llama" and found.get("sliding_window") is not None,
        "use_sliding_window": found.get("use_sliding_window", False),  # without it Qwen ignores sliding_window
        "layer_types": not isinstance(layers, list) or any(layer != "full_attention" for layer in layers),
        "quantization_config": found.get("quantization_config") is not None,
    }
    for name, is_used in unsupported.items():
        if is_used:
            raise UsageError(f"{file}: {name} ({found[name]}) is not supported")
    num_heads = _number(file, found, "num_attention_heads")
    head_dim = found.get("head_dim") or (128 if kind == "qwen3" else None)
    config = TransformerConfig(
        hidden_size=_number(file, found, "hidden_size"),
        num_layers=_number(file, found, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_number(file, found, "num_key_value_heads", num_heads),
        head_dim=None if head_dim is None else _number(file, found, "head_dim", head_dim),
        mlp_size=_number(file, found, "intermediate_size"),
        **_rope(file, found),
        rms_eps=_number(file, found, "rms_norm_eps", 1e-6, float),
        tied_head=bool(found.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )
    try:
        check_transformer(config)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    num_tokens = _number(file, found, "vocab_size")
    if num_tokens < 1:
        raise UsageError(f"{file}: vocab_size ({num_tokens}) must be at least 1")
    return config, num_tokens


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of the single file or of all shards. Raises UsageError if a file is missing or damaged."""
    if (folder / SINGLE).exists():
        return _open(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise UsageError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    shard_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(x, str) for x in shard_of.values()):
        raise UsageError(f"{folder / INDEX}: weight_map must map every tensor to its file")
    return dict(item for shard in sorted(set(shard_of.values())) for item in _open(folder / shard).items())


def _open(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UsageError(f"{file} is missing")
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is truncated, damaged or not a safetensors file ({error})") from None
    return {name: _tensor(file, opened, name) for name in opened.keys()}  # noqa: SIM118 (it has no other iterator)


def _tensor(file: Path, opened: Any, name: str) -> Tensor:
    found = opened.get_slice(name)

    def read() -> np.ndarray:
        if found.get_dtype() not in DTYPES:
            raise UsageError(f"{file}: {name} has dtype {found.get_dtype()}, but must have {', '.join(DTYPES)}")
        return opened.get_tensor(name)  # copies the mapped memory

    return Tensor(file, found.get_shape(), read)


def _parameter(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: Any) -> Array:
    """Reads a tensor as our parameter with shape `shape`. PyTorch's matrices are [out, in], our kernels [in, out]."""
    stored = list(shape[::-1] if is_kernel(name, shape) else shape)
    if tensor.shape != stored:
        raise UsageError(f"{tensor.file}: {name} has shape {tensor.shape}, but its config implies {stored}")
    x = tensor.read()
    return jnp.array(x.T if is_kernel(name, shape) else x, dtype)


def is_kernel(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is stored transposed."""
    return len(shape) == 2 and name != "model.embed_tokens.weight"


def _name(path: list[str]) -> str:
    """Converts our parameter's path to their name: attention_0, query, kernel is
    model.layers.0.self_attn.q_proj.weight."""
    match path:
        case ["embedding"]:
            return "model.embed_tokens.weight"
        case ["final_norm", _]:
            return "model.norm.weight"
        case ["head", _]:
            return "lm_head.weight"
    block, *inside, leaf = path
    kind, _, layer = block.rpartition("_")
    modules = [NAMES[x] for x in (kind, *inside)]
    return ".".join(["model.layers", layer, *modules, "bias" if leaf == "bias" else "weight"])


def _rope(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Returns our fields of the rotary positions, from `rope_theta` and `rope_scaling`, or from `rope_parameters` of
    newer configs. Their type is default, linear or llama3."""
    rope = {"rope_theta": found.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        entry = found.get(name) or {}
        kind = entry.get("rope_type", entry.get("type", "default")) if isinstance(entry, dict) else entry
        known = {"rope_type", "type", "rope_theta", *(ROPE_TYPES.get(kind, ()) if isinstance(kind, str) else ())}
        if kind not in [*ROPE_TYPES] or entry.keys() - known:
            kinds = ", ".join(ROPE_TYPES)
            raise UsageError(f"{file}: {name} ({json.dumps(entry)}) is not supported: rope_type must be one of {kinds}")
        rope |= entry
        for needed in ROPE_TYPES[kind]:
            value = _number(file, entry, needed, None, float)
            if value != LLAMA3_FREQUENCIES.get(needed, value):
                raise UsageError(f"{file}: {needed} ({value}) of {name} must be {LLAMA3_FREQUENCIES[needed]}")
    context = rope.get("original_max_position_embeddings")
    return {
        "rope_theta": _number(file, rope, "rope_theta", 10_000.0, float),
        "rope_factor": _number(file, rope, "factor", 1.0, float),
        "rope_context": None if context is None else _number(file, rope, "original_max_position_embeddings"),
    }


def _number(file: Path, found: dict[str, Any], name: str, default: Any = None, kind: type = int) -> Any:
    """Returns a number of the config, or `default` if it is missing or null."""
    value = default if found.get(name) is None else found[name]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise UsageError(f"{file}: {name} ({value}) must be {'an integer' if kind is int else 'a number'}")
    return kind(value)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UsageError if the file is missing or holds anything else."""
    if not file.is_file():
        raise UsageError(f"{file} is missing")
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} must hold a JSON object")
    return found


def write_json(file: Path, entries: dict[str, Any]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", "utf-8")
