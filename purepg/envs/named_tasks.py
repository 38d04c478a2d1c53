"""Four tasks: addition, sorting, reversing and countdown. `purepg.envs.make` knows them by name.

A digit's token is its value. All prompts of a task are distinct rows of a table; a fixed tenth of them is held out.
"""

import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.tasks import Task
from purepg.types import Array, Key, UsageError

DIGITS = tuple("0123456789")
HELD_OUT = 0.1


def _draw(*strata: tuple[np.ndarray, np.ndarray]) -> Callable[[Key, bool], Array]:
    """Returns a function that draws a prompt: first a stratum, then one of its rows, each uniformly.

    A stratum is its distinct prompts `[n, prompt_length]`, and `[n]` the index, counted from 0 without gaps, of the
    problem that each poses. Prompts that pose the same problem are held out together.
    """
    rng = np.random.default_rng(0)
    rows: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for stratum, problem in strata:
        num_problems = problem.max() + 1
        is_held_out = rng.permutation(num_problems)[problem] < round(HELD_OUT * num_problems)
        for part in rows:
            rows[part].append(stratum[is_held_out == part])
    table = {part: np.concatenate(x).astype(np.int8) for part, x in rows.items()}
    first = {part: np.cumsum([0, *map(len, x)], dtype=np.int32) for part, x in rows.items()}

    def prompt(key, held_out):
        k_stratum, k_row = jax.random.split(key)
        bound = jnp.asarray(first[held_out])
        stratum = jax.random.randint(k_stratum, (), 0, len(strata))
        row = jax.random.randint(k_row, (), bound[stratum], bound[stratum + 1])
        return jnp.asarray(table[held_out])[row].astype(jnp.int32)

    return prompt


