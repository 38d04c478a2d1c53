"""GGUF files: every type of tensor as its own package reads it, and models in Hugging Face's terms."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf_files import plain, write_gguf
from safetensors.numpy import load_file

from purepg.language.gguf import TYPES, read_gguf
from purepg.language.llama_cpp import NAMES
from purepg.language.pretrained import load_pretrained
from purepg.types import UsageError

FIXTURES = Path(__file__).parent / "fixtures"  # whose README says how they were made
LLAMA, QWEN3 = FIXTURES / "tiny_llama", FIXTURES / "tiny_qwen3"
SIZES = {
    "embedding_length": 32,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "feed_forward_length": 40,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def contents(folder: Path, kind: str, **others: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a fixture as `write_gguf` takes them."""
    back = {theirs: ours for ours, theirs in NAMES.items()}
    tensors = {}
    for name, x in load_file(folder / "model.safetensors").items():
        *before, leaf = name.removesuffix(".weight").split(".")
        if before[:2] == ["model", "layers"]:
            name = f"blk.{before[2]}.{back['.'.join([*before[3:], leaf])]}.weight"
        else:
            name = f"{back['.'.join([*before, leaf])]}.weight"
        x = x.astype(np.float32)
        if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
            x = x[[head * 16 + i // 2 + 8 * (i % 2) for head in range(len(x) // 16) for i in range(16)]]
        tensors[name] = plain(x)
    metadata = {"general.architecture": kind} | {f"{kind}.{name}": x for name, x in (SIZES | others).items()}
    return metadata, tensors


@pytest.fixture
def llama() -> tuple[dict[str, Any], dict[str, Any]]:
    return contents(LLAMA, "llama", **{"attention.layer_norm_rms_epsilon": 1e-5})


def refuses(file: Path, *says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_pretrained(file)
    assert "\n" not in str(error.value)
    for text in (file.name, *says):
        assert text in str(error.value)


@pytest.mark.parametrize("name", [block.name for block in TYPES.values()])
def test_every_type_of_tensor_is_read_as_by_the_package_of_the_format(name):
    tensor, expected = read_gguf(FIXTURES / "blocks.gguf").tensors[name], np.load(FIXTURES / "blocks.npz")[name]
    assert tensor.shape == (3, 256) and TYPES[tensor.kind].name == name
    x = tensor.read()
    assert x.dtype == np.float32 and x.std() > 0.1
    np.testing.assert_array_equal(x, expected)


def test_every_type_of_metadata_is_read():
    found = {name: x for name, x in read_gguf(FIXTURES / "blocks.gguf").metadata.items() if name.startswith("test.")}
    kinds = ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64")
    expected = {kind: 100 + i if kind[0] == "U" else -100 - i for i, kind in enumerate(kinds)}
    expected |= {"FLOAT32": 1e-5, "FLOAT64": 1e-5, "BOOL": True, "STRING": "Ġcafé"}
    expected |= {"strings": ["a", "", "Ċ"], "ints": [1, -2, 3]}
    assert found == {f"test.{name}": x for name, x in expected.items()}


@pytest.mark.parametrize("folder", [LLAMA, QWEN3], ids=lambda folder: folder.name)
def test_a_model_is_the_same_as_in_hugging_faces_layout(folder, tmp_path):
    """Llama's rows of queries and keys are stored in another order, Qwen3's are not."""
    kind = folder.name.removeprefix("tiny_")
    eps = {"attention.layer_norm_rms_epsilon": 1e-5} if kind == "llama" else {}
    write_gguf(tmp_path / "model.gguf", *contents(folder, kind, **eps))
    with zipfile.ZipFile(tmp_path / "model.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "model.gguf", "package/model.gguf")
    expected = load_pretrained(folder)
    for name in ("model.gguf", "model.whl"):
        found = load_pretrained(tmp_path / name)
        assert found[:2] == expected[:2]
        jax.tree.map(np.testing.assert_array_equal, found[2], expected[2])


def test_a_quantised_tensor_is_read_in_the_model(llama, tmp_path):
    metadata, tensors = llama
    shape, _, data = tensors["blk.0.ffn_gate.weight"]
    x = np.frombuffer(data, "<f4").reshape(-1, 32)
    scale = np.abs(x).max(1, keepdims=True).astype(np.float16) / 127
    blocks = np.concatenate([scale.view(np.uint8), np.round(x / scale).astype(np.int8).view(np.uint8)], axis=1)
    tensors["blk.0.ffn_gate.weight"] = shape, 8, blocks.tobytes()
    write_gguf(tmp_path / "model.gguf", metadata, tensors)
    found, exact = (load_pretrained(path)[2]["params"]["mlp_0"] for path in (tmp_path / "model.gguf", LLAMA))
    error = np.abs(found["gate"]["kernel"] - exact["gate"]["kernel"])
    assert 0 < error.max() <= scale.max()
    np.testing.assert_array_equal(found["up"]["kernel"], exact["up"]["kernel"])


def test_llama_3s_factors_of_rotary_frequencies_are_read_and_others_refused(llama, tmp_path):
    metadata, tensors = llama
    wavelength = 2 * np.pi * 500_000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (8192 / wavelength - 1) / 3
    between = 1 / ((1 - smooth) / 32 + smooth)
    factor = np.where(wavelength > 8192, 32, np.where(wavelength < 2048, 1, between)).astype(np.float32)
    assert len(set(factor)) > 2
    metadata["llama.rope.freq_base"] = 500_000.0
    file = tmp_path / "model.gguf"
    write_gguf(file, metadata, tensors | {"rope_freqs.weight": plain(factor)})
    config = load_pretrained(file)[0]
    assert (config.rope_factor, config.rope_context, config.rope_theta) == (32, 8192, 500_000)
    factor[2] = 2
    write_gguf(file, metadata, tensors | {"rope_freqs.weight": plain(factor)})
    refuses(file, "rope_freqs.weight are not those of a Llama 3")
    write_gguf(file, metadata | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, tensors)
    assert load_pretrained(file)[0].rope_factor == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture (gemma3) must be llama, qwen2 or qwen3"),
        ({"llama.expert_count": 8}, "llama.expert_count (8) is not supported"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count (8) must be the size of a head (16)"),
        ({"llama.rope.scaling.type": "yarn"}, "rope_scaling"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window (4096) is not supported"),
        ({"llama.attention.head_count": "4"}, "llama.attention.head_count"),
        ({"llama.block_count": 3}, "has no tensor model.layers.2."),
        ({"llama.block_count": 1}, "holds the tensor model.layers.1."),
        ({"llama.embedding_length": 64}, "has shape [32, 32], but its config implies [32, 64]"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(llama, tmp_path, changes, says):
    metadata, tensors = llama
    write_gguf(tmp_path / "model.gguf", metadata | changes, tensors)
    refuses(tmp_path / "model.gguf", says)


def test_an_unknown_type_of_tensor_is_refused_by_name(llama, tmp_path):
    metadata, tensors = llama
    shape, _, data = tensors["blk.1.ffn_up.weight"]
    tensors["blk.1.ffn_up.weight"] = shape, 13, data
    write_gguf(tmp_path / "model.gguf", metadata, tensors)
    refuses(tmp_path / "model.gguf", "blk.1.ffn_up.weight has type 13 of GGUF, but must have F32, F16, Q4_0")


def test_a_file_that_is_damaged_is_named_wherever_it_ends(llama, tmp_path):
    file = tmp_path / "model.gguf"
    refuses(file, "is missing")
    write_gguf(file, *llama)
    data = file.read_bytes()
    says = "is truncated, damaged or not a GGUF file ("
    for kept in (0, 2, 10, 24, 100, 1000, len(data) // 2, len(data) - 100):
        file.write_bytes(data[:kept])
        refuses(file, says)
    for place, value in (
        (0, b"GGML"),
        (4, struct.pack("<I", 9)),
        (8, b"\xff" * 8),
        (16, b"\xff" * 8),
        (24, b"\xff" * 8),
    ):
        file.write_bytes(data[:place] + value + data[place + len(value) :])
        refuses(file, says)
    (tmp_path / "model.whl").write_bytes(data)
    refuses(tmp_path / "model.whl", says)
