"""Groups of episodes from one start: G responses to a prompt, or G episodes from one initial state.

Both are `Groups`, so that what learns from them need not know which they are. Below, what such an algorithm has beside
its loss and its step. Axes: `P` starts, `G` group, `T` steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepg.algorithms.configs import GroupConfig
from purepg.algorithms.on_policy import Step
from purepg.config import is_known
from purepg.envs.contract import check_environment
from purepg.envs.tasks import Task, TokenStep
from purepg.equations.advantages import gae, group_advantage, has_signal
from purepg.equations.diagnostics import SPARSE, policy_change
from purepg.equations.distributions import Distribution
from purepg.experience.acting import actor, evaluation_policy
from purepg.experience.rollout import episodes_from, start
from purepg.language.model import LanguageModel
from purepg.networks.actor_critic import require_policy_gradient
from purepg.optimize import TrainState, init_train_state
from purepg.precision import has_narrow
from purepg.types import (
    Algorithm,
    Array,
    Env,
    EpisodeMetrics,
    Key,
    Metrics,
    Network,
    Obs,
    Params,
    State,
    UpdateSteps,
    UsageError,
)

MAX_CORRECTION = 2.0  # bound on a token's ratio of `score`'s probability to the sampler's


class Groups(NamedTuple):
    """P * G whole episodes; leaves are `[P, G, ...]`."""

    obs: Obs  # what `score` reads: `[P, G, T, ...]`, or `[P, G, L + R]` rows of tokens
    action: Array  # [P, G, T, ...]
    log_prob: Array  # [P, G, T] under the policy that acted
    reward: Array  # [P, G, T], 0 outside the mask
    terminated: Array  # [P, G, T]
    truncated: Array  # [P, G, T]
    mask: Array  # [P, G, T] an episode's steps
    log_correction: Array | None = None  # [P, G, T] where log_prob is `score`'s: how much it is above the sampler's


class Source(NamedTuple):
    """Where groups come from.

    init: `init(key) -> params`.
    sample: `sample(key, params, P, G) -> Groups`.
    score: `score(params, obs [B, ...]) -> (distribution [B, T], V [B, T])`, for any B episodes.
    max_steps: T.
    """

    init: Callable[[Key], Params]
    sample: Callable[[Key, Params, int, int], Groups]
    score: Callable[[Params, Obs], tuple[Distribution, Array]]
    max_steps: int


def source(env: Env, network: Network | LanguageModel, max_steps: int | None = None) -> Source:
    """Groups of responses where the network is a language model, of the environment's episodes otherwise.

    Responses are sampled whole, and paid by the environment: its `step` says what a token earns and where an episode
    ends. What a step would have shown the model is not looked at.

    Args:
      max_steps: an episode still running then is truncated; None: at the environment's time limit. A task's responses
        have their own length.
    Raises:
      UsageError: an environment without a time limit and no `max_steps`.
    """
    check_environment(env)
    if isinstance(network, LanguageModel):
        return _responses(env, network)
    steps = max_steps or env.max_episode_steps
    if steps is None:
        raise UsageError(f"{env.name} has no time limit: max_steps (None) must be set, so that an episode ends")
    return _episodes(env, network, steps)


def _init(env: Env, network: Network | LanguageModel) -> Callable[[Key], Params]:
    def init(key):
        k_params, k_obs = jax.random.split(key)
        return network.init(k_params, env.reset(k_obs)[1])

    return init


def _responses(env: Env, model: LanguageModel) -> Source:
    L = env.task.prompt_length
    # Stepping a task's own step through R columns would compute R rewards, and all but the last one in vain.
    pay = partial(_paid_by_task, env.task) if env.step == TokenStep(env.task) else partial(_paid_by_steps, env)

    def sample(key, params, num_prompts, group_size):
        k_prompt, k_response, k_step = jax.random.split(key, 3)
        env_state, obs = jax.vmap(env.reset)(jax.random.split(k_prompt, num_prompts))
        token, log_prob = model.generate(k_response, params, obs[:, :L], group_size)
        reward, terminated, truncated, mask = pay(k_step, env_state, token)
        action = jnp.where(mask, token[..., L:], -1)
        token = jnp.concatenate([token[..., :L], action], axis=-1)
        log_prob = jnp.where(mask, log_prob, 0.0)
        groups = Groups(token, action, log_prob, reward, terminated, truncated, mask)
        if not has_narrow(params):
            return groups
        # Column by column and over whole rows, sums are made in another order, and where numbers are narrow one that
        # falls on the other side of a rounding is off by 2^-8 of itself: a first ratio may be off by GSPO's whole clip.
        policy, _ = model.score(params, token.reshape(-1, token.shape[-1]))
        scored = jnp.where(mask, policy.log_prob(action.reshape(-1, action.shape[-1])).reshape(mask.shape), 0.0)
        return groups._replace(log_prob=scored, log_correction=scored - log_prob)

    return Source(_init(env, model), sample, model.score, env.task.response_length)


def _paid_by_task(task: Task, key: Key, env_state: Any, token: Array) -> tuple[Array, Array, Array, Array]:
    """What `_paid_by_steps` gives where the step is the task's own."""
    del key, env_state
    action = token[..., task.prompt_length :]
    mask = action >= 0
    last = mask & ~jnp.roll(mask, -1, axis=-1).at[..., -1].set(False)
    score = jax.vmap(jax.vmap(lambda row: task.reward(row[: task.prompt_length], row[task.prompt_length :])))
    reward = jnp.where(last, score(token)[..., None], 0.0)
    return reward, last & (action == task.eos), last & (action != task.eos), mask