def _digits(number: np.ndarray, width: int) -> np.ndarray:
    """Writes `[n]` numbers in decimal, as `[n, width]`, with -1 for leading zeros; the number 0 keeps one digit."""
    place = 10 ** np.arange(width)[::-1]
    return np.where((number[:, None] < place) & (place > 1), -1, number[:, None] // place % 10)


def _left_padded(rows: np.ndarray) -> np.ndarray:
    """Moves each row's padding to the left; the tokens keep their order: `[n, length]`."""
    return np.take_along_axis(rows, np.argsort(rows >= 0, axis=1, kind="stable"), axis=1)


def _digit_strings(length: int, mark: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Strata for `_draw`: all strings of 2, 3, ..., `length` digits, each followed by `mark`."""
    strata = []
    for n in range(2, length + 1):
        digits = np.arange(10**n)[:, None] // 10 ** np.arange(n)[::-1] % 10
        rows = np.pad(digits, ((0, 0), (length - n, 0)), constant_values=-1)
        strata.append((np.pad(rows, ((0, 0), (0, 1)), constant_values=mark), np.arange(10**n)))
    return tuple(strata)


def _ended(token: Array, n: Array, eos: int) -> Array:
    """The first `n` tokens, then EOS, then padding: `[response_length]`."""
    column = jnp.arange(token.shape[0])
    return jnp.where(column < n, token, jnp.where(column == n, eos, -1)).astype(jnp.int32)


def _only_answer(
    answer: Callable[[Array], Array], prompt_length: int, response_length: int
) -> tuple[Callable[[Key, Array], Array], Callable[[Array, Array], Array]]:
    """Returns (demonstration, reward) for a task whose only right response is `answer(prompt)`."""

    def demonstration(key, prompt):
        del key
        chex.assert_shape(prompt, (prompt_length,))
        return answer(prompt)

    def reward(prompt, response):
        chex.assert_shape([prompt, response], [(prompt_length,), (response_length,)])
        return jnp.all(response == answer(prompt)).astype(jnp.float32)

    return demonstration, reward


# --- tasks ---


def addition(num_digits: int = 2, ones_first: bool = True) -> Task:
    """`37+5=` is answered `24.`: two numbers below 10^num_digits, drawn uniformly, and their sum.

    `ones_first` writes the sum's digits starting with the ones, as in addition by hand, so that each digit needs only
    the carry of those before it. False writes them in reading order, which needs every carry in advance and is much
    harder to learn (Lee et al. 2023). a+b and b+a are held out together. Raises UsageError if num_digits is not in 1,
    2, 3.
    """
    if num_digits not in (1, 2, 3):
        raise UsageError(f"num_digits ({num_digits}) must be in 1, 2, 3, because all prompts are stored in a table")
    vocabulary = (*DIGITS, "+", "=", ".")
    plus, equals, eos = 10, 11, 12
    P, R, n = 2 * num_digits + 2, num_digits + 2, 10**num_digits
    a, b = np.divmod(np.arange(n * n), n)
    columns = _digits(a, num_digits), np.full(n * n, plus), _digits(b, num_digits), np.full(n * n, equals)
    problem = np.unique(np.minimum(a, b) * n + np.maximum(a, b), return_inverse=True)[1]

    def answer(prompt):
        total, number = jnp.int32(0), jnp.int32(0)
        for token in prompt:
            total = jnp.where(token >= plus, total + number, total)
            number = jnp.where((token >= 0) & (token < plus), 10 * number + token, 0)
        length = 1 + jnp.sum(total >= 10 ** jnp.arange(1, num_digits + 1))
        column = jnp.arange(R)
        place = jnp.minimum(column, length - 1) if ones_first else jnp.maximum(length - 1 - column, 0)
        return _ended(total // 10**place % 10, length, eos)

    prompt = _draw((_left_padded(np.column_stack(columns)), problem))
    return Task("addition", vocabulary, eos, P, R, prompt, *_only_answer(answer, P, R))


def sorting(length: int = 5) -> Task:
    """`31415>` is answered `11345.`: 2 to `length` digits in ascending order.

    The number of digits is drawn uniformly, then the digits; drawing strings uniformly would give nine in ten the
    largest length. A tenth of each length is held out. Raises UsageError if `length` is not in 2, ..., 6.
    """

    def answer(prompt, mark, eos):
        is_digit = (prompt >= 0) & (prompt < mark)
        return _ended(jnp.sort(jnp.where(is_digit, prompt, mark)), jnp.sum(is_digit), eos)

    return _on_digits("sorting", ">", length, answer)


def reversing(length: int = 5) -> Task:
    """`3141<` is answered `1413.`: 2 to `length` digits in reverse order. Prompts and errors are as for `sorting`."""

    def answer(prompt, mark, eos):  # flipped, the mark comes first and the padding last
        del mark
        return _ended(jnp.roll(jnp.flip(prompt), -1), jnp.sum(prompt >= 0) - 1, eos)

    return _on_digits("reversing", "<", length, answer)


def _on_digits(name: str, mark_text: str, length: int, answer: Callable[[Array, int, int], Array]) -> Task:
    """A task with 2 to `length` digits and a mark as prompts, and `answer(prompt, mark, eos)` as the right response."""
    if length not in range(2, 7):
        raise UsageError(f"length ({length}) must be in 2, ..., 6, because all prompts are stored in a table")
    mark, eos, shape = 10, 11, (length + 1, length + 1)
    right = _only_answer(lambda prompt: answer(prompt, mark, eos), *shape)
    return Task(name, (*DIGITS, mark_text, "."), eos, *shape, _draw(*_digit_strings(length, mark)), *right)


def countdown(num_numbers: int = 3) -> Task:
    """`3 4 2:10` is answered `3*4-2.`, or with any other expression that uses each number exactly once, in any order,
    with `+`, `-` and `*`, and has the target's value. There are no parentheses, and `*` binds first.

    Numbers are 1, ..., 9. Prompts are drawn uniformly from all that have a solution and a target in 1, ..., 99; prompts
    that differ only in the order of their numbers are held out together. A demonstration is drawn uniformly from the
    solutions, where a repeated number counts each reading twice. Raises UsageError if num_numbers is not in 2, 3, 4.
    """
    if num_numbers not in (2, 3, 4):
        raise UsageError(f"num_numbers ({num_numbers}) must be in 2, 3, 4, because all prompts are stored in a table")
    vocabulary = (*DIGITS, "+", "-", "*", " ", ":", ".")
    operators, space, colon, eos = (10, 11, 12), 13, 14, 15
    k, P, R = num_numbers, 2 * num_numbers + 2, 2 * num_numbers
    operator = np.array(list(itertools.product(operators, repeat=k - 1)))  # [3^(k-1), k-1]

    given = np.array(list(itertools.product(range(1, 10), repeat=k)))  # [9^k, k]
    bag = np.sort(given, axis=1) @ 10 ** np.arange(k)  # [9^k], the same for every order
    value = _value(given[:, None], operator)  # [9^k, 3^(k-1)]
    reachable = np.zeros((10**k, 100), bool)
    reachable[np.broadcast_to(bag[:, None], value.shape), np.where((value >= 1) & (value <= 99), value, 0)] = True
    index, target = np.nonzero(reachable[bag] & (np.arange(100) > 0))
    mark = np.append(np.full(k - 1, space), colon)
    numbers = np.stack(np.broadcast_arrays(given[index], mark), axis=-1).reshape(-1, 2 * k)
    problem = np.unique(bag[index] * 100 + target, return_inverse=True)[1]

    # Every expression has one of these orders, one of these lists of operators, and EOS.
    orders = np.array(list(itertools.permutations(range(k))))
    order = np.repeat(orders, len(operator), axis=0)  # [k! 3^(k-1), k]
    operator_and_eos = np.pad(np.tile(operator, (len(orders), 1)), ((0, 0), (0, 1)), constant_values=eos)

    def read(prompt):
        """Returns the numbers `[k]` and the target."""
        padding = jnp.sum(prompt < 0)  # 0 if the target has two digits, 1 if it has one
        return jnp.roll(prompt, -padding)[: 2 * k : 2], prompt[-1] + jnp.where(padding == 0, 10 * prompt[-2], 0)

    def reward(prompt, response):
        chex.assert_shape([prompt, response], [(P,), (R,)])
        given, target = read(prompt)
        number, mark = response.reshape(k, 2).T
        is_expression = jnp.all(jnp.isin(mark[:-1], jnp.array(operators))) & (mark[-1] == eos)
        uses_each_once = jnp.all(jnp.sort(number) == jnp.sort(given))
        return (is_expression & uses_each_once & (_value(number, mark[:-1]) == target)).astype(jnp.float32)

    def demonstration(key, prompt):
        chex.assert_shape(prompt, (P,))
        number = read(prompt)[0][order]
        response = jnp.stack([number, jnp.asarray(operator_and_eos, jnp.int32)], axis=-1).reshape(-1, R)
        is_right = jax.vmap(reward, (None, 0))(prompt, response) > 0
        return response[jax.random.categorical(key, jnp.where(is_right, 0.0, -jnp.inf))]

    prompt = _draw((_left_padded(np.column_stack([numbers, _digits(target, 2)])), problem))
    return Task("countdown", vocabulary, eos, P, R, prompt, demonstration, reward)


def _value(number: Any, operator: Any) -> Any:
    """Evaluates `[..., k]` numbers with operator tokens `[..., k-1]` between them (NumPy or JAX); `*` binds first."""
    minus, times = 11, 12
    total, term = 0, number[..., 0]  # term: the signed product so far, which may continue
    for i in range(operator.shape[-1]):
        goes_on, sign = 1 * (operator[..., i] == times), 1 - 2 * (operator[..., i] == minus)
        total = total + (1 - goes_on) * term
        term = (goes_on * term + (1 - goes_on) * sign) * number[..., i + 1]
    return total + term


TASKS: dict[str, Callable[[], Task]] = {
    "addition": addition,
    "sorting": sorting,
    "reversing": reversing,
    "countdown": countdown,
}
