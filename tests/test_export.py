"""Folders for other programs: what is written is what was there, and transformers computes the same with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.language.export import save_pretrained
from purepg.language.pretrained import load_pretrained
from purepg.language.tokenizer import SPLITS, load_tokenizer
from purepg.language.transformer import Transformer, TransformerConfig
from purepg.run.export import Choice, export
from purepg.types import UsageError

tokenizers: Any = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

FIXTURES = Path(__file__).parent / "fixtures"  # whose README says how they were made
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("tiny_llama", {}),
    "llama3": ("tiny_llama", {"rope_factor": 8.0, "rope_context": 32}),
    "linear": ("tiny_llama", {"rope_factor": 4.0}),
    "qwen2": ("tiny_qwen2", {}),
    "qwen3": ("tiny_qwen3", {}),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}<|im_start|>"
MESSAGES = [{"role": "user", "content": "1 + 2?"}]


def model(name: str) -> tuple[TransformerConfig, int, Any]:
    folder, changes = MODELS[name]
    config, num_tokens, params = load_pretrained(FIXTURES / folder)
    return replace(config, **changes), num_tokens, params


@pytest.fixture
def words(tmp_path) -> Path:
    """A tokenizer of at most 48 tokens that splits text as Qwen2's, which transformers does for every Qwen2."""
    made, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(SPLITS["qwen2"]), "isolated")
    made.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=48, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(["user: 1 + 2?"], trainer)
    folder = tmp_path / "words"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_again_as_it_was(name, tmp_path):
    config, num_tokens, params = model(name)
    with_value = {"params": params["params"] | {"value_head": {"kernel": np.ones((32, 1)), "bias": np.ones(1)}}}
    save_pretrained(tmp_path / "out", replace(config, value_head=True), with_value)
    found = load_pretrained(tmp_path / "out")
    assert found[:2] == (config, num_tokens)
    jax.tree.map(np.testing.assert_array_equal, found[2], params)


def test_bfloat16_rounds_to_the_nearest(tmp_path):
    config, _, params = model("llama")
    save_pretrained(tmp_path, config, params, dtype=jnp.bfloat16)
    found = load_pretrained(tmp_path)[2]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), found, params)
    assert not np.array_equal(found["params"]["embedding"], params["params"]["embedding"])


def test_the_tokenizer_is_written_beside_the_model(words, tmp_path):
    config, num_tokens, params = model("qwen3")
    save_pretrained(tmp_path / "out", config, params, load_tokenizer(words))
    one, other = load_tokenizer(words), load_tokenizer(tmp_path / "out")
    assert (one.stop, one.special, one.template) == (other.stop, other.special, other.template)
    assert one.encode("user: 21<|im_end|>") == other.encode("user: 21<|im_end|>")
    assert one.chat(MESSAGES) == other.chat(MESSAGES)
    assert other.num_tokens == num_tokens > one.num_tokens


def test_what_cannot_be_written_is_refused_before_anything_is(words, tmp_path):
    config, _, params = model("qwen2")
    out = tmp_path / "out"

    def refuses(says: str, config=config, params=params, **others: Any) -> None:
        with pytest.raises(UsageError, match=says):
            save_pretrained(out, config, params, **others)
        assert not out.exists()

    refuses("the tokenizer has .* ids, but the model 48", tokenizer=replace(load_tokenizer(words), stop=(2, 48)))
    refuses("neither Qwen2 nor Qwen3", config=replace(config, qk_norm=True))
    refuses("to fit the config", config=replace(config, num_layers=1))
    refuses("to fit the config", params={"params": params["params"] | {"adapter": np.zeros(1)}})
    refuses("must be float32 or bfloat16", dtype=jnp.float16)
    with pytest.raises(UsageError, match="must be a new or an empty folder"):
        save_pretrained(words, config, params)


def test_the_command_writes_a_checkpoint_with_its_own_tokenizer(words, tmp_path):
    config, _, params = model("qwen3")
    save_pretrained(tmp_path / "one", config, params, load_tokenizer(words))
    said = export(Choice(tmp_path / "one", tmp_path / "two"))
    assert "48 tokens, with the tokenizer of" in said
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits_and_the_same_greedy_answer(name, words, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config, num_tokens, params = model(name)
    tokenizer = load_tokenizer(words)
    save_pretrained(tmp_path / "out", config, params, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.chat(MESSAGES)
    assert reader.apply_chat_template(MESSAGES, tokenize=False) == text
    ids = tokenizer.encode(text)
    assert reader(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == list(tokenizer.stop)

    apply = quick_jit(Transformer(config, num_tokens).apply)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        answer = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    row = np.full((1, len(ids) + 8), -1)
    row[0, : len(ids)] = ids
    logits = apply(params, row)[0][0]
    np.testing.assert_allclose(logits[: len(ids)], expected, rtol=1e-5, atol=1e-5)
    for at in range(len(ids), row.shape[1]):
        row[0, at] = np.argmax(apply(params, row)[0][0, at - 1])
        if row[0, at] in tokenizer.stop:
            break
    assert answer == row[row >= 0].tolist()
