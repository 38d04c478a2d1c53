"""Prompts and rewards of the user's own: files, rewards in Python, and the runs that learn from them."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_wandb import FakeWandb
from helpers import exit_code, quick_jit, read_log
from test_resume import assert_same_metrics, finals

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.envs.tasks import token_env
from purepg.language.flops import update_flops
from purepg.language.model import LanguageModelConfig
from purepg.language.tokenizer import load_tokenizer
from purepg.run import outside
from purepg.run.load import load
from purepg.run.plan import prepare
from purepg.run.start import language_model
from purepg.run.summary import report
from purepg.run.text.config import TextRunConfig
from purepg.run.text.environment import text_env
from purepg.run.text.passes import pass_at, passed
from purepg.run.text.population import TextPopulation
from purepg.run.text.prompts import in_epochs, read_prompts, table
from purepg.run.text.ready import exact, format_of, last_number, length_of, number
from purepg.run.text.rewards import Reward, find_rewards
from purepg.types import UsageError

TINY = LanguageModelConfig(hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
CONFIG = GRPOConfig(num_prompts=4, group_size=4, learning_rate=2e-2, kl_coef=0.0)
UPDATES, R = 60, 5
ROWS = [{"prompt": a + b, "letter": b} for a in "abcd" for b in "efg"]
COUNT = "def count(completions, letter):\n    return [text.count(x) / 5 for text, x in zip(completions, letter)]\n"
SHORT = "def short(completions):\n    return [-len(text) for text in completions]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, prompts, and two rewards."""
    out = letters(tmp_path_factory.mktemp("text"))
    write(out / "train.jsonl", ROWS)
    write(out / "test.jsonl", ROWS[::2])
    (out / "rewards.py").write_text(COUNT + SHORT)
    return out


