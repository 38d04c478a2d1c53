"""Models in GGUF files in Hugging Face's terms: the entries of config.json, and the names and layout of tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from purepg.language.gguf import TYPES, Gguf, read_gguf
from purepg.types import UsageError

ENTRIES = {  # config.json's names and GGUF's, behind the name of the architecture
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FACTORS = "rope_freqs.weight"  # by which a Llama 3 divides its rotary frequencies
CONTEXT = 8192  # of which they were computed; the file does not hold it

Stored = tuple[list[int], Callable[[], np.ndarray]]


def read_llama_cpp(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Returns the entries of config.json, and the shape and the reader of every tensor by its name.

    Raises:
      UsageError: as `read_gguf` does, or an entry is missing, or a feature is not supported.
    """
    gguf = read_gguf(file)
    kind = gguf.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UsageError(f"{file}: general.architecture ({kind}) must be llama, qwen2 or qwen3")
    found = {name: gguf.metadata.get(f"{kind}.{theirs}") for name, theirs in ENTRIES.items()}
    if "token_embd.weight" not in gguf.tensors:
        raise UsageError(f"{file} has no tensor token_embd.weight")
    found |= {"model_type": kind, "vocab_size": gguf.tensors["token_embd.weight"].shape[0]}
    found["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    for name in ("expert_count", "rope.scaling.attn_factor"):
        if gguf.metadata.get(f"{kind}.{name}"):
            raise UsageError(f"{file}: {kind}.{name} ({gguf.metadata[f'{kind}.{name}']}) is not supported")
    heads: Any = found["num_attention_heads"], found["num_key_value_heads"] or found["num_attention_heads"]
    width: Any = found["hidden_size"]
    if not all(isinstance(x, int) and x > 0 for x in (*heads, width)):
        raise UsageError(f"{file}: {kind}.attention.head_count {heads} and embedding_length ({width}) must be integers")
    size = found["head_dim"] or width // heads[0]
    rotated = gguf.metadata.get(f"{kind}.rope.dimension_count", size)
    if rotated != size:
        raise UsageError(f"{file}: {kind}.rope.dimension_count ({rotated}) must be the size of a head ({size})")
    found["rope_scaling"] = _scaling(file, gguf, kind, size, found["rope_theta"] or 10_000.0)
    tensors = {}
    for name in gguf.tensors.keys() - {FACTORS}:
        *before, module, leaf = name.split(".")
        layer = f"model.layers.{before[1]}." if len(before) == 2 else ""
        theirs = f"{layer}{NAMES.get(module, module)}.{leaf}"
        pairs = {"attn_q": heads[0], "attn_k": heads[1]}.get(module) if kind == "llama" else None
        tensors[theirs] = list(gguf.tensors[name].shape), _reader(file, gguf, name, pairs)
    return found, tensors


def _reader(file: Path, gguf: Gguf, name: str, num_heads: int | None) -> Callable[[], np.ndarray]:
    """Returns a function that reads a tensor. Raises UsageError, when it is called, if its type is unknown.

    In a file's Llama, rotary pairs are neighbouring rows of queries and keys: `num_heads` is given for these, and their
    rows are put back into halves of a head, as Hugging Face has them.
    """

    def read() -> np.ndarray:
        tensor = gguf.tensors[name]
        if tensor.kind not in TYPES:
            known = ", ".join(block.name for block in TYPES.values())
            raise UsageError(f"{file}: {name} has type {tensor.kind} of GGUF, but must have {known}")
        x = tensor.read()
        if num_heads is None:
            return x
        return x.reshape(num_heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return read


def _scaling(file: Path, gguf: Gguf, kind: str, size: int, theta: float) -> dict[str, Any] | None:
    """Returns `rope_scaling`. Llama 3's is stored as a tensor of factors, of which the largest is config.json's."""
    if FACTORS in gguf.tensors:
        found = _reader(file, gguf, FACTORS, None)()
        rope = {"rope_type": "llama3", "factor": round(float(found.max()), 6), "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": CONTEXT}
        turns = CONTEXT / (2 * np.pi) * theta ** (-np.arange(0, size, 2) / size)
        smooth = np.clip((turns - 1) / 3, 0, 1)
        expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
            raise UsageError(f"{file}: {FACTORS} are not those of a Llama 3 for texts of {CONTEXT} tokens")
        return rope
    rope = {name: gguf.metadata.get(f"{kind}.rope.scaling.{name}") for name in ("type", "factor")}
    return None if rope["type"] in (None, "none") else {"rope_type": rope["type"], "factor": rope["factor"]}
