"""Groups of episodes that share a start: G responses to a prompt, or G episodes from one initial state.

Both are `GroupedEpisodes`, so an algorithm does not need to know which it learns from. The second half of this file is
what such an algorithm has beside its loss and its step. Axes: `P` starts, `G` group, `T` steps, which come last here,
because losses and advantages are taken episode by episode.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepg.algorithms.configs import GroupConfig
from purepg.config import check_dealt, is_known
from purepg.envs.contract import check_environment
from purepg.equations.advantages import gae, group_advantage, has_signal
from purepg.equations.diagnostics import SPARSE, policy_change
from purepg.equations.distributions import Distribution, jointly
from purepg.experience.acting import actor, evaluation_policy
from purepg.experience.responses import Payment, flags, paid, pay
from purepg.experience.rollout import episodes_from, reset_all
from purepg.language.model import LanguageModel
from purepg.networks.actor_critic import require_policy_gradient
from purepg.optimize import TrainState, init_train_state
from purepg.spread import num_devices
from purepg.types import (
    Algorithm,
    Array,
    Env,
    Key,
    Metrics,
    Network,
    Obs,
    Params,
    Sampler,
    State,
    Step,
    UpdateSteps,
    UsageError,
    first_memory,
    first_seen,
    has_memory,
)

MAX_CORRECTION = 2.0  # upper bound on a probability under `score` over that under the sampler


class GroupedEpisodes(NamedTuple):
    """P * G whole episodes; leaves are `[P, G, ...]`."""

    obs: Obs  # what `score` reads: `[P, G, T, ...]`, or `[P, G, L + R]` rows of tokens; a memory is `[P, G, 1, ...]`
    action: Array  # [P, G, T, ...]
    log_prob: Array  # [P, G, T] under the policy that acted
    reward: Array  # [P, G, T], 0 outside the mask
    terminated: Array  # [P, G, T]
    truncated: Array  # [P, G, T]
    mask: Array  # [P, G, T] True at an episode's own steps
    log_correction: Array | None = None  # [P, G, T] log_prob minus the sampler's, where tokens were scored again; their
    # sum over the response where the sampler is truncated


class Source(NamedTuple):
    """Where groups come from.

    init: `init(key) -> params`.
    sample: `sample(key, params, P, G) -> GroupedEpisodes`.
    score: `score(params, obs [B, ...]) -> (distribution [B, T], V [B, T])`, for any B episodes.
    max_steps: T.
    answer: `answer(key, params, prompt [P, L], G)`, responses that have earned nothing yet; None for an environment's
      episodes.
    """

    init: Callable[[Key], Params]
    sample: Callable[[Key, Params, int, int], GroupedEpisodes]
    score: Callable[[Params, Obs], tuple[Distribution, Array]]
    max_steps: int
    answer: Callable[[Key, Params, Array, int], GroupedEpisodes] | None = None


def source(env: Env, network: Network | LanguageModel, max_steps: int | None = None) -> Source:
    """Samples responses where the network is a language model, and the environment's episodes otherwise.

    A response is sampled as a whole. Then the environment's `step` decides what each token earns and where the episode
    ends; the observations that `step` gives are not read.

    Args:
      max_steps: truncates an episode that still runs then; None uses the environment's time limit. The length of
        responses is the task's.
    Raises:
      UsageError: an environment without a time limit and no `max_steps`.
    """
    check_environment(env)

    def init(key):
        k_params, k_obs = jax.random.split(key)
        return network.init(k_params, first_seen(network, env.reset(k_obs)[1]))

    if isinstance(network, LanguageModel):
        sample, answer = partial(_responses, env, network), partial(_answers, env, network)
        return Source(init, sample, network.score, env.task.response_length, answer)
    steps = max_steps or env.max_episode_steps
    if steps is None:
        raise UsageError(f"{env.name} has no time limit: max_steps (None) must be set, so that an episode ends")
    return Source(init, partial(_episodes, env, network, steps), partial(_score, network), steps)


def _responses(
    env: Env, model: LanguageModel, key: Key, params: Params, num_prompts: int, group_size: int
) -> GroupedEpisodes:
    k_prompt, k_response, k_step = jax.random.split(key, 3)
    env_state, obs, *_ = reset_all(k_prompt, env, num_prompts)
    token, log_prob = model.generate(k_response, params, obs[:, : env.task.prompt_length], group_size)
    return _grouped(env, model, params, token, log_prob, pay(k_step, env, env_state, token))


def _answers(
    env: Env, model: LanguageModel, key: Key, params: Params, prompt: Array, group_size: int
) -> GroupedEpisodes:
    token, log_prob = model.generate(key, params, prompt, group_size)
    nothing = jnp.zeros(token.shape[:2])
    return _grouped(env, model, params, token, log_prob, paid(nothing, *flags(env.task, token)))


def _grouped(
    env: Env, model: LanguageModel, params: Params, token: Array, log_prob: Array, payment: Payment
) -> GroupedEpisodes:
    """The episodes of responses and what they earned."""
    L = env.task.prompt_length
    reward, terminated, truncated, mask = payment
    action = jnp.where(mask, token[..., L:], -1)
    token = jnp.concatenate([token[..., :L], action], axis=-1)
    log_prob = jnp.where(mask, log_prob, 0.0)
    data = GroupedEpisodes(token, action, log_prob, reward, terminated, truncated, mask)
    if not (model.is_narrow(params) or model.truncation.is_on):
        return data
    # Sampling sums column by column and scoring over whole rows, in another order. In narrow dtypes, a number that
    # rounds the other way is off by 2^-8 of itself, and a first ratio may be off by all of GSPO's clip range.
    scored = jnp.where(mask, model.score(params, token)[0].log_prob(action), 0.0)
    correction = scored - log_prob
    if model.truncation.is_on:
        correction = jnp.where(mask, jnp.sum(correction, axis=-1, keepdims=True), 0.0)
    return data._replace(log_prob=scored, log_correction=correction)


def _score(network: Network, params: Params, obs: Obs) -> tuple[Distribution, Array]:
    """`Source.score` of episodes `[B, T]`, which a network with memory goes through time first."""
    if not has_memory(network):
        return network.apply(params, obs)
    time_first = jax.tree.map(lambda x: x.swapaxes(0, 1), obs)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), network.apply(params, time_first))


def _episodes(
    env: Env, network: Network, max_steps: int, key: Key, params: Params, num_starts: int, group_size: int
) -> GroupedEpisodes:
    k_start, k_run = jax.random.split(key)
    world = reset_all(k_start, env, num_starts, first_memory(network))
    world = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), world)
    trajectory, mask, _ = episodes_from(k_run, env, actor(network, params), world, max_steps)

    def grouped(x):
        return jnp.moveaxis(x, 0, 1).reshape(num_starts, group_size, x.shape[0], *x.shape[2:])

    obs, action, log_prob, reward, terminated, truncated, _ = jax.tree.map(grouped, trajectory)
    return GroupedEpisodes(obs, action, log_prob, reward, terminated, truncated, grouped(mask))


def mean_return(key: Key, groups: Source, params: Params, num_episodes: int) -> Array:
    """The mean return of `num_episodes` episodes, each from a start of its own. On held-out prompts with a reward of 0
    or 1, this is the share of correct responses."""
    return jnp.sum(groups.sample(key, params, num_episodes, 1).reward) / num_episodes


# --- an algorithm on groups ---


class GroupLearner(NamedTuple):
    train_state: TrainState
    reference: Params  # of the policy that training started from
    kl_coef: Array

    @property
    def params(self) -> Params:
        return self.train_state.params


def check_groups(env: Env, network: Network | LanguageModel, c: GroupConfig) -> None:
    """Raises UsageError where sizes do not fit together, where a baseline would leave an advantage of 0 everywhere, or
    where the network lacks the critic or the stochastic policy that the config needs."""
    episodes, own = c.num_prompts * c.group_size, c.baseline in ("group_mean", "leave_one_out")
    check_dealt("num_prompts * group_size", episodes, c.num_minibatches)
    if c.group_size == 1 and c.baseline != "value" and (own or c.divide_by_std):
        raise UsageError("group_size (1) must be at least 2 for a baseline, or a standard deviation, of the group")
    if c.group_size == 1 and c.skip_groups_without_signal:
        raise UsageError("group_size (1) must be at least 2 to skip groups without signal: a group of one has none")
    if c.max_rounds > 1 and not c.skip_groups_without_signal:
        raise UsageError(f"max_rounds ({c.max_rounds}) must be 1 unless skip_groups_without_signal is set")
    if c.max_rounds > 1 and (devices := num_devices()) > 1:
        why = "agents that sample different numbers of rounds would wait for each other"
        raise UsageError(f"max_rounds ({c.max_rounds}) must be 1 with devices_per_agent ({devices}): {why}")
    if episodes == 1 and c.baseline == "batch_mean":
        raise UsageError("num_prompts * group_size (1) must be at least 2 with baseline batch_mean: it leaves 0 of 1")
    if c.kl_target is not None and is_known(c.kl_coef) and c.kl_coef == 0:
        raise UsageError("kl_coef (0) must be above 0 with a kl_target, which multiplies it: 0 would stay 0")
    if c.baseline == "value" and not (isinstance(network, LanguageModel) and network.has_value):
        raise UsageError("baseline (value) needs a language model with a critic: set --network.value-head")
    if not isinstance(network, LanguageModel):
        require_policy_gradient(env, network, "grpo", value=False)


def group_algorithm(
    groups: Source, network: Network | LanguageModel, c: GroupConfig, tx: optax.GradientTransformation, step: Step
) -> Algorithm:
    """The algorithm of a step, whose learner keeps the policy that training started from."""

    def init(key):
        params = groups.init(key)
        reference = jax.tree.map(jnp.copy, params)  # a buffer that two leaves share cannot be donated
        return State(GroupLearner(init_train_state(tx, params), reference, jnp.asarray(c.kl_coef, jnp.float32)), ())

    episodes = c.num_prompts * c.group_size
    update_steps = UpdateSteps(episodes, c.max_rounds * episodes * groups.max_steps)
    return Algorithm(init, step, evaluation_policy(network), update_steps, sampler=_sampler(groups, network, c))


def _sampler(groups: Source, network: Network | LanguageModel, c: GroupConfig) -> Sampler | None:
    if groups.answer is None or not isinstance(network, LanguageModel):
        return None
    answers = groups.answer

    def sample(key, learner, prompt):
        return answers(key, learner.params, prompt, c.group_size)

    def answer(key, learner, prompt, n, deterministic):
        return network.generate(key, learner.params, prompt, n, deterministic)[0]

    def rewarded(data, reward):
        return data._replace(reward=paid(reward, data.terminated, data.truncated, data.mask)[0])

    return Sampler(c.num_prompts, c.group_size, c.max_rounds, sample, answer, rewarded)


def score_all(groups: Source, params: Params, data: GroupedEpisodes) -> tuple[Array, Array]:
    """(log_prob, V) of all episodes by `groups.score`, each `[P, G, T]`, the former 0 outside the mask."""
    obs, action = jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), (data.obs, data.action))
    policy, value = groups.score(params, obs)
    log_prob = policy.log_prob(action).reshape(data.mask.shape)
    return jnp.where(data.mask, log_prob, 0.0), value.reshape(data.mask.shape)


def advantages(data: GroupedEpisodes, reward: Array, value: Array, c: GroupConfig) -> tuple[Array, Array]:
    """(advantage, target) of every step, `[P, G, T]`: the episode's `group_advantage`, or with a learned value GAE.

    Where tokens were sampled with other probabilities than they are scored with, the advantage is multiplied by the
    truncated ratio of the two (Yao et al. 2025). Where the sampler mu is itself the policy pi, cut off at some tokens
    and renormalised, that ratio is a whole response's, prod_t pi / mu, and at most 1. For a fixed advantage A, the
    expected update is then exactly the sum over all responses y that mu can sample of pi(y) A(y) grad log pi(y). With a
    baseline b of the batch or the group, whose mean is the sampler's, A = R - b: this is the gradient of the expected
    return if every response that mu cannot sample were worth b. A response's weight decreases with its length.

    Args:
      reward: `[P, G, T]`, perhaps with a KL penalty in it. value: `[P, G, T]`, V before each step.
    """
    if c.baseline == "value":
        advantage, target = _gae(data, reward, value, c)
    else:
        of_episode = group_advantage(jnp.sum(reward, axis=-1), c.baseline, c.divide_by_std)
        if c.divide_by_std:  # without this, a KL penalty alone, or its rounding, would be scaled up to deviation 1
            of_episode = jnp.where(has_signal(jnp.sum(data.reward, axis=-1)), of_episode, 0.0)
        advantage, target = jnp.where(data.mask, of_episode[..., None], 0.0), jnp.zeros_like(reward)
    if data.log_correction is not None:
        advantage *= jnp.minimum(jnp.exp(data.log_correction), MAX_CORRECTION)
    return advantage, target


def _gae(data: GroupedEpisodes, reward: Array, value: Array, c: GroupConfig) -> tuple[Array, Array]:
    value = jnp.where(data.mask, value, 0.0)
    next_value = jnp.roll(value, -1, axis=-1).at[..., -1].set(0.0)
    # Truncation at the last column counts as termination: the model sees its position, and so how much time is left.
    ended = data.terminated | data.truncated

    of_episode = partial(gae, gamma=1.0, lam=c.gae_lambda)
    return jax.vmap(jax.vmap(of_episode))(reward, value, next_value, ended, jnp.zeros_like(ended))


def watch(groups: Source, data: GroupedEpisodes, params: Params, new_params: Params, reference: Params) -> Metrics:
    """How an update moved the policy, measured on every fourth episode of a group.

    Args:
      params, new_params: before and after the update. reference: those of pi_ref.
    Returns:
      the metrics of `policy_change`, `min_ratio`, and `kl_reference`: the KL divergence of whole responses between the
      policy before the update and pi_ref, as the mean over episodes of the sum over steps of KL(pi || pi_ref).
    """
    obs, action, mask = jax.tree.map(
        lambda x: jax.lax.collapse(x[:, ::SPARSE], 0, 2), (data.obs, data.action, data.mask)
    )
    old, new, start = (groups.score(x, obs)[0] for x in (params, new_params, reference))

    def measured(old, new, start, action):
        return old.kl(start), new.log_prob(action) - old.log_prob(action)

    kl, log_ratio = jointly(measured, (old, new, start), action)
    from_start = jnp.mean(jnp.sum(kl, axis=-1, where=mask))
    least = jnp.min(jnp.exp(log_ratio), where=mask, initial=jnp.inf)
    return policy_change(old, new, action, where=mask) | {"kl_reference": from_start, "min_ratio": least}
