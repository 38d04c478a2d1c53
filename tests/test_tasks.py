"""Token tasks: rewards are those of a plain Python verifier, held-out prompts are held out, and the environment plays
the task token by token."""

import functools
import itertools
import re
import zlib
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from scipy.stats import chisquare

from purepg.envs.named_tasks import TASKS, addition, countdown, reversing, sorting
from purepg.envs.tasks import Task, decode, encode, token_env
from purepg.experience.rollout import reset_all, rollout
from purepg.types import Actor, Discrete, UsageError

ALL: dict[str, Task] = {
    **{name: task() for name, task in TASKS.items()},
    "addition of 3 digits": addition(num_digits=3, ones_first=False),
    "sorting of 3": sorting(length=3),
    "reversing of 3": reversing(length=3),
    "countdown of 2": countdown(num_numbers=2),
    "countdown of 4": countdown(num_numbers=4),
}


def written(task: Task, tokens: Any) -> str:
    """The text, with `_` at empty places."""
    return "".join("_" if token < 0 else task.vocabulary[token] for token in np.asarray(tokens).tolist())


def is_right(task: Task, prompt: str, response: str) -> bool:
    """An independent verifier of what is `written`."""
    prompt, ended = prompt.lstrip("_"), re.fullmatch(r"([^._]*)\._*", response)
    if not ended:
        return False
    answer = ended[1]
    if task.name == "addition":
        a, b = re.fullmatch(r"(\d+)\+(\d+)=", prompt).groups()  # pyright: ignore[reportOptionalMemberAccess]
        digits = str(int(a) + int(b))
        return answer == (digits if task is ALL["addition of 3 digits"] else digits[::-1])
    if task.name == "sorting":
        return answer == "".join(sorted(prompt.removesuffix(">")))
    if task.name == "reversing":
        return answer == "".join(reversed(prompt.removesuffix("<")))
    numbers, target = prompt.split(":")
    if not re.fullmatch(r"\d([-+*]\d)*", answer) or sorted(re.findall(r"\d", answer)) != sorted(numbers.split(" ")):
        return False
    return eval(answer) == int(target)


KEYS = jax.random.split(jax.random.key(0), 500)


