"""Ready rewards. Each takes the completions and the row's column `answer`, where it has one, and returns 0 to 1."""

import re
from collections.abc import Callable, Sequence

from purepg.types import UsageError

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")
MARK = "####"

Reward = Callable[..., list[float]]


def exact(completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 if the completion is the answer, but for spaces around it."""
    return [float(text.strip() == str(right).strip()) for text, right in zip(completions, answer, strict=True)]


def number(completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 if the number after the last `####` equals the answer's, as in GSM8K; an answer without the mark is one."""
    return [_equal(after_mark(text), right) for text, right in zip(completions, answer, strict=True)]


def last_number(completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 if the completion's last number equals the answer's."""
    return [_equal(last_of(text), right) for text, right in zip(completions, answer, strict=True)]


def after_mark(text: str) -> float | None:
    """The first number after the last mark; None if there is none."""
    _, mark, rest = text.rpartition(MARK)
    found = NUMBER.search(rest) if mark else None
    return _value(found.group()) if found else None


def last_of(text: str) -> float | None:
    """The last number in a text; None if there is none."""
    found = NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("$", ""))


def _equal(found: float | None, answer: object) -> float:
    if isinstance(answer, int | float):
        return float(found == answer)
    right = after_mark(str(answer)) if MARK in str(answer) else last_of(str(answer))
    return float(found is not None and found == right)


def format_of(pattern: str) -> Reward:
    """1 if the whole completion, but for spaces around it, matches a regular expression; . matches line ends too.

    Raises:
      UsageError: it is no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UsageError(f"reward (format:{pattern}) must have a regular expression: {error}") from error

    def form(completions: Sequence[str]) -> list[float]:
        return [float(compiled.fullmatch(text.strip()) is not None) for text in completions]

    return form


def length_of(characters: str) -> Reward:
    """1 for up to so many characters, from there falling linearly to 0 at twice as many.

    Raises:
      UsageError: it is no positive whole number.
    """
    if not characters.isdecimal() or not int(characters):
        raise UsageError(f"reward (length:{characters}) must have a number of characters, as in length:200")
    limit = int(characters)

    def short(completions: Sequence[str]) -> list[float]:
        return [min(1.0, max(0.0, 2 - len(text.strip()) / limit)) for text in completions]

    return short


READY: dict[str, Reward] = {"exact": exact, "number": number, "last_number": last_number}
OF_ARGUMENT: dict[str, Callable[[str], Reward]] = {"format": format_of, "length": length_of}
