"""Checkpoints in Hugging Face's layout: the reference implementation's logits, and one clear line for what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.language.pretrained import load_pretrained, read_config
from purepg.language.transformer import Transformer, TransformerConfig
from purepg.types import UsageError

FIXTURES = Path(__file__).parent / "fixtures"  # whose README says how they were made
LLAMA, QWEN2, QWEN3 = (FIXTURES / f"tiny_{name}" for name in ("llama", "qwen2", "qwen3"))
FILE = "model.safetensors"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(LLAMA, tmp_path / "llama"))


@pytest.fixture
def qwen2(tmp_path) -> Path:
    return Path(shutil.copytree(QWEN2, tmp_path / "qwen2"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another header before the same bytes."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])


def write(file: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header, at = {}, 0
    for name, (dtype, x) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    body = b"".join(x.tobytes() for _, x in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def stored(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of a file of float32, as `write` takes them."""
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return {
        name: (x["dtype"], np.frombuffer(data[begin:][slice(*x["data_offsets"])], "<f4").reshape(x["shape"]))
        for name, x in header.items()
    }


@pytest.mark.parametrize("folder", [LLAMA, QWEN2, QWEN3], ids=lambda folder: folder.name)
def test_logits_are_the_reference_implementations(folder):
    """In rows with empty places on both sides; of Qwen2 in two files of bfloat16, of Llama in one of float32, of Qwen3
    with norms of queries and keys."""
    config, num_tokens, params = load_pretrained(folder)
    expected = np.load(folder / "expected.npz")
    present = expected["token"] >= 0
    assert 0 < present.mean() < 1 and expected["logits"].std() > 1
    logits, value, _ = quick_jit(Transformer(config, num_tokens).apply)(params, expected["token"])
    assert value is None and logits.shape == expected["logits"].shape
    np.testing.assert_allclose(logits[present], expected["logits"][present], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_positions_are_the_reference_implementations(llama, kind, where):
    factor = {"linear": 4.0, "llama3": 8.0}[kind]
    edit_json(llama / "config.json", rope_parameters=None)
    edit_json(
        llama / "config.json", **{where: {"rope_type": kind, "factor": factor} | (LLAMA3 if kind == "llama3" else {})}
    )
    config, num_tokens, params = load_pretrained(llama)
    token, expected = np.load(LLAMA / "expected.npz")["token"][:1], np.load(LLAMA / "scaled.npz")[kind]
    logits = quick_jit(Transformer(config, num_tokens).apply)(params, token)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=2e-5)


def test_the_config_is_what_config_json_says():
    assert read_config(LLAMA / "config.json") == (
        TransformerConfig(32, 2, 4, 2, head_dim=16, mlp_size=40, rms_eps=1e-5, tied_head=False),
        80,
    )
    assert read_config(QWEN2 / "config.json") == (
        TransformerConfig(32, 2, 4, 1, mlp_size=40, rope_theta=1000.0, tied_head=True, qkv_bias=True),
        48,
    )
    assert read_config(QWEN3 / "config.json") == (
        TransformerConfig(32, 2, 4, 2, head_dim=16, mlp_size=40, tied_head=True, qk_norm=True),
        48,
    )


def test_older_configs_have_rope_theta_beside_the_rest_and_what_is_left_out_has_its_default(llama):
    file = llama / "config.json"
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    file.write_text(json.dumps({"model_type": "llama", "vocab_size": 80, "rope_theta": 500, **shape}))
    assert read_config(file)[0] == TransformerConfig(32, 2, 4, 4, mlp_size=40, rope_theta=500.0, tied_head=False)
    edit_json(file, rope_theta=None, rope_scaling={"type": "default"})
    assert read_config(file)[0].rope_theta == 10_000.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_of_the_dtype_asked_for_and_of_the_tree_of_the_transformer(dtype):
    config, num_tokens, params = load_pretrained(QWEN2, dtype=dtype)
    shapes = jax.eval_shape(Transformer(config, num_tokens).init, jax.random.key(0), np.zeros((1, 1), np.int32))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}


