"""Reward hacking: under GRPO a learned reward keeps rising while the true reward falls (cf. Stiennon et al. 2020, fig.
5; Gao et al. 2023, fig. 1). Also shows how a penalty on the KL from the initial policy prevents this.

    1. A small language model is cloned on a token task, with early stopping.
    2. It answers a thousand prompts. The best and the worst response to each prompt by the true reward make a pair. A
       reward model, the clone with a value head, is fitted to the pairs by the Bradley-Terry loss.
    3. GRPO with a leave-one-out baseline (`family`'s rloo) maximises the learned reward minus kl_coef * KL(pi || clone)
       for several coefficients. The true reward is measured on held-out prompts, which no training uses.

All seeds share one clone; each has its own pairs, reward model and training. The KL is part of the reward, estimated by
k1, whose policy gradient is that of the KL of whole responses. The learned reward is standardised so that the clone has
mean 0 and deviation 1, and a coefficient means the same to every seed: the optimal policy is clone * exp(reward /
kl_coef). The deviation is among responses to one prompt, since pairs do not determine differences between prompts.

With every clone and reward model that we tried, GRPO without a KL penalty finds responses that the reward model
overrates, and the true reward ends below the clone's. It first rises slightly for two of three clones of about these
sizes, whose reward models ranked unseen pairs better than the third's, but not with a quarter of the prompts and two
responses to each. Updates from fewer responses move further from the clone for a smaller gain.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parts.overoptimisation import draw, page_table, say_answers, say_reward_models, say_turns

from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.family import FAMILY
from purepg.algorithms.groups import source
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.preferences import learned_reward, sample_preferences
from purepg.algorithms.reward_model import RewardConfig, reward_model
from purepg.config import Count, Positive, Range, Seed
from purepg.envs.named_tasks import reversing
from purepg.envs.tasks import Task, token_env
from purepg.language.model import LanguageModel, LanguageModelConfig
from purepg.run.experiment import train_population
from purepg.run.plan import RunConfig
from purepg.run.reliability import bootstrap_interval, iqm
from purepg.run.start import language_model
from purepg.run.study import Study, main
from purepg.types import Algorithm, Array, Env, Key, Params, State, UpdateSteps, UsageError

MODEL = LanguageModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, mlp_size=64, value_head=True)
NUM_MEASURED = 1024  # the clone's responses that standardise the learned reward; also the number of held-out pairs
NUM_SHOWN = 5  # number of prompts whose responses the report shows


@dataclass(frozen=True)
class Config:
    """Settings of the experiment.

    Attributes:
      seed: seed of the experiment.
      num_seeds: number of agents, each with its own preference pairs, reward model and GRPO training.
      length: largest number of digits in a prompt; the task is to reverse them.
      clone_updates: updates of cloning, on 128 demonstrations each; more give a better clone.
      num_pairs: number of prompts that the clone answers for the preference pairs.
      num_candidates: number of responses to each of these prompts.
      reward_model_steps: gradient steps of the reward model, on batches of 64 pairs.
      num_updates: updates of GRPO.
      num_prompts: prompts per update of GRPO, with 8 responses each.
      learning_rate: Adam's learning rate in GRPO.
      kl_coefs: coefficients of the KL penalty to compare.
      num_held_out: number of held-out prompts per update on which the true reward is measured.
      window: number of updates over which the curves are averaged.
    """

    seed: Seed = 0
    num_seeds: Annotated[int, Range(2)] = 4
    length: Annotated[int, Range(2, 6)] = 4
    clone_updates: Count = 110
    num_pairs: Count = 1024
    num_candidates: Annotated[int, Range(2)] = 4
    reward_model_steps: Count = 200
    num_updates: Annotated[int, Range(2)] = 200
    num_prompts: Count = 64
    learning_rate: Positive = 3e-4
    kl_coefs: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    num_held_out: Count = 128
    window: Count = 9


def graded(task: Task) -> Task:
    """The task with partial credit: the number of correct columns, divided by the length of the response or of the
    correct answer, whichever is longer, so that missing and extra tokens both cost. An exact answer still earns 1.

    For tasks with exactly one correct answer to each prompt.
    """

    def reward(prompt: Array, response: Array) -> Array:
        answer = task.demonstration(jax.random.key(0), prompt)  # the only correct one, so the key does not matter
        right = jnp.sum((response == answer) & (answer >= 0))
        return right / jnp.maximum(jnp.sum(answer >= 0), jnp.sum(response >= 0))

    return task._replace(reward=reward)


# --- trained ---


class Curves(NamedTuple):
    """Measurements before every update, leaves `[S, H, U]`, and responses after the last one."""

    kl: Any  # KL of whole responses from the clone, computed exactly at each sampled token
    proxy: Any  # the learned reward on training prompts
    true: Any  # the true reward on held-out prompts
    answers: Any  # [H, NUM_SHOWN, L + R] prompts with the first seed's responses after training


class RewardModel(NamedTuple):
    """The quality of the reward models, leaves `[S]`."""

    pairs: Any  # number of pairs whose responses differ in true reward
    accuracy: Any  # share of these pairs that the model ranks correctly
    held_out_accuracy: Any  # the same on the clone's responses to held-out prompts
    correlation: Any  # between learned and true reward among the clone's responses to a prompt


class Judge(NamedTuple):
    """A learned reward, standardised over the clone's responses."""

    params: Params  # of the reward model
    mean: Array
    deviation: Array