def _paid_by_steps(env: Env, key: Key, env_state: Any, token: Array) -> tuple[Array, Array, Array, Array]:
    """(reward, terminated, truncated, mask), each `[P, G, R]`, of the tokens `[P, G, L + R]` sent through `env.step`.

    A response that the steps end early ends there, and one that they never end is truncated at its last token.

    Args:
      env_state: `[P, ...]`, after the reset.
    """

    def of_response(key, env_state, action):
        def step(carry, now):
            env_state, alive = carry
            key, action, is_last = now
            env_state, (_, reward, terminated, truncated) = env.step(key, env_state, jnp.maximum(action, 0))
            alive &= action >= 0
            truncated |= is_last & ~terminated
            paid = jnp.where(alive, reward, 0.0), alive & terminated, alive & truncated, alive
            return (env_state, alive & ~(terminated | truncated)), paid

        is_last = jnp.append(action[1:] < 0, True)
        keys = jax.random.split(key, action.shape[0])
        return jax.lax.scan(step, (env_state, jnp.bool_(True)), (keys, action, is_last))[1]

    keys = jax.random.split(key, token.shape[:2])
    of_group = jax.vmap(of_response, in_axes=(0, None, 0))
    return jax.vmap(of_group)(keys, env_state, token[..., env.task.prompt_length :])


def _episodes(env: Env, network: Network, max_steps: int) -> Source:
    def sample(key, params, num_starts, group_size):
        k_start, k_run = jax.random.split(key)
        world = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), start(k_start, env, num_starts))
        trajectory, mask, _ = episodes_from(k_run, env, actor(network, params), world, max_steps)

        def grouped(x):
            return jnp.moveaxis(x, 0, 1).reshape(num_starts, group_size, max_steps, *x.shape[2:])

        obs, action, log_prob, reward, terminated, truncated, _ = jax.tree.map(grouped, trajectory)
        return Groups(obs, action, log_prob, reward, terminated, truncated, grouped(mask))

    return Source(_init(env, network), sample, network.apply, max_steps)


def info(groups: Groups) -> Metrics:
    """What an update says of its episodes: means of `episode_return` and `episode_length`, their number, the steps in
    the mask as `env_steps`, which for responses are the generated tokens; and of parameters narrower than float32 the
    largest `sampler_log_ratio`, of a token's probability as it was scored to that as it was sampled."""
    env_steps = jnp.sum(groups.mask, dtype=jnp.int32)
    num_episodes = groups.mask.shape[0] * groups.mask.shape[1]
    metrics = EpisodeMetrics(
        episode_return=jnp.sum(groups.reward) / num_episodes,
        episode_length=env_steps / num_episodes,
        num_episodes=jnp.int32(num_episodes),
        env_steps=env_steps,
    )
    gap = groups.log_correction
    return dict(metrics) if gap is None else dict(metrics) | {"sampler_log_ratio": jnp.max(jnp.abs(gap))}


def mean_return(key: Key, groups: Source, params: Params, num_episodes: int) -> Array:
    """The mean return of that many episodes, each from a start of its own: on held-out prompts, the share answered
    right."""
    return jnp.sum(groups.sample(key, params, num_episodes, 1).reward) / num_episodes


# --- an algorithm on groups ---


class Learner(NamedTuple):
    train_state: TrainState
    reference: Params  # the start's
    kl_coef: Array

    @property
    def params(self) -> Params:
        return self.train_state.params


