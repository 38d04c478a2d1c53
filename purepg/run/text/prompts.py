"""Prompts from a file in JSON Lines: read, tokenised once, and laid into a table."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purepg.run.console import reason
from purepg.types import UsageError

TEXT, MESSAGES = "prompt", "messages"
DATE = datetime.date(2024, 7, 26)  # that of Llama 3's template; today's would change the prompts of a resumed run


class Prompts(NamedTuple):
    """The rows of a file, in its order."""

    file: Path
    line: list[int]  # each row's, from 1
    messages: list[list[dict[str, str]]]
    columns: dict[str, list]  # the others, by name

    @property
    def text(self) -> list[str]:
        """Each prompt, or its last message."""
        return [messages[-1]["content"] for messages in self.messages]

    def first(self, number: int) -> "Prompts":
        """The first rows; 0: all."""
        kept = slice(number or None)
        columns = {name: values[kept] for name, values in self.columns.items()}
        return self._replace(line=self.line[kept], messages=self.messages[kept], columns=columns)


def read_prompts(path: str, what: str) -> Prompts:
    """Reads a file of prompts.

    Args:
      what: the flag that names it, for error messages.
    Raises:
      UsageError: the file cannot be read, has no rows, or a row is no prompt or has other columns than the first.
    """
    file = Path(path)
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} ({file}) cannot be read: {reason(error)}") from error
    rows = {i: _row(file, i, line) for i, line in enumerate(lines, 1) if line.strip()}
    if not rows:
        raise UsageError(f"{what} ({file}) has no rows: write one prompt a line, as in {{{json.dumps(TEXT)}: ...}}")
    names = [name for name in next(iter(rows.values())) if name not in (TEXT, MESSAGES)]
    for i, row in rows.items():
        if differs := (row.keys() - {TEXT, MESSAGES}) ^ set(names):
            name = min(differs)
            has = "lacks" if name in names else "has"
            raise UsageError(f"{file}, row {i} {has} the column {name}, unlike row {next(iter(rows))}")
    messages = [_messages(file, i, row) for i, row in rows.items()]
    columns = {name: [row[name] for row in rows.values()] for name in names}
    return Prompts(file, list(rows), messages, columns)


def digest(path: str) -> str:
    """Sixteen hexadecimal digits that identify a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _row(file: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except UnicodeEncodeError as error:
        raise UsageError(f"{file}, row {line} holds half of a surrogate pair, which is no text") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}, row {line} is not JSON: {reason(error)}") from error
    if not isinstance(row, dict) or (TEXT in row) == (MESSAGES in row):
        raise UsageError(f"{file}, row {line} must be an object with either {TEXT} or {MESSAGES}")
    return row


def _messages(file: Path, line: int, row: Mapping[str, Any]) -> list[dict[str, str]]:
    found = [{"role": "user", "content": row[TEXT]}] if TEXT in row else row[MESSAGES]
    texts = isinstance(found, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in found
    )
    if not found or not texts:
        what = f"{TEXT} must be text" if TEXT in row else f"{MESSAGES} must be a list of objects with role and content"
        raise UsageError(f"{file}, row {line}: {what}")
    return found


def table(prompts: Prompts, tokenizer: Any, chat: bool, longest: int) -> np.ndarray:
    """The prompts' tokens `[n, L]`, left-padded with -1 to the longest.

    Raises:
      UsageError: a prompt has no tokens or more than `longest`, or the tokenizer has no chat template.
    """
    rows = []
    for line, messages in zip(prompts.line, prompts.messages, strict=True):
        plain = "".join(message["content"] for message in messages)
        tokens = tokenizer.encode(tokenizer.chat(messages, strftime_now=DATE.strftime) if chat else plain)
        if not 0 < len(tokens) <= longest:
            allowed = f"1 to {longest} (prompt_length)"
            raise UsageError(f"{prompts.file}, row {line} has {len(tokens)} tokens; a prompt may have {allowed}")
        rows.append(tokens)
    return padded(rows)


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of tokens `[n, L]`, left-padded with -1."""
    token = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, tokens in zip(token, rows, strict=True):
        row[len(row) - len(tokens) :] = tokens
    return token


def in_epochs(seeds: Sequence[int], num_prompts: int, first: int, count: int) -> np.ndarray:
    """`count` prompts from the `first` on of an endless sequence of shuffled epochs, `[count]` places in the table.

    Args:
      seeds: numbers that name the sequence.
    """
    epochs = range(first // num_prompts, -(-(first + count) // num_prompts))
    order = [np.random.default_rng([*seeds, epoch]).permutation(num_prompts) for epoch in epochs]
    return np.concatenate(order)[first % num_prompts :][:count]