class World(NamedTuple):
    """GRPO's world, and what the agent learned before GRPO."""

    grpo: Any
    judge: Judge
    found: RewardModel
    true_at_start: Array  # the clone's true reward on held-out prompts


def cloned(config: Config, env: Env) -> Params:
    """Trains the clone that all seeds start from, and returns its parameters."""
    batch = CloneConfig(batch_size=128, learning_rate=3e-3, num_held_out=0)
    steps = config.clone_updates * batch.batch_size * env.task.response_length
    run = RunConfig(total_steps=steps, num_seeds=1, seed=config.seed, log_every=0, eval_episodes=NUM_SHOWN)
    found = train_population(clone, batch, language_model, MODEL, run, env=env)
    return jax.device_get(found.agent().state.learner.params)


def judge(key: Key, env: Env, model: LanguageModel, config: Config) -> tuple[Judge, RewardModel, Array]:
    """Fits a reward model to pairs of the clone's responses; also returns its quality, and the clone's true reward on
    held-out prompts."""
    start, held_out = model.start, env.held_out
    assert held_out is not None
    k_pairs, k_held_out, k_fit, k_measure, k_start = jax.random.split(key, 5)
    pairs = sample_preferences(k_pairs, env, model, start, config.num_pairs, config.num_candidates)
    learner = reward_model(env, model, RewardConfig(batch_size=64, learning_rate=1e-3, adam_eps=1e-5))
    begun = learner.init(k_fit)._replace(world=(pairs, ()))  # the seed's own
    keys = jax.random.split(k_fit, config.reward_model_steps)
    fitted, _ = jax.lax.scan(lambda state, key: learner.step(key, state, jnp.int32(0)), begun, keys)
    params = fitted.learner.params

    def accuracy(pairs):
        margin = model.apply(params, pairs.chosen)[1] - model.apply(params, pairs.rejected)[1]
        return jnp.sum(pairs.weight * (margin > 0)) / jnp.sum(pairs.weight)

    unseen = sample_preferences(k_held_out, held_out, model, start, NUM_MEASURED, 2)
    own = source(env, model).sample(k_measure, start, NUM_MEASURED // 4, 4)
    learned, true = model.apply(params, own.obs)[1], jnp.sum(own.reward, axis=-1)
    deviation = jnp.sqrt(jnp.mean(jnp.var(learned, axis=1, ddof=1)))
    among = jnp.stack([learned, true]) - jnp.stack([learned, true]).mean(axis=-1, keepdims=True)
    correlation = jnp.corrcoef(among.reshape(2, -1))[0, 1]
    begins = source(held_out, model).sample(k_start, start, NUM_MEASURED, 1)
    found = RewardModel(jnp.sum(pairs.weight), accuracy(pairs), accuracy(unseen), correlation)
    return Judge(params, jnp.mean(learned), deviation), found, jnp.sum(begins.reward) / NUM_MEASURED


def judged_grpo(config: Config, env: Env, model: LanguageModel, own: GRPOConfig) -> Algorithm:
    """GRPO whose `init` first learns the reward from the seed's own pairs. Every update counts as many environment
    steps as the longest could take, so that a budget of environment steps fixes the number of updates."""

    def inner(learned: Judge) -> Algorithm:
        raw = learned_reward(model, learned.params)
        proxy = token_env(env.task, reward=lambda *answer: (raw(*answer) - learned.mean) / learned.deviation)
        return grpo(proxy._replace(held_out=env.held_out), model, own)

    def init(key):
        k_judge, k_init = jax.random.split(key)
        learned, found, true_at_start = judge(k_judge, env, model, config)
        learner, world, _ = inner(learned).init(k_init)
        return State(learner, World(world, learned, found, true_at_start))

    def step(key, state, update):
        after, metrics = inner(state.world.judge).step(key, State(state.learner, state.world.grpo), update)
        return State(after.learner, state.world._replace(grpo=after.world)), metrics

    def policy(state, deterministic):
        return inner(state.world.judge).policy(State(state.learner, state.world.grpo), deterministic)

    most = grpo(env, model, own).update_steps.most
    return Algorithm(init, step, policy, UpdateSteps(most, most))


def trained(config: Config, env: Env, start: Params) -> tuple[RewardModel, Curves]:
    """Trains every coefficient and seed as one program; a seed uses the same random keys for every coefficient."""
    c, held_out = config, env.held_out
    assert held_out is not None
    sizes = {"num_prompts": c.num_prompts, "learning_rate": c.learning_rate, "num_held_out": c.num_held_out}
    own = dataclasses.replace(FAMILY["rloo"], **sizes, kl_coef=0.0)
    steps = c.num_updates * own.num_prompts * own.group_size * env.task.response_length
    run = RunConfig(total_steps=steps, num_seeds=c.num_seeds, seed=c.seed, log_every=0, eval_episodes=NUM_SHOWN)
    what = partial(judged_grpo, c), own, lambda env, sizes: language_model(env, sizes, start), MODEL, run
    found = train_population(*what, env=env, sweep={"kl_coef": list(c.kl_coefs)})
    names = "kl_reference", "episode_return", "held_out_return"
    kl, proxy, after = (found.metrics[name].swapaxes(0, 1) for name in names)
    worlds = [found.agent(0, s).state.world for s in range(c.num_seeds)]
    # KL and proxy are measured before an update, the true reward after it, so the latter is shifted by one.
    at_start = np.array([world.true_at_start for world in worlds])
    first = np.broadcast_to(at_start[:, None, None], (*after.shape[:2], 1))
    true = np.concatenate([first, after[..., :-1]], axis=-1)
    answer = jax.jit(source(held_out, language_model(env, MODEL)).sample, static_argnums=(2, 3))
    key, shown = jax.random.key(c.seed), range(len(c.kl_coefs))
    answers = [answer(key, found.agent(h, 0).state.learner.params, NUM_SHOWN, 1).obs[:, 0] for h in shown]
    models = jax.tree.map(lambda *x: np.array(x), *(world.found for world in worlds))
    return models, Curves(kl, proxy, true, np.array(answers))


# --- the turning point ---


def smoothed(x: np.ndarray, window: int) -> np.ndarray:
    """Moving average over `window` values along the last axis; at the ends, over those that exist."""
    ones = np.ones(x.shape[-1])

    def around(row):
        return np.convolve(row, np.ones(window))[(window - 1) // 2 :][: row.shape[0]]

    return np.apply_along_axis(around, -1, x) / around(ones)


def turning_point(curve: np.ndarray) -> int:
    """Index of the maximum of `[U]`, the first of equals: U - 1 if the curve has not fallen, 0 if it never rose."""
    return int(np.argmax(curve))


class Turn(NamedTuple):
    """KL and rewards at one coefficient, each at the turning point and at the end."""

    update: int  # the turning point: number of updates after which the IQM over seeds of the true reward is highest
    kl: np.ndarray  # [S, 2]
    proxy: np.ndarray  # [S, 2]
    true: np.ndarray  # [S, 2]

    @property
    def fall(self) -> np.ndarray:
        return self.true[:, 0] - self.true[:, 1]

    @property
    def has_turned(self) -> bool:
        """Whether the fall's 95 % interval over seeds lies above 0."""
        return bool(bootstrap_interval(self.fall)[0] > 0)


def turn(kl: np.ndarray, proxy: np.ndarray, true: np.ndarray) -> Turn:
    """The turn of smoothed curves `[S, U]`. All seeds share one turning point, since each seed's own maximum would be
    mostly noise."""
    peak = turning_point(iqm(true, axis=0))
    return Turn(peak, *(x[:, [peak, -1]] for x in (kl, proxy, true)))


# --- the report ---


def study(config: Config) -> Study:
    """Clones, fits the reward models, runs GRPO, and finds the turning points."""
    c = config
    if not c.kl_coefs or min(c.kl_coefs) < 0 or not np.isfinite(c.kl_coefs).all():
        raise UsageError(f"kl_coefs ({c.kl_coefs}) must be one or more numbers of at least 0")
    task = graded(reversing(c.length))
    env = token_env(task)._replace(held_out=token_env(task, held_out=True))
    found, curves = trained(c, env, cloned(c, env))
    # The start is not smoothed: its KL is exactly 0, and its true reward is a mean over many responses.
    kl, proxy, true = (np.append(x[..., :1], smoothed(x[..., 1:], c.window), axis=-1) for x in curves[:3])
    turns = [turn(kl[:, h], proxy[:, h], true[:, h]) for h in range(len(c.kl_coefs))]
    at_start = curves.true[:, 0, 0]
    models = say_reward_models(c, task, found, at_start, NUM_MEASURED)
    report = [models, say_turns(c, turns), say_answers(c, task, curves.answers)]
    numbers = {
        "config": dataclasses.asdict(c),
        "true at the start": at_start,
        "reward models": found._asdict(),
        "turns": [
            {"kl_coef": k, "has turned": t.has_turned} | t._asdict() for k, t in zip(c.kl_coefs, turns, strict=True)
        ],
        "kl": iqm(kl, axis=0),
        "proxy": iqm(proxy, axis=0),
        "true": iqm(true, axis=0),
    }
    return Study("\n\n".join(report), numbers, draw(c, kl, proxy, true, turns), page_table(c, turns))


if __name__ == "__main__":
    main(study, Config(), __doc__)