def letters(out: Path) -> Path:
    """Writes a tokenizer of single letters with a chat template into a folder."""
    import tokenizers

    ids = {token: i for i, token in enumerate(["<end>", "<stop>", *"abcdefg", "!"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>", "<stop>"])
    tokenizer.save(str(out / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}!"
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": template}))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    return out


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(folder: Path, **more: Any) -> TextRunConfig:
    fields: dict[str, Any] = {
        "prompts": str(folder / "train.jsonl"),
        "eval_prompts": str(folder / "test.jsonl"),
        "reward": (f"{folder / 'rewards.py'}:count", f"{folder / 'rewards.py'}:short=0.001"),
        "tokenizer": str(folder),
        "response_length": R,
        "total_steps": UPDATES * 16 * R,
        "num_seeds": 2,
        "log_every": 10,
        "eval_every": 25,
        "checkpoint_every": 1e9,
        "wandb": "disabled",
    }
    return TextRunConfig(**fields | more)


# --- files of prompts ---


def test_prompts_are_templated_tokens_padded_on_the_left_with_their_columns(folder, tmp_path):
    rows = [
        {"prompt": "ab", "x": 1},
        {"messages": [{"role": "system", "content": "c"}, {"role": "user", "content": "dd"}], "x": 2},
    ]
    file = write(tmp_path / "few.jsonl", rows)
    env = text_env(settings(folder, prompts=str(file), eval_prompts=None, reward=("length:9",)), TINY)
    letter = {x: i for i, x in enumerate("abcdefg!", 2)}
    expected = [[-1, *(letter[x] for x in "ab!")], [letter[x] for x in "cdd!"]]
    np.testing.assert_array_equal(env.task.judge.prompt, expected)
    assert (env.task.eos, env.task.num_tokens) == (0, 10)
    assert env.task.stop.tolist() == [[1, 1] + [0] * 8]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))  # as some editors write it
    prompts = read_prompts(str(file), "prompts")
    assert prompts.text == ["ab", "dd"] and prompts.columns == {"x": [1, 2]}
    plain = text_env(settings(folder, prompts=str(file), reward=("length:9",), chat=False), TINY)
    np.testing.assert_array_equal(plain.task.judge.prompt[0], [-1, letter["a"], letter["b"]])
    day = replace(load_tokenizer(folder), template="{% if strftime_now('%d %b %Y') == '26 Jul 2024' %}a{% endif %}")
    assert table(prompts, day, True, 9).tolist() == [[letter["a"]]] * 2  # on whatever day the run is resumed
    assert env.describe and env.describe(np.array([*expected[0], 8, 7, 1, -1, -1])) == {
        "prompt": "ab",
        "response": "gf",
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", r"has no rows: write one prompt a line"),
        ('{"prompt": "a"}\n\n{"prompt": 7}', r"row 3: prompt must be text"),
        ('{"prompt": "a"}\n{"prompt": ', r"row 2 is not JSON"),
        ('{"prompt": "a", "x": "\\ud83d"}', r"row 1 holds half of a surrogate pair, which is no text"),
        ('{"prompt": "a", "messages": []}', r"row 1 must be an object with either prompt or messages"),
        ('{"messages": [{"role": "user"}]}', r"row 1: messages must be a list of objects with role and content"),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b"}', r"row 2 lacks the column x, unlike row 1"),
        ('{"prompt": "a"}\n{"prompt": "aaaa"}', r"row 2 has 5 tokens; a prompt may have 1 to 4 \(prompt_length\)"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_row(folder, tmp_path, text, line):
    (tmp_path / "bad.jsonl").write_text(text)
    run = settings(
        folder, prompts=str(tmp_path / "bad.jsonl"), eval_prompts=None, reward=("length:9",), prompt_length=4
    )
    with pytest.raises(UsageError, match=line) as error:
        text_env(run, TINY)
    assert "\n" not in str(error.value)


def test_prompts_are_drawn_without_replacement_in_epochs_that_differ_and_go_on_from_update_to_update():
    drawn = np.concatenate([in_epochs((3, 1), 7, 5 * u, 5) for u in range(14)]).reshape(10, 7)
    np.testing.assert_array_equal(np.sort(drawn), np.tile(np.arange(7), (10, 1)))
    assert len(np.unique(drawn, axis=0)) > 5
    assert not np.array_equal(in_epochs((3, 2), 7, 0, 70), drawn.reshape(-1))
    np.testing.assert_array_equal(
        np.sort(in_epochs((3, 1), 3, 3, 12)), np.repeat(np.arange(3), 4)
    )  # several epochs at once


# --- pass@k ---


def test_pass_at_k_is_the_share_of_subsets_of_k_in_which_one_passes():
    n = 5
    for k, c in itertools.product(range(1, n + 1), range(n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        np.testing.assert_allclose(pass_at(k, n, np.array(c)), np.mean([any(subset) for subset in subsets]))
    sampled = np.array([[[1.0, 0.5, 0.0, 0.0], [0.6, 0.6, 0.6, 0.6]]])  # 1 and 4 of 4 pass: above 0.5
    np.testing.assert_allclose(passed(sampled, np.array([[0.4, 1.0]])), [[0.625], [0.75], [1.0], [0.5]])


# --- rewards ---


def test_ready_rewards():
    assert exact([" 12\n", "12."], [12, "12"]) == [1, 0]
    assert number(["so 3 #### 1,234.0", "#### 5 or 6", "1234", "#### none"], ["x #### 1234", 5, 1234, 0]) == [
        1,
        1,
        0,
        0,
    ]
    assert last_number(["It is 1 or -19.", "$1,000", "none"], ["-19", "so #### 1000", "0"]) == [1, 1, 0]
    assert last_number(["0.00001", "-5", "none"], [1e-5, 1e-5, 0]) == [1, 0, 0]  # which str writes as 1e-05
    assert format_of(r"<a>.*</a>")(["<a>x\ny</a> ", "<a>x</a>y"]) == [1, 0]
    assert length_of("4")(["", "four", "sixsix", "eighteig", "far too long"]) == [1, 1, 0.5, 0, 0]


@pytest.fixture
def ask(tmp_path):
    """`ask(code, spec)`: the rewards of three completions, of which the first two answer row 2 of the file."""
    prompts = read_prompts(
        str(write(tmp_path / "few.jsonl", [{"prompt": "p", "x": 1}, {"prompt": "q", "x": 2}])), "prompts"
    )

    def asked(code: str, spec: str = "f") -> list[float]:
        (tmp_path / "own.py").write_text(code)
        (reward,) = find_rewards([f"{tmp_path / 'own.py'}:{spec}"], [prompts])
        assert isinstance(reward, Reward)
        return reward(prompts, [1, 1, 0], ["a", "bb" * 50, "ccc"]).tolist()

    return asked


def test_a_reward_is_given_what_its_parameters_name(ask):
    assert ask("def f(completions, x): return [len(c) + y for c, y in zip(completions, x)]") == [3, 102, 4]
    assert ask("def f(prompts, completions): return [p == 'q' for p in prompts]") == [1, 1, 0]
    assert ask("def f(x=None, z=5): return [y * z for y in x]") == [10, 10, 5]
    assert ask("import numpy as np\ndef f(**given): return np.full(3, len(given))") == [3, 3, 3]
    assert ask("def f(completions): return map(len, completions)") == [1, 100, 3]


def test_a_file_of_rewards_is_executed_once_and_may_do_what_a_script_may(tmp_path):
    (tmp_path / "beside_the_rewards.py").write_text("loaded = []\n")
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_the_rewards import loaded\n"
        "loaded.append(1)\n@dataclass\nclass One:\n    x: int = 1\n"
        "def f(prompts): return [One().x] * len(prompts)\ndef g(prompts): return [len(loaded)] * len(prompts)\n"
    )
    (tmp_path / "own.py").write_text(code)
    prompts = read_prompts(str(write(tmp_path / "few.jsonl", [{"prompt": "p"}])), "prompts")
    rewards = find_rewards([f"{tmp_path / 'own.py'}:{name}" for name in "fg"], [prompts])
    assert [reward(prompts, [0], ["a"]) for reward in rewards if isinstance(reward, Reward)] == [1, 1]


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (
            "def f(completions): return [1 // (c != 'ccc') for c in completions]",
            r"reward f failed: ZeroDivisionError: .*; few.jsonl, row 1, completion 'ccc'$",
        ),
        (
            "def f(completions): return [1 / (len(completions) - 3)]",
            "failed: ZeroDivisionError.*; no row of few.jsonl makes it fail by itself$",
        ),
        (
            "def f(completions): return [1, 2]",
            r"returned 2 numbers for 3 completions: return one number for each; few.jsonl, row 2$",
        ),
        ("def f(completions): return 1", r"must return a list of numbers, not 1$"),
        ("def f(completions): return {1: 1, 2: 2, 3: 3}", r"must return a list of numbers, not {1: 1, 2: 2, 3: 3}$"),
        (
            "def f(completions): return (1 / (c != 'ccc') for c in completions)",
            r"failed: ZeroDivisionError: .*; few.jsonl, row 1, completion 'ccc'$",
        ),
        ("import sys\ndef f(completions): sys.exit(3)", r"reward f failed: SystemExit: 3; few.jsonl, row 2,"),
        ("import sys\nsys.exit(3)", r"own.py cannot be loaded: SystemExit: 3$"),
        ("def f(completions): return [0, 1e39, 0]", r"returned 1e\+39, which is no finite number; few.jsonl, row 2,"),
        ("def f(completions): return [0, 10**400, 0]", r"returned 10{20}.*, which is no finite number; few.jsonl, row"),
        (
            "def f(completions): return [0, float('nan'), 0]",
            r"returned nan, which is no finite number; few.jsonl, row 2, completion 'bbb.*\.\.\.$",
        ),
        (
            "def f(completions): return [0, 1, None]",
            r"returned None, which is no finite number; few.jsonl, row 1, completion 'ccc'$",
        ),
        ("def f(completions, y): return [0]", r"reward f takes y, no column of few.jsonl \(x\)$"),
        ("def f(completions, /): return [0]", r"must take prompts, completions and columns by their names"),
        ("def g(completions): return [0]", r"own.py has no function f$"),
        ("import nothing_of_this_name", r"own.py cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_line_with_the_row_that_caused_it(ask, code, line):
    with pytest.raises(UsageError, match=line) as error:
        ask(code)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_weights_and_names_of_rewards(folder):
    prompts = [read_prompts(str(folder / "train.jsonl"), "prompts")]
    found = find_rewards(["format:a=b", "length:7=-0.5", f"{folder / 'rewards.py'}:count=2"], prompts)
    assert [(reward.name, reward.weight) for reward in found] == [("format", 1), ("length", -0.5), ("count", 2)]
    for specs, line in [
        ([], r"reward \(\) must name at least one"),
        (["correct"], r"reward \(correct\) must be FILE.py:FUNCTION or a ready one \(exact, number"),
        (["exact"], "reward exact takes answer, no column of train.jsonl"),
        (["length:9", "length:7"], "reward names length twice"),
        (["format:("], "must have a regular expression"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
    ]:
        with pytest.raises(UsageError, match=line):
            find_rewards(specs, prompts)


# --- learning ---


def test_an_update_from_python_rewards_is_the_update_of_one_program(folder):
    """The same rewards as a JAX function: letters e count."""
    env = text_env(settings(folder), TINY)
    length = env.task.prompt_length

    def e(prompt, response):
        return jnp.sum(response == 6).astype(jnp.float32)

    inside = token_env(env.task, reward=e)
    assert inside.task.judge is None
    model = language_model(inside, TINY)
    config = replace(CONFIG, num_held_out=0)
    one, two = grpo(inside, model, config), grpo(env, language_model(env, TINY), config)
    sampler: Any = two.sampler
    state, key = quick_jit(one.init)(jax.random.key(0)), jax.random.key(1)
    expected, metrics = quick_jit(one.step)(key, state, 0)

    @quick_jit
    def sample(state):
        k_prompt, k_response, _ = jax.random.split(jax.random.split(key, 3)[0], 3)  # as one program splits it
        prompt = jax.vmap(lambda key: inside.reset(key)[1][:length])(jax.random.split(k_prompt, config.num_prompts))
        return sampler.sample(k_response, state.learner, prompt)

    data = sample(state)
    assert not data.reward.any()
    reward = (np.asarray(data.action) == 6).sum(-1).astype(np.float32)
    unread = jax.tree.map(lambda x: x * jnp.nan, state.learner.reference)  # whose KL has no weight
    learner = state.learner._replace(reference=unread)
    found, own = quick_jit(two.step)(key, state._replace(learner=learner, world=sampler.rewarded(data, reward)), 0)
    trained = found.learner.train_state, expected.learner.train_state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *trained)
    assert reward.std() > 0 and float(own["policy_loss"]) == pytest.approx(float(metrics["policy_loss"]), abs=1e-6)
    assert float(own["episode_return"]) == pytest.approx(float(reward.mean()), rel=1e-5)


# --- runs ---


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Programs compile quickly, and runs of one shape and budget share them: what is Python is no part of them."""
    made, init = {}, TextPopulation.__init__
    names = "_init", "_learn", "_sample", "_answer", "_programs"

    def init_shared(self, plan, program, shape):
        init(self, plan, program, shape)
        own = {name: vars(self)[name] for name in names}
        vars(self).update(made.setdefault((shape, program.num_updates, plan.run.total_steps), own))

    before = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextPopulation, "__init__", init_shared)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def ran(run: TextRunConfig, out: Path, *flags: str) -> int:
    return exit_code(grpo, CONFIG, language_model, TINY, run, arguments=["--out", str(out), *flags])


@pytest.fixture(scope="module")
def fake_wandb():
    with pytest.MonkeyPatch.context() as patch:
        yield FakeWandb(patch)


@pytest.fixture(scope="module")
def whole(folder, fake_wandb, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert ran(settings(folder, wandb="offline"), out) == 0
    return out


def test_a_run_learns_what_the_reward_counts_and_says_so_on_held_out_prompts(folder, whole):
    with np.load(whole / "metrics.npz") as found:
        metrics = dict(found)
    count, short = metrics["reward/count"], metrics["reward/short"]
    np.testing.assert_allclose(metrics["episode_return"], count + 0.001 * short, atol=1e-5)
    assert np.nanmean(count[..., :10]) < 0.2 and np.nanmean(count[..., -10:]) > np.nanmean(count[..., :10]) + 0.3
    logged = read_log(whole / "log.jsonl")["env_steps"][0]
    assert (logged.sum(0) == 0).sum() <= 1  # not a block of updates after the budgets are used up
    assert np.isfinite(metrics["eval/pass@1"][0, 0]).nonzero()[0].tolist() == [0, 25, 50]
    summary = json.loads((whole / "summary.json").read_text())
    (setting,) = summary["settings"]
    # All prompts have one length.
    length = int((text_env(settings(folder), TINY).task.judge.prompt[0] >= 0).sum())
    made, tokens = np.nansum(metrics["env_steps"] > 0), np.nansum(metrics["env_steps"])
    each = update_flops(TINY, 10, length, tokens / (16 * made), (4, 4, 1), adapters=False, reference=False)
    assert summary["flops_per_second"] * summary["run_seconds"] == pytest.approx(made * each, rel=1e-6)
    assert list(setting["measures"]) == ["eval/greedy_pass", "eval/pass@1", "eval/pass@2", "eval/pass@4"]
    assert setting["before"]["eval/pass@1"]["iqm"] < 0.2 < 0.5 < setting["measures"]["eval/pass@1"]["iqm"]
    assert setting["mode"]["iqm"] > setting["iqm"] - 0.1 > 0.4


def test_samples_are_a_line_each_for_every_evaluation_and_a_table_in_wandb(whole, fake_wandb):
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    with np.load(whole / "metrics.npz") as metrics:
        made = np.isfinite(metrics["env_steps"][0]).sum(-1).tolist()
    at = [*np.repeat([0, 0, 25, 25, 50, 50], 6).tolist(), *[made[0]] * 6, *[made[1]] * 6]
    assert [row["update"] for row in rows] == at
    assert [row["prompt"] for row in rows[:6]] == [row["prompt"] for row in ROWS[::2]]
    for row in rows:
        reward = row["response"].count(row["prompt"][1]) / 5 - 0.001 * len(row["response"])
        assert row["reward"] == pytest.approx(reward, abs=1e-6)
    summary = json.loads((whole / "summary.json").read_text())
    for of_seed in summary["settings"][0]["responses"]:
        of_seed[0]["response"] = "a\x1b[2J\x07b"  # by which a model would clear the terminal, and ring
    assert "a\ufffd[2J\ufffdb" in report(summary)
    own = [row for row in rows if row["seed"] == 1]
    tables = [row["samples"] for row in fake_wandb.runs["seed=1"].rows if "samples" in row]
    assert [table.columns for table in tables] == [["prompt", "response", "reward"]] * 4
    assert [row for table in tables for row in table.data] == [list(row.values())[3:] for row in own]


def test_a_run_whose_reward_failed_goes_on_after_it_is_mended_to_the_same_bits(whole, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "text")
    rewards = tmp_path / "text" / "rewards.py"
    calls = "import itertools\ncalls = itertools.count()\n"
    failing = SHORT.replace("    return", "    assert next(calls) < 40, 'no ink'\n    return")
    rewards.write_text(calls + COUNT + failing)
    run = settings(tmp_path / "text")
    assert ran(run, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "reward short failed: AssertionError: no ink; train.jsonl, row " in said
    assert "Traceback" not in said
    stopped_at = read_log(tmp_path / "out" / "log.jsonl")["env_steps"].shape[-1]
    assert stopped_at == 38  # and two evaluations asked too
    rewards.write_text(COUNT + SHORT)
    assert ran(run, tmp_path / "out", "--resume") == 0
    assert_same_metrics(tmp_path / "out", whole)
    assert finals(tmp_path / "out") == finals(whole)
    assert (tmp_path / "out" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_with_stop_texts_rewards_and_samples_have_responses_without_them(folder, tmp_path):
    """Responses of 5 letters, which e after f, g and special tokens end."""
    check = "def check(completions):\n    assert not any('fe' in x or 'g' in x for x in completions)\n"
    (tmp_path / "own.py").write_text(check + "    return [float(len(x) == 5) for x in completions]\n")
    more: dict[str, Any] = {"reward": (f"{tmp_path / 'own.py'}:check",), "num_seeds": 1, "total_steps": 3 * 16 * R}
    assert ran(settings(folder, stop=("fe", "g"), **more), tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["run"]["stop"] == ["fe", "g"]
    shown = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len({len(row["response"]) for row in shown}) > 2
    agent = load(tmp_path / "out")
    stop = agent.env.task.stop
    assert agent.env.held_out and agent.env.held_out.task.stop is stop
    plan = prepare(
        grpo, language_model, {"grpo": CONFIG, "network": TINY}, settings(folder, stop=("fe", "g"), **more), {}
    )
    np.testing.assert_array_equal(plan.warm(plan.programs[0].configs).tables["stop"], stop)


def test_groups_are_sampled_in_place_of_those_to_which_python_gives_equal_rewards(folder, tmp_path):
    """A response earns 1 if it has no letters, which makes the rewards of about half of the groups equal."""
    say = f"    with open({str(tmp_path / 'calls')!r}, 'a') as file:\n        print(found, file=file)\n"
    code = f"def none(completions):\n    found = [float(not x) for x in completions]\n{say}    return found\n"
    (tmp_path / "own.py").write_text(code)
    more: dict[str, Any] = {"reward": (f"{tmp_path / 'own.py'}:none",), "num_seeds": 1, "total_steps": 5 * 3 * 16 * R}
    config = replace(CONFIG, skip_groups_without_signal=True, max_rounds=3, learning_rate=1e-3)
    run = settings(folder, **more)
    assert exit_code(grpo, config, language_model, TINY, run, arguments=["--out", str(tmp_path / "out")]) == 0
    calls = [np.array(json.loads(line)) for line in (tmp_path / "calls").read_text().splitlines()]
    calls = [call.reshape(4, 4) for call in calls if len(call) == 16]  # the others are evaluations
    with np.load(tmp_path / "out" / "metrics.npz") as found:
        own = "num_episodes", "episode_return", "reward/none", "groups_without_signal"
        made = np.stack([found[name][0, 0] for name in own], axis=-1)[np.isfinite(found["env_steps"][0, 0])]
    num_rounds = []
    for num_episodes, episode_return, mean, silent in made:
        rounds, calls = calls[: round(num_episodes / 16)], calls[round(num_episodes / 16) :]
        loud = np.cumsum([(x.min(1) < x.max(1)).sum() for x in rounds])
        assert (loud[:-1] < 4).all() and (loud[-1] >= 4 or len(rounds) == 3)
        assert episode_return == pytest.approx(np.mean(rounds))
        assert mean == pytest.approx(np.mean(rounds))
        assert silent == pytest.approx(1 - loud[-1] / 4 / len(rounds))
        num_rounds.append(len(rounds))
    assert not calls and len(num_rounds) >= 5 and len(set(num_rounds)) > 1


def test_a_resume_with_other_prompts_is_refused_and_an_agent_is_loaded_from_its_folder(whole, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "text")
    shutil.copytree(whole, tmp_path / "out")
    config = json.loads((whole / "config.json").read_text())
    assert config["run"]["prompts"] == str(folder / "train.jsonl")
    write(tmp_path / "text" / "train.jsonl", ROWS[1:])
    flags = "--prompts", str(tmp_path / "text" / "train.jsonl"), "--resume"
    assert ran(settings(folder), tmp_path / "out", *flags) == 2
    assert "with another configuration: prompts (was " in (said := capsys.readouterr().err)
    assert "prompts_digest (was " in said
    agent = load(whole, seed=1)
    assert agent.env.task.judge.names == ("count", "short") and agent.state.world == ()


def test_what_reads_rewards_within_its_program_is_refused(folder, monkeypatch):
    configs = {"ppo": PPOConfig(), "network": TINY}
    with pytest.raises(UsageError, match=r"^the reward of train is Python, and ppo reads rewards within its program"):
        prepare(ppo, language_model, configs, settings(folder), {})
    with (
        monkeypatch.context() as patch,
        pytest.raises(UsageError, match=r"distributed .*, which the reward of train is"),
    ):
        patch.setattr(outside, "number", lambda: 2)
        prepare(grpo, language_model, {"grpo": CONFIG, "network": TINY}, settings(folder), {})
    with pytest.raises(UsageError, match=r"env \(addition\) must be text"):
        text_env(settings(folder, env="addition"), TINY)
    with pytest.raises(UsageError, match=r"stop \(''\) must be texts that are not empty"):
        text_env(settings(folder, stop=("",)), TINY)
    with pytest.raises(UsageError, match=r"prompts \(None\) must be a file"):
        text_env(TextRunConfig(), TINY)
    with pytest.raises(UsageError, match=r"tokenizer \(None\) must be a Hugging Face folder"):
        text_env(settings(folder, tokenizer=None), TINY)