@pytest.mark.parametrize(("name", "kind"), [("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", jnp.bfloat16)])
def test_every_float_dtype_is_read_for_what_it_is_wherever_in_the_file_it_lies(llama, name, kind):
    """Small integers, which all of them hold; behind a header of odd length and a tensor of five bytes."""
    shapes = {}
    rewrite(llama / FILE, lambda header: shapes.update(header))
    rng = np.random.default_rng(0)
    numbers = {x: rng.integers(-8, 9, y["shape"]) for x, y in shapes.items() if x != "__metadata__"}
    odd = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("U8", np.zeros(5, np.uint8))}  # in older files; not read
    write(llama / FILE, odd | {x: (name, y.astype(kind)) for x, y in numbers.items()})
    params = load_pretrained(llama)[2]["params"]
    np.testing.assert_array_equal(params["embedding"], numbers["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["attention_1"]["query"]["kernel"], numbers[QUERY].T)
    np.testing.assert_array_equal(params["final_norm"]["scale"], numbers["model.norm.weight"])


def test_a_tied_checkpoint_may_hold_its_head_all_the_same(llama):
    edit_json(llama / "config.json", tie_word_embeddings=True)
    config, _, params = load_pretrained(llama)
    assert config.tied_head and "head" not in params["params"]


def refuses(folder: Path, *says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
    for text in says:
        assert text in str(error.value)


def test_a_folder_or_a_file_that_is_missing_is_named(llama, qwen2):
    refuses(llama / "nowhere", "nowhere", "no folder")
    (llama / FILE).unlink()
    refuses(llama, f"neither {FILE} nor {FILE}.index.json")
    (llama / "config.json").unlink()
    refuses(llama, "config.json is missing")
    (qwen2 / "model-00002-of-00002.safetensors").unlink()
    refuses(qwen2, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("\xff", "is not JSON"), ("[]", "a JSON object")])
def test_a_config_or_an_index_that_is_not_json_is_named(llama, qwen2, text, says):
    for folder, name in ((llama, "config.json"), (qwen2, f"{FILE}.index.json")):
        (folder / name).write_bytes(text.encode("latin-1"))
        refuses(folder, name, says)


def test_an_index_without_a_map_is_named(qwen2):
    for wrong in (None, [], {QUERY: 1}):
        edit_json(qwen2 / f"{FILE}.index.json", weight_map=wrong)
        refuses(qwen2, "index.json", "weight_map")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "model_type (gpt2) must be llama, qwen2 or qwen3"),
        ({"model_type": "gemma3_text"}, "model_type (gemma3_text) must be llama, qwen2 or qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act (gelu) is not supported"),
        ({"attention_bias": True}, "attention_bias (True) is not supported"),
        ({"mlp_bias": True}, "mlp_bias (True) is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor (0.5) is not supported"),
        ({"sliding_window": 64}, "sliding_window (64) is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor (None) must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 2}}, "must be 1.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": 1}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_factor (0.0) must be above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "high"}}, "rope_theta (high) must be a number"),
        ({"hidden_size": None}, "hidden_size (None) must be an integer"),
        ({"vocab_size": 80.5}, "vocab_size (80.5) must be an integer"),
        ({"vocab_size": -80}, "vocab_size (-80) must be at least 1"),
        ({"layer_types": [["full_attention"]]}, "layer_types ([['full_attention']]) is not supported"),
        ({"layer_types": 2}, "layer_types (2) is not supported"),
        ({"num_key_value_heads": 3}, "num_heads (4) must be divisible by num_kv_heads (3)"),
        ({"rms_norm_eps": 0}, "rms_eps (0.0) must be above 0"),
    ],
)
def test_a_config_that_asks_for_what_is_not_done_here_is_refused_by_the_fields_name(llama, changes, says):
    edit_json(llama / "config.json", **changes)
    refuses(llama, "config.json", says)


def test_a_sliding_window_is_refused_where_it_is_used_and_only_there(qwen2):
    file = qwen2 / "config.json"
    edit_json(file, sliding_window=4096)
    read_config(file)
    edit_json(file, use_sliding_window=True)
    refuses(qwen2, "use_sliding_window")
    edit_json(file, use_sliding_window=False, layer_types=["full_attention", "sliding_attention"])
    refuses(qwen2, "layer_types", "sliding_attention")


def test_a_tensor_that_is_missing_or_one_too_many_is_named(llama):
    tensors = stored(llama / FILE)
    write(llama / FILE, tensors | {"model.extra.weight": tensors[QUERY]})
    refuses(llama, FILE, "model.extra.weight")
    write(llama / FILE, {name: x for name, x in tensors.items() if name != QUERY})
    refuses(llama, f"has no tensor {QUERY}")


def test_a_tensor_of_another_shape_is_named_with_both(llama):
    rewrite(llama / FILE, lambda header: header[QUERY].update(shape=[32, 64]))
    refuses(llama, FILE, QUERY, "[32, 64]", "[64, 32]")


def test_a_config_of_another_size_than_the_tensors_is_refused(llama):
    edit_json(llama / "config.json", vocab_size=81)
    refuses(llama, FILE, "[80, 32]", "[81, 32]")


def test_an_unknown_dtype_is_named(llama):
    tensors = stored(llama / FILE)
    write(llama / FILE, tensors | {QUERY: ("F8_E4M3", np.zeros(tensors[QUERY][1].shape, np.uint8))})
    refuses(llama, FILE, QUERY, "F8_E4M3")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F16"},
        {"dtype": ["F32"]},
        {"dtype": "F5"},
        {"shape": [64, -32]},
        {"shape": [64, 33]},
        {"shape": "64x32"},
        {"data_offsets": [0.5, 8192.5]},
        {"data_offsets": [-8192, 0]},
        {"data_offsets": [0, 8192]},  # where another tensor lies
        {"data_offsets": [0]},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_a_header_that_does_not_describe_the_bytes_behind_it_is_refused_by_the_files_name(llama, change):
    rewrite(llama / FILE, lambda header: header[QUERY].update(change))
    refuses(llama, f"{FILE} is truncated, damaged or not a safetensors file (")


def test_bytes_of_no_tensor_are_refused_too(llama):
    rewrite(llama / FILE, lambda header: header.pop(QUERY))
    refuses(llama, f"{FILE} is truncated, damaged or not a safetensors file (")


def test_parameters_are_no_view_of_the_file(llama):
    params = load_pretrained(llama)[2]
    before = jax.tree.map(lambda x: np.array(x, copy=True), params)
    with (llama / FILE).open("r+b") as file:  # the same file, so that what is mapped would change
        file.write(bytes((llama / FILE).stat().st_size))
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named_wherever_it_ends(llama, kept):
    data = (llama / FILE).read_bytes()
    (llama / FILE).write_bytes(data[:kept])
    refuses(llama, f"{FILE} is truncated")  # the folder is named after the test


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"x": 1}', b'{"x": {"dtype": "F32", "shape": [1]}}'])
def test_a_file_without_a_header_is_named(llama, header):
    (llama / FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    refuses(llama, f"{FILE} is truncated, damaged or not a safetensors file (")


def test_nothing_in_the_module_can_reach_a_network():
    """Only files and what the project computes with."""
    import purepg.language.pretrained

    source = Path(purepg.language.pretrained.__file__).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"collections", "json", "numpy", "pathlib", "typing", "jax", "safetensors", "purepg"}
