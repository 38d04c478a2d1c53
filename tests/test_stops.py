"""What ends a response: the automaton of stop sequences, and of texts however tokens cut them."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.envs.stops import automaton, ended, of_words
from purepg.language.tokenizer import Tokenizer
from purepg.run.text.environment import completion, stop_table
from purepg.types import UsageError

tokenizers: Any = pytest.importorskip("tokenizers")

STOPS = {
    "overlapping": ("aab", "abaa"),
    "one within another": ("baab", "aa", "a\n"),
    "of characters of several bytes": ("é", "日本"),
    "of several tokens": ("User:", "\n\n", "<|end|>"),  # the last is no special token where it is spelt
}
EOS, SPECIAL, NUM_TOKENS = 0, 1, 300


@pytest.fixture(scope="module", params=["byte-level", "pieces"])
def tokenizer(request) -> Tokenizer:
    """Tokens of letters, of pieces of words, and of single bytes of characters."""
    pieces = ["aa", "ab", "aaab", "ba", "User", "Us", "er", ":\n", "\n\n", ":", "b\n\nU", "xé", "é日", " a", "<|end"]
    special = ["<|eos|>", "<|end|>"]
    if request.param == "byte-level":
        pre, decoder = tokenizers.pre_tokenizers, tokenizers.decoders.ByteLevel()
        spelt = [pre.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(x)[0][0] for x in pieces]
        tokens = [*special, *sorted(pre.ByteLevel.alphabet()), *spelt]
    else:
        steps = tokenizers.decoders
        decoder = [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
        decoder = steps.Sequence(decoder)
        tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *(x.replace(" ", "▁") for x in pieces)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.decoder = decoder
    backend.add_special_tokens(special)
    return Tokenizer(backend, NUM_TOKENS, (EOS,), {}, None)


def responses(tokenizer: Tokenizer, stop: tuple[str, ...], number: int, length: int) -> np.ndarray:
    """Tokens `[number, length]` of random beginnings of the stops, cut in random places, and tokens without bytes."""
    rng = np.random.default_rng(0)
    parts = [x.encode()[: i + 1] for x in stop for i in range(len(x.encode()))] + [b"x", b" a"]

    def response():
        text, row = b"".join(parts[i] for i in rng.integers(len(parts), size=4 * length)), []
        while len(row) < length:
            fits = [i for i, piece in enumerate(tokenizer.pieces) if piece and text.startswith(piece)]
            row.append(rng.choice([SPECIAL, NUM_TOKENS - 1] if rng.random() < 0.1 else fits))
            text = text[len(tokenizer.pieces[row[-1]]) :]
        return row

    return np.array([response() for _ in range(number)], np.int32)


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_response_ends_with_the_token_that_completes_a_text_however_the_tokens_cut_it(tokenizer, stop):
    table, rows = stop_table(tokenizer, stop), responses(tokenizer, stop, 100, 12)
    found = np.asarray(quick_jit(lambda rows: ended(table, rows))(rows))
    encoded = [x.encode() for x in stop]
    texts = [[b"".join(tokenizer.pieces[x] for x in row[: i + 1]) for i in range(len(row))] for row in rows]
    expected = np.array([[any(x in text for x in encoded) for text in of_row] for of_row in texts])
    np.testing.assert_array_equal(found, expected)
    assert 0.2 < expected[:, -1].mean() < 1
    assert {x for x in encoded for of_row in texts if x in of_row[-1]} == {*encoded}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_completion_is_the_decoded_text_before_the_stop(tokenizer, stop):
    rows = responses(tokenizer, stop, 100, 12)
    over = np.asarray(ended(stop_table(tokenizer, stop), rows))
    texts = set()
    for row, end in zip(rows, over, strict=True):
        length = int(end.argmax()) + 1 if end.any() else len(row)
        text = tokenizer.decode(row[:length])
        at = [text.index(x) for x in stop if x in text]
        if end.any() and not at:  # beside bytes that are no text, the decoder of pieces shows none of a stop's
            continue
        padded = np.where(np.arange(len(row)) < length, row, -1)
        assert completion(tokenizer, stop, padded) == text[: min(at, default=len(text))]
        texts.add(text)
    assert len(texts) > 20


def test_pieces_are_the_bytes_of_a_text_and_those_of_special_tokens_are_none(tokenizer):
    rows = np.random.default_rng(1).integers(0, NUM_TOKENS, (200, 3))
    for row in rows:
        text = b"".join(tokenizer.pieces[x] for x in row)
        try:
            assert text.decode().removeprefix(" ") == tokenizer.decode(row).removeprefix(" ")
        except UnicodeDecodeError:
            assert "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(row)
    assert tokenizer.pieces[EOS] == tokenizer.pieces[SPECIAL] == tokenizer.pieces[NUM_TOKENS - 1] == b""


def test_the_automaton_of_words_is_that_of_their_symbols_and_the_tokenizers_own_end_too(tokenizer):
    table = automaton([(0, 0, 1), (2,)], 3)
    assert table.tolist() == [[1, 0, 3], [2, 0, 3], [2, 3, 3]]
    assert of_words(table, [(0, 0), (0, 1), (0, 2, 0), ()]).tolist() == [[2, 0, 3, 0], [2, 3, 3, 1], [2, 3, 3, 2]]
    own = stop_table(tokenizer)
    assert own.shape == (1, NUM_TOKENS) and own.nonzero()[1].tolist() == [EOS]
    assert (stop_table(tokenizer, ("User:",))[:, EOS] == 5).all()
    assert stop_table(tokenizer, ("User:",)).dtype == np.uint8
    read = ended(own, jnp.array([[5, EOS, -1, 7], [-1, -1, 5, 5]]))
    assert read.tolist() == [[False, True, True, True], [False] * 4]


def test_texts_that_are_empty_and_decoders_that_are_not_known_are_one_line(tokenizer):
    with pytest.raises(UsageError, match=r"^stop \('a' ''\) must be texts that are not empty$"):
        stop_table(tokenizer, ("a", ""))
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    words.decoder = tokenizers.decoders.WordPiece()
    made = partial(Tokenizer, words, 1, (0,), {}, None)
    with pytest.raises(
        UsageError, match=r"^the bytes of tokens are not known for a decoder of WordPiece: set no stop$"
    ):
        stop_table(made(), ("a",))
    assert stop_table(made()).tolist() == [[1]]