def play(task: Task, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A prompt, from one key in two a held-out one, and a demonstration."""
    k_train, k_held_out, k_demonstration = jax.random.split(key, 3)
    held_out = jax.random.bernoulli(key)
    prompt = jnp.where(held_out, task.prompt(k_held_out, True), task.prompt(k_train, False))
    return prompt, task.demonstration(k_demonstration, prompt)


@functools.cache
def sample(name: str) -> tuple[np.ndarray, np.ndarray]:
    """`play` with all the keys."""
    prompt, demonstration = quick_jit(jax.vmap(functools.partial(play, ALL[name])))(KEYS)
    return np.asarray(prompt), np.asarray(demonstration)


@functools.cache
def rewards(name: str) -> Any:
    return quick_jit(jax.vmap(ALL[name].reward))


def cleared(task: Task, response: np.ndarray) -> np.ndarray:
    """As a sampler leaves it: nothing after the first eos."""
    over = np.cumsum(response == task.eos, axis=-1) - (response == task.eos) > 0
    return np.where(over, -1, response)


# --- rewards ---


@pytest.mark.parametrize("name", ALL)
def test_demonstrations_earn_the_reward_and_end(name):
    task, (prompt, demonstration) = ALL[name], sample(name)
    assert prompt.shape == (500, task.prompt_length) and demonstration.shape == (500, task.response_length)
    assert prompt.dtype == demonstration.dtype == np.int32
    reward = rewards(name)(prompt, demonstration)
    assert reward.dtype == jnp.float32
    np.testing.assert_array_equal(reward, 1)
    np.testing.assert_array_equal((demonstration == task.eos).sum(1), 1)
    np.testing.assert_array_equal(demonstration, cleared(task, demonstration))


def near_misses(task: Task, prompt: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    """Responses `[n, response_length]` of many kinds; some of a kind may be right."""
    rng, (n, R), V = np.random.default_rng(0), right.shape, len(task.vocabulary)
    row, column, other = np.arange(n), rng.integers(R, size=n), rng.integers(R, size=n)
    changed, swapped, emptied, prolonged = (right.copy() for _ in range(4))
    changed[row, column] = rng.integers(V, size=n)
    swapped[row, column], swapped[row, other] = right[row, other], right[row, column]
    emptied[row, column] = -1
    after = np.minimum(np.argmax(right == task.eos, axis=1) + 1, R - 1)
    prolonged[row, after] = rng.integers(V, size=n)  # against the contract, and wrong if there was room
    shifted = np.roll(right, 1, axis=1)
    return {
        "random": cleared(task, rng.integers(V, size=(n, R))),
        "random digits": cleared(task, rng.integers(10, size=(n, R))),
        "as it is": right,
        "one token changed": changed,
        "one token changed, cleared": cleared(task, changed),
        "two tokens swapped": swapped,
        "one place empty": emptied,
        "something after eos": prolonged,
        "no eos": np.where(right == task.eos, -1, right),
        "a digit in place of eos": np.where(right == task.eos, rng.integers(10, size=(n, 1)), right),
        "a leading zero": cleared(task, np.where(np.arange(R) == 0, 0, shifted)),
        "a place late": np.where(np.arange(R) == 0, -1, shifted),
        "one token short": np.pad(right[:, 1:], ((0, 0), (0, 1)), constant_values=-1),
        "another prompt's": right[::-1],
        "nothing": np.full_like(right, -1),
        "eos alone": np.where(np.arange(R) == 0, task.eos, -1) + 0 * right,
    }


@pytest.mark.parametrize("name", ALL)
def test_reward_is_what_a_plain_python_verifier_says_of_random_responses_and_of_near_misses(name):
    task, (prompt, demonstration) = ALL[name], sample(name)
    num_right = Counter()
    for kind, response in near_misses(task, prompt, demonstration).items():
        expected = [is_right(task, written(task, p), written(task, r)) for p, r in zip(prompt, response, strict=True)]
        np.testing.assert_array_equal(rewards(name)(prompt, response), expected, err_msg=kind)
        num_right[kind] = sum(expected)
    assert num_right["as it is"] == 500
    for kind in ("one place empty", "one token changed"):
        assert num_right[kind] < 400
    for kind in ("no eos", "a digit in place of eos", "a place late", "one token short", "nothing", "eos alone"):
        assert num_right[kind] == 0


@pytest.mark.parametrize("name", ["countdown of 2", "countdown", "countdown of 4"])
def test_any_expression_of_the_numbers_counts_and_only_by_its_value(name):
    """Random expressions of the right numbers, of numbers of the prompt more than once, and of any numbers."""
    task, (prompt, _) = ALL[name], sample(name)
    rng, k = np.random.default_rng(0), task.response_length // 2
    texts = [written(task, p).lstrip("_") for p in prompt for _ in range(4)]
    given = np.array([encode(task, text.split(":")[0].replace(" ", "")) for text in texts])
    numbers = {
        "each once": rng.permuted(given, axis=1),
        "of the prompt": np.take_along_axis(given, rng.integers(k, size=given.shape), 1),
        "any": rng.integers(10, size=given.shape),
    }
    operators = [encode(task, "+-*")[i] for i in range(3)]
    for kind, number in numbers.items():
        mark = np.pad(rng.choice(operators, size=(len(texts), k - 1)), ((0, 0), (0, 1)), constant_values=task.eos)
        response = np.stack([number, mark], axis=-1).reshape(len(texts), 2 * k)
        answers = [written(task, r) for r in response]
        expected = [is_right(task, text, answer) for text, answer in zip(texts, answers, strict=True)]
        reward = rewards(name)(np.repeat(prompt, 4, axis=0), response)
        np.testing.assert_array_equal(reward, expected, err_msg=kind)
        reached = [eval(answer[:-1]) == int(text.split(":")[1]) for text, answer in zip(texts, answers, strict=True)]
        assert kind != "each once" or (reached == expected and sum(reached) > 30)
        assert kind == "each once" or sum(reached) > sum(expected)  # some have the value and not the numbers


BY_HAND = [
    ("addition", "37+5=", "24.", True),
    ("addition", "0+0=", "0.", True),
    ("addition", "99+99=", "891.", True),
    ("addition", "95+5=", "001.", True),
    ("addition", "37+5=", "240.", False),
    ("addition", "37+5=", "24", False),
    ("addition", "37+5=", "244", False),
    ("addition", "37+5=", "42.", False),
    ("addition", "37+5=", "23.", False),
    ("addition", "37+5=", "2.", False),
    ("addition", "99+99=", "8910", False),
    ("addition of 3 digits", "95+905=", "1000.", True),
    ("addition of 3 digits", "95+905=", "0001.", False),
    ("sorting", "31415>", "11345.", True),
    ("sorting", "90>", "09.", True),
    ("sorting", "31415>", "1345.", False),
    ("sorting", "31415>", "54311.", False),
    ("sorting", "90>", "9.", False),
    ("reversing", "3141<", "1413.", True),
    ("reversing", "10<", "01.", True),
    ("reversing", "10<", "1.", False),
    ("reversing", "3141<", "3141.", False),
    ("countdown", "3 4 2:10", "3*4-2.", True),
    ("countdown", "3 4 2:10", "4*3-2.", True),
    ("countdown", "3 4 2:10", "4+3*2.", True),
    ("countdown", "3 4 2:10", "2*3+4.", True),
    ("countdown", "3 4 2:10", "3+4*2.", False),  # 11
    ("countdown", "3 4 2:10", "4+3+3.", False),  # 10, but 3 twice
    ("countdown", "3 4 2:10", "9+1*1.", False),  # 10, of other numbers
    ("countdown", "3 4 2:10", "3*4-2", False),
    ("countdown", "3 4 2:10", "3*4.", False),
    ("countdown", "3 4 2:10", "3*4-.", False),
    ("countdown", "3 4 2:10", "-2+3*4", False),
    ("countdown", "3 4 2:10", "10.", False),
    ("countdown", "2 3 4:20", "2+3*4.", False),  # * comes first
    ("countdown", "2 3 4:14", "2+3*4.", True),
    ("countdown", "9 5 2:2", "9-5-2.", True),  # - is read from the left
    ("countdown", "9 5 2:6", "9-5-2.", False),
    ("countdown", "9 2 3:3", "9-2*3.", True),
    ("countdown", "9 2 3:5", "9-2*3.", False),
    ("countdown", "9 5 2:6", "9-5+2.", True),
]


@pytest.mark.parametrize(("name", "prompt", "response", "right"), BY_HAND)
def test_reward_of_what_was_worked_out_by_hand(name, prompt, response, right):
    task = ALL[name]
    padded = np.pad(encode(task, prompt), (task.prompt_length - len(prompt), 0), constant_values=-1)
    answer = np.pad(encode(task, response), (0, task.response_length - len(response)), constant_values=-1)
    assert rewards(name)(padded[None].astype(np.int32), answer[None].astype(np.int32))[0] == right


def test_countdown_demonstrates_every_solution_equally_often():
    task = ALL["countdown"]
    prompt = jnp.array([-1, *encode(task, "1 2 3:6")])
    solutions = [
        f"{a}{x}{b}{y}{c}."
        for a, b, c in itertools.permutations("123")
        for x, y in itertools.product("+-*", repeat=2)
        if eval(a + x + b + y + c) == 6
    ]
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = quick_jit(jax.vmap(task.demonstration, (0, None)))(keys, prompt)
    count = Counter(decode(task, x) for x in drawn)
    assert set(count) == set(solutions) and len(solutions) == 12
    assert chisquare(list(count.values())).pvalue > 1e-3


@pytest.mark.parametrize("name", TASKS)
def test_a_reward_refuses_a_batch_which_is_the_callers_to_vmap(name):
    prompt, demonstration = sample(name)
    with pytest.raises(AssertionError):
        ALL[name].reward(jnp.array(prompt), jnp.array(demonstration))
    with pytest.raises(AssertionError):
        ALL[name].demonstration(jax.random.key(0), jnp.array(prompt))


@pytest.mark.parametrize("name", TASKS)
def test_vmap_is_a_loop(name):
    task, batched = ALL[name], (*sample(name), rewards(name)(*sample(name)))

    @quick_jit
    def one(key):
        prompt, demonstration = play(task, key)
        return prompt, demonstration, task.reward(prompt, demonstration)

    for i in range(5):
        jax.tree.map(np.testing.assert_array_equal, one(KEYS[i]), tuple(x[i] for x in batched))


# --- prompts ---


@functools.cache
def drawn(name: str) -> tuple[Counter, Counter]:
    """How often each prompt was drawn, of the training ones and of those held out: often enough to see all."""
    task = ALL[name]

    def count(held_out):
        draw = quick_jit(jax.vmap(lambda key: task.prompt(key, held_out)))
        rows = np.asarray(draw(jax.random.split(jax.random.key(0), 200_000)))
        code = rows @ 17 ** np.arange(task.prompt_length)  # rows sort slowly, numbers fast
        _, index, number = np.unique(code, return_index=True, return_counts=True)
        return Counter({written(task, row).lstrip("_"): int(n) for row, n in zip(rows[index], number, strict=True)})

    return count(False), count(True)


def countdown_prompts() -> set[str]:
    prompts = set()
    for numbers in itertools.combinations_with_replacement("123456789", 3):
        orders = set(itertools.permutations(numbers))
        expressions = [a + x + b + y + c for (a, b, c), x, y in itertools.product(orders, "+-*", "+-*")]
        targets = {value for value in map(eval, expressions) if 1 <= value <= 99}
        prompts |= {f"{a} {b} {c}:{target}" for (a, b, c), target in itertools.product(orders, targets)}
    return prompts


def strings(length: int, mark: str) -> set[str]:
    return {"".join(x) + mark for n in range(2, length + 1) for x in itertools.product("0123456789", repeat=n)}


def numbers(prompt: str) -> tuple:
    """What prompts of the same problem have in common."""
    numbers, _, target = prompt.partition(":")
    return (*sorted(re.findall(r"\d+", numbers)), target)


# All prompts, and a checksum of those held out, which are to stay the same: a policy may have been trained on the rest.
PROMPTS = {
    "addition": (lambda: {f"{a}+{b}=" for a in range(100) for b in range(100)}, 2161338358),
    "sorting of 3": (lambda: strings(3, ">"), 519421788),
    "reversing of 3": (lambda: strings(3, "<"), 1246099381),
    "countdown": (countdown_prompts, 1733785114),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_training_and_held_out_prompts_are_disjoint_and_together_all_prompts(name):
    (training, held_out), (prompts, checksum) = drawn(name), PROMPTS[name]
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == prompts()
    assert len(held_out) / (len(held_out) + len(training)) == pytest.approx(0.1, abs=0.002)
    assert zlib.crc32(" ".join(sorted(held_out)).encode()) == checksum


@pytest.mark.parametrize("name", ["addition", "countdown"])
def test_the_same_numbers_in_another_order_are_held_out_together(name):
    training, held_out = drawn(name)
    assert not {numbers(prompt) for prompt in training} & {numbers(prompt) for prompt in held_out}


@pytest.mark.parametrize("name", PROMPTS)
def test_lengths_of_strings_are_drawn_uniformly_and_then_prompts(name):
    is_string = name.startswith(("sorting", "reversing"))
    for count in drawn(name):
        strata: dict[int, list[int]] = {}
        for prompt, n in count.items():
            strata.setdefault(len(prompt) if is_string else 0, []).append(n)
        for stratum in strata.values():
            assert chisquare(stratum).pvalue > 1e-3
        if is_string:
            assert len(strata) == ALL[name].prompt_length - 2
            assert chisquare([sum(stratum) for stratum in strata.values()]).pvalue > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_prompts_are_left_padded_with_empty_places_and_some_fill_all_columns(name):
    task, (prompt, _) = ALL[name], sample(name)
    empty = prompt < 0
    assert (prompt[empty] == -1).all() and prompt.max() < len(task.vocabulary)
    assert (np.diff(empty.astype(int), axis=1) <= 0).all() and not empty[:, -1].any()
    assert empty[:, 0].any() and not empty[:, 0].all()
    assert not (prompt == task.eos).any()


def test_three_digits_are_added_and_numbers_have_no_leading_zeros():
    task, (prompt, _) = ALL["addition of 3 digits"], sample("addition of 3 digits")
    texts = [decode(task, row) for row in prompt]
    assert all(re.fullmatch(r"(0|[1-9]\d{0,2})\+(0|[1-9]\d{0,2})=", text) for text in texts)
    assert max(map(len, texts)) == 8


# --- text ---


@pytest.mark.parametrize("name", TASKS)
def test_decoding_undoes_encoding_and_skips_empty_places(name):
    task, (prompt, demonstration) = ALL[name], sample(name)
    everything = "".join(task.vocabulary)
    assert decode(task, encode(task, everything)) == everything
    assert encode(task, "0123456789") == list(range(10))
    assert (task.name, task.vocabulary[task.eos]) == (name, ".")
    assert len(set(task.vocabulary)) == len(task.vocabulary) and {len(text) for text in task.vocabulary} == {1}
    for row in [*prompt[:20], *demonstration[:20]]:
        assert encode(task, decode(task, row)) == [token for token in row if token >= 0]


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"text \('1\*2'\).*addition's vocabulary"):
        encode(ALL["addition"], "1*2")
    for function, values in [(addition, (0, 4)), (sorting, (1, 7)), (reversing, (1, 7)), (countdown, (1, 5))]:
        for value in values:
            with pytest.raises(UsageError, match=rf"\({value}\) must be in"):
                function(value)


# --- as an environment ---


def forced(env: Any, key: jax.Array, action: Any) -> Any:
    """What T forced actions `[T]` bring from a reset on: the first observation and the time steps `[T, ...]`."""
    state, obs = env.reset(key)

    def step(state, action):
        return env.step(key, state, action)

    return obs, jax.lax.scan(step, state, action)[1]


@pytest.mark.parametrize("name", ["addition", "reversing", "countdown"])
def test_an_episode_of_a_forced_response_has_the_tasks_reward_and_one_flag_at_its_end(name):
    """Demonstrations; responses with eos somewhere, in the last column too; and responses without eos."""
    task, env, n = ALL[name], token_env(ALL[name]), 64
    P, R, V = task.prompt_length, task.response_length, len(task.vocabulary)
    keys, rng = jax.random.split(jax.random.key(0), n), np.random.default_rng(0)
    prompt = np.asarray(quick_jit(jax.vmap(env.reset))(keys)[1][:, :P])
    demonstration = np.asarray(quick_jit(jax.vmap(task.demonstration))(keys, prompt))
    without_eos = rng.integers(V - 1, size=(n, R))
    with_eos = np.where(np.arange(R) == rng.integers(R, size=(n, 1)), task.eos, without_eos)
    run = quick_jit(jax.vmap(lambda key, action: forced(env, key, action)))
    num_earned = 0
    for action in (np.where(demonstration < 0, 0, demonstration), with_eos, without_eos):
        first, (obs, reward, terminated, truncated, _) = jax.tree.map(np.asarray, run(keys, action.astype(np.int32)))
        np.testing.assert_array_equal(first, np.pad(prompt, ((0, 0), (0, R)), constant_values=-1))
        earned = rewards(name)(prompt, cleared(task, action))
        for i in range(n):
            ends = task.eos in action[i]
            length = list(action[i]).index(task.eos) + 1 if ends else R
            for t in range(length):
                np.testing.assert_array_equal(obs[i, t], [*prompt[i], *action[i, : t + 1], *[-1] * (R - t - 1)])
            assert terminated[i, :length].tolist() == [False] * (length - 1) + [ends]
            assert truncated[i, :length].tolist() == [False] * (length - 1) + [not ends]
            assert reward[i, :length].tolist() == [0] * (length - 1) + [earned[i]]
        num_earned += earned.sum()
    assert n <= num_earned < 2 * n


def test_the_environment_declares_its_spaces_its_limit_and_the_types_that_it_keeps():
    for task in (ALL[name] for name in TASKS):
        env, key, length = token_env(task), jax.random.key(0), task.prompt_length + task.response_length
        space: Any = env.observation_space
        assert (env.action_space, env.max_episode_steps) == (Discrete(len(task.vocabulary)), task.response_length)
        assert (space.shape, space.dtype, env.name) == ((length,), np.int32, task.name)
        assert set(space.low) == {-1} and set(space.high) == {len(task.vocabulary) - 1}
        first = jax.eval_shape(env.reset, key)
        state, step = jax.eval_shape(env.step, key, first[0], jax.ShapeDtypeStruct((), jnp.int32))
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(first[1])] == [((length,), jnp.int32)]
        assert jax.tree.leaves((state, step.obs)) == jax.tree.leaves(first)
        dtypes = [(x.shape, x.dtype) for x in (step.reward, step.terminated, step.truncated)]
        assert dtypes == [((), jnp.float32), ((), bool), ((), bool)]


def test_prompts_may_be_held_out_and_a_reward_may_be_the_callers():
    task = ALL["addition"]
    env = token_env(task, held_out=True, reward=lambda prompt, response: jnp.sum(response >= 0) + prompt[0] / 4)
    action = jnp.array(encode(task, "123.") + encode(task, "1234")).reshape(2, 4)
    first, steps = quick_jit(jax.vmap(lambda key: jax.vmap(lambda x: forced(env, key, x))(action)))(
        jax.random.split(jax.random.key(0), 20)
    )
    texts = {decode(task, obs) for obs in np.asarray(first)[:, 0]}
    assert texts <= set(drawn("addition")[1])
    expected = np.zeros((20, 2, 4))
    expected[..., -1] = 4 + np.asarray(first)[..., 0] / 4
    np.testing.assert_array_equal(steps.reward, expected)


@pytest.mark.parametrize("name", ["addition", "countdown"])
def test_a_rollout_sees_a_prompt_and_its_own_episodes_tokens_alone(name):
    """Random tokens over many episodes: no response outlives a reset, and a prompt changes at resets alone."""
    task, N, T = ALL[name], 8, 60
    env, P, R = token_env(task), task.prompt_length, task.response_length

    def noise(key, obs):
        return jax.random.randint(key, obs.shape[:1], 0, len(task.vocabulary))

    @quick_jit
    def run(key):
        k_start, k_run = jax.random.split(key)
        actor = Actor.of(noise)
        return rollout(k_run, env, actor, reset_all(k_start, env, N), T)[1:]

    trajectory, info = jax.tree.map(np.asarray, run(jax.random.key(0)))
    episodes = 0
    for i in range(N):
        prompt, tokens = trajectory.obs[0, i, :P], []
        for t in range(T):
            if not tokens:
                prompt = trajectory.obs[t, i, :P]
                assert set(written(task, prompt)) & set("=:")
            np.testing.assert_array_equal(trajectory.obs[t, i], [*prompt, *tokens, *[-1] * (R - len(tokens))])
            tokens.append(trajectory.action[t, i])
            np.testing.assert_array_equal(trajectory.next_obs[t, i], [*prompt, *tokens, *[-1] * (R - len(tokens))])
            over = tokens[-1] == task.eos or len(tokens) == R
            assert (trajectory.terminated | trajectory.truncated)[t, i] == over
            if over:
                assert trajectory.reward[t, i] == is_right(
                    task, written(task, prompt), written(task, tokens) + "_" * (R - len(tokens))
                )
                tokens, episodes = [], episodes + 1
    assert episodes == info["num_episodes"] > N * T / R