def check_groups(env: Env, network: Network | LanguageModel, c: GroupConfig) -> None:
    """Raises UsageError where sizes do not fit together or leave nothing to learn from, or a critic, or a stochastic
    policy, is asked of a network that has none."""
    episodes, own = c.num_prompts * c.group_size, c.baseline in ("group_mean", "leave_one_out")
    if episodes % c.num_minibatches:
        by = f"num_minibatches ({c.num_minibatches})"
        raise UsageError(f"num_prompts * group_size ({episodes}) must be divisible by {by}")
    if c.group_size == 1 and c.baseline != "value" and (own or c.divide_by_std):
        raise UsageError("group_size (1) must be at least 2 for a baseline, or a deviation, of the group's own")
    if c.group_size == 1 and c.skip_groups_without_signal:
        raise UsageError("group_size (1) must be at least 2 to skip groups without signal: a group of one has none")
    if episodes == 1 and c.baseline == "batch_mean":
        raise UsageError("num_prompts * group_size (1) must be at least 2 with baseline batch_mean: of 1 it leaves 0")
    if c.kl_target is not None and is_known(c.kl_coef) and c.kl_coef == 0:
        raise UsageError("kl_coef (0) must be above 0 with a kl_target, which adapts it by factors: 0 stays 0")
    if c.baseline == "value" and not (isinstance(network, LanguageModel) and network.has_value):
        raise UsageError("baseline (value) needs a language model with a critic: set --network.value-head")
    if not isinstance(network, LanguageModel):
        require_policy_gradient(env, network, "grpo", value=False)


def assemble(
    groups: Source,
    network: Network | LanguageModel,
    c: GroupConfig,
    tx: optax.GradientTransformation,
    step: Step,
) -> Algorithm:
    """The algorithm of a step, whose learner keeps the policy it started from."""

    def init(key):
        params = groups.init(key)
        reference = jax.tree.map(jnp.copy, params)  # a buffer that two leaves share cannot be donated
        kl_coef = jnp.asarray(c.kl_coef, jnp.float32)
        return State(Learner(init_train_state(tx, params), reference, kl_coef), ())

    def policy(state, deterministic):
        return evaluation_policy(network, state.learner.params, deterministic)

    episodes = c.num_prompts * c.group_size
    return Algorithm(init, step, policy, UpdateSteps(episodes, episodes * groups.max_steps))


def score_all(groups: Source, params: Params, data: Groups) -> tuple[Any, Array]:
    """`groups.score` of all episodes, `[P, G, T]`."""
    axes = data.mask.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data.obs)
    return jax.tree.map(lambda x: x.reshape(*axes, *x.shape[1:]), groups.score(params, flat))


def advantages(data: Groups, reward: Array, value: Array, c: GroupConfig) -> tuple[Array, Array]:
    """(advantage, target) of every step, `[P, G, T]`: its episode's `group_advantage`, or GAE's and the critic's.

    Where tokens were sampled with other probabilities than they are scored with, the advantage is times the ratio of
    the two, truncated (Yao et al. 2025).

    Args:
      reward: `[P, G, T]`, with a penalty in it perhaps. value: `[P, G, T]`, V before each step.
    """
    advantage, target = _advantages(data, reward, value, c)
    if data.log_correction is not None:
        advantage *= jnp.minimum(jnp.exp(data.log_correction), MAX_CORRECTION)
    return advantage, target


def _advantages(data: Groups, reward: Array, value: Array, c: GroupConfig) -> tuple[Array, Array]:
    if c.baseline != "value":
        advantage = group_advantage(jnp.sum(reward, axis=-1), c.baseline, c.divide_by_std)
        if c.divide_by_std:  # else a penalty alone, or its rounding, would be blown up to one
            advantage = jnp.where(has_signal(jnp.sum(data.reward, axis=-1)), advantage, 0.0)
        return jnp.where(data.mask, advantage[..., None], 0.0), jnp.zeros_like(reward)
    value = jnp.where(data.mask, value, 0.0)
    next_value = jnp.roll(value, -1, axis=-1).at[..., -1].set(0.0)
    # A response cut at its last column is over: the model sees its columns, and so the time that is left.
    ended = data.terminated | data.truncated

    def of_episode(reward, value, next_value, ended):
        return gae(reward, value, next_value, ended, jnp.zeros_like(ended), 1.0, c.gae_lambda)

    return jax.vmap(jax.vmap(of_episode))(reward, value, next_value, ended)


def watch(groups: Source, data: Groups, params: Params, new_params: Params, reference_policy: Distribution) -> Metrics:
    """How an update moved the policy, over every fourth episode of a group.

    Args:
      params, new_params: before and after it. reference_policy: the start's, `[P, G, T]`.
    Returns:
      `policy_change`'s, `min_ratio`, and `kl_reference`, how far the policy was from the start's before the update: the
      mean over episodes of the sum over steps of KL(pi || pi_ref), exact at each.
    """

    def some(tree):
        return jax.tree.map(lambda x: x[:, ::SPARSE].reshape(-1, *x.shape[2:]), tree)

    obs, action, mask = some((data.obs, data.action, data.mask))
    old, new = groups.score(params, obs)[0], groups.score(new_params, obs)[0]
    from_start = jnp.mean(jnp.sum(old.kl(some(reference_policy)), axis=-1, where=mask))
    ratio = jnp.exp(new.log_prob(action) - old.log_prob(action))
    least = jnp.min(ratio, where=mask, initial=jnp.inf)
    return policy_change(old, new, action, where=mask) | {"kl_reference": from_start, "min_ratio": least}
