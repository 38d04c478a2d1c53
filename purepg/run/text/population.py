"""A population whose rewards are Python: one compiled program samples responses, another one learns from them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.tasks import Judge
from purepg.equations.advantages import has_signal
from purepg.run.host_population import HostMember, HostPopulation
from purepg.run.memory import Memory
from purepg.run.plan import Plan
from purepg.run.population import EVALUATION_TAG, SHOWN, Evaluation, Members
from purepg.run.reward_model import LearnedReward
from purepg.run.sweep import Hyper, Program
from purepg.run.text.config import TextRunConfig
from purepg.run.text.passes import passed, powers_of_two
from purepg.run.text.prompts import in_epochs
from purepg.spread import divided
from purepg.types import Array, Metrics, Sampler, State

REFILLS = 2**32 - 1  # tells the epochs of groups that are sampled in place of others from an agent's own


class Answered(NamedTuple):
    """What an evaluation found, of every agent."""

    measures: dict[str, np.ndarray]  # [H, S]
    sampled: np.ndarray  # [H, S] mean reward of sampled responses
    greedy: np.ndarray  # [H, S] of the most probable ones
    shown: np.ndarray  # [H, S, SHOWN, L + R] the first prompts with a sampled response
    reward: np.ndarray  # [H, S, SHOWN] what these earned


class TextPopulation(HostPopulation):
    """H settings x S seeds of one program. The user's functions are called once for the responses of all agents.

    An agent goes through the prompts in shuffled epochs, which are those of its seed in every setting. Groups that are
    sampled in place of others have epochs of their own.
    """

    def __init__(self, plan: Plan, program: Program, shape: tuple[int, int]):
        member = partial(_Member, plan, program)
        super().__init__(plan, program, shape, member)
        spread = self._spread
        self._sample = jax.jit(
            lambda warm, hyper, s, state, prompt, update, turn: spread(
                lambda hyper, s, state, prompt: member(warm).sample(hyper, s, state, prompt, update, turn)
            )(hyper, s, state, prompt),
            out_shardings=spread.rows,
        )
        self._answer = jax.jit(
            lambda warm, hyper, s, state, prompt, turn, num, deterministic: spread(
                lambda hyper, s, state: member(warm).answer(hyper, state, prompt, turn, num, deterministic)
            )(hyper, s, state),
            static_argnames=("num", "deterministic"),
        )
        self._learned = [LearnedReward(folder, plan.env.task) for folder in self._judge.learned]
        self._sampler, self._most = member(None).sampler, program.update_steps.most
        self._num_updates = program.num_updates
        self._shown: list[tuple[np.ndarray, Answered]] = []

    def memory(self, members: Members, num_updates: int) -> Memory:
        del num_updates
        programs = (self._learn,), (self._sample,)
        return max((self._memory_of(program, members) for program in programs), key=lambda found: found.per_device)

    def final(self, members: Members, state: State) -> Evaluation:
        found = self._answered(jax.device_put(members), state)
        self._shown.append((self._made(state, np.int32(self._num_updates))[0], found))
        means: Any = found.sampled, found.greedy
        shown: Any = found.shown, found.reward
        return Evaluation(*means, *shown, measures=found.measures)

    def new_samples(self) -> list[tuple[np.ndarray, Any, Any]]:
        taken, self._shown = self._shown, []
        return [(made, found.shown, found.reward) for made, found in taken]

    def _start_recording(self, members: Members, state: State) -> Any:
        number: Any = jax.eval_shape(lambda: jnp.int32(0))
        length = self._judge.prompt.shape[1]
        prompt: Any = jax.ShapeDtypeStruct((*self._shape, self._sampler.num_prompts, length), np.int32)
        arguments = self._warm, *members, state, prompt, number, number
        self._compile(self._sample, *arguments)
        table = self._held_out.prompt
        for n, deterministic in ((self._run.eval_samples, False), (1, True)):
            some: Any = jax.ShapeDtypeStruct((self._at_once(n), table.shape[1]), table.dtype)
            asked = self._warm, *members, state, some, number
            self._compile(self._answer, *asked, num=n, deterministic=deterministic)
        reward: Any = jax.ShapeDtypeStruct((*prompt.shape[:3], self._sampler.group_size), np.float32)
        recording = jax.eval_shape(self._sample, *arguments), reward
        recording = jax.eval_shape(lambda x: _of_rounds([x], self._sampler.max_rounds), recording)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._spread.rows), recording)

    def _record(self, members: Members, state: State, update: np.int32) -> tuple[Any, Metrics]:
        made, going = self._made(state, update)
        every = self._run.eval_every
        if going.any() and (update == 0 or (every and update % every == 0)):
            found = self._answered(members, state)
            self._shown.append((made, found))
            measured = found.measures
        else:
            measured = {name: np.full(self._shape, np.nan, np.float32) for name in self._measures()}
        recording, rewards = self._rewarded(members, state, update, made, going)
        return recording, {name: x[..., None] for name, x in (measured | rewards).items()}

    def _made(self, state: State, update: np.int32) -> tuple[np.ndarray, np.ndarray]:
        """How many updates each agent has made, and whether its budget of environment steps allows another, `[H, S]`.

        Args:
          update: the number of the next update, where all have one length.
        """
        if not self._updates_vary:
            return np.full(self._shape, update), np.ones(self._shape, bool)
        made, left = jax.device_get((state.guard.num_updates, state.guard.env_steps_left))
        return made, left >= self._most

    def _rewarded(
        self, members: Members, state: State, update: np.int32, made: np.ndarray, going: np.ndarray
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """The responses of an update with their rewards, and each reward's mean `[H, S]`. The functions are not asked
        about agents that are not going on, and not in later rounds about those whose groups all have a signal."""
        most, num_signals, rounds, means = self._sampler.max_rounds, np.zeros(self._shape, int), [], []
        for turn in range(most):
            asked = going & (num_signals < self._sampler.num_prompts)
            if turn and not asked.any():
                break
            recording, mean = self._round(members, state, update, np.int32(turn), made, asked)
            rounds.append(recording)
            means.append(mean)
            signal = has_signal(recording[1].reshape(-1, self._sampler.group_size))
            num_signals += np.asarray(signal).reshape(*self._shape, -1).sum(-1)
        means, num_asked = np.array(means), np.maximum(1, np.isfinite(means).sum(0))
        means = np.where(going, np.where(np.isfinite(means), means, 0).sum(0) / num_asked, np.nan).astype(np.float32)
        recording = jax.device_put(_of_rounds(rounds, most), self._spread.rows)
        return recording, {f"reward/{x}": mean for x, mean in zip(self._judge.names, means, strict=True)}

    def _round(
        self, members: Members, state: State, update: np.int32, turn: np.int32, made: np.ndarray, going: np.ndarray
    ) -> tuple[Any, np.ndarray]:
        """P groups with their rewards, and each reward's mean `[K, H, S]`; NaN of agents that are not going on."""
        P, G, num_rewards = self._sampler.num_prompts, self._sampler.group_size, len(self._judge.names)
        seeds = np.broadcast_to(members[1], self._shape)
        agents = zip(seeds.ravel().tolist(), made.ravel().tolist(), strict=True)
        place = np.stack([self._places(s, u, int(turn)) for s, u in agents]).reshape(*self._shape, P)
        arguments = self._warm, *members, state, self._judge.prompt[place], update, turn
        data = self._compile(self._sample, *arguments)(*arguments)
        reward = np.zeros((*place.shape, G), np.float32)
        means = np.full((num_rewards, *self._shape), np.nan, np.float32)
        if going.any():
            response = np.asarray(data.action)[going]
            asked = np.repeat(place[going].reshape(-1), G)
            rewards = self._rewards(self._judge, asked, response.reshape(len(asked), -1))
            reward[going] = (self._judge.weight @ rewards).reshape(-1, P, G)
            means[:, going] = rewards.reshape(num_rewards, -1, P * G).mean(-1)
        return (data, reward), means

    def _places(self, s: int, update: int, turn: int) -> np.ndarray:
        """The prompts of a round: those of the first are an epoch's next ones, and those of later ones another's."""
        P, seeds = self._sampler.num_prompts, (self._plan.run.seed, s)
        if turn:
            seeds, update = (*seeds, REFILLS), update * (self._sampler.max_rounds - 1) + turn - 1
        return in_epochs(seeds, len(self._judge.prompt), update * P, P)

    def _answered(self, members: Members, state: State) -> Answered:
        """Answers the held-out prompts: several sampled responses to each, and the most probable one."""
        judge, n = self._held_out, self._run.eval_samples
        sampled = self._answers(members, state, judge.prompt, n, deterministic=False)
        greedy = self._answers(members, state, judge.prompt, 1, deterministic=True)
        token = np.concatenate([sampled, greedy], axis=-2)  # [H, S, prompts, n + 1, L + R]
        length, num_prompts = judge.prompt.shape[1], len(judge.prompt)
        place = np.broadcast_to(np.arange(num_prompts)[:, None], token.shape[:-1]).reshape(-1)
        rewards = self._rewards(judge, place, token[..., length:].reshape(len(place), -1))
        rewards = rewards.reshape(-1, *token.shape[:-1])
        total = np.tensordot(judge.weight, rewards, axes=1)
        measures = dict(zip(self._measures(), passed(rewards[0, ..., :n], rewards[0, ..., n]), strict=True))
        means = total[..., :n].mean((-1, -2)), total[..., n].mean(-1)
        return Answered(measures, *means, sampled[:, :, :SHOWN, 0], total[:, :, :SHOWN, 0])

    def _rewards(self, judge: Judge, place: np.ndarray, response: np.ndarray) -> np.ndarray:
        """Each reward `[K, B]` of responses `[B, R]` to the prompts at these places."""
        learned = [reward(judge.prompt[place], response)[None] for reward in self._learned]
        return np.concatenate([judge.reward(place, response), *learned])

    def _measures(self) -> list[str]:
        """The names of what `passed` computes."""
        return [*(f"eval/pass@{k}" for k in powers_of_two(self._run.eval_samples)), "eval/greedy_pass"]

    def _answers(self, members: Members, state: State, prompt: np.ndarray, n: int, deterministic: bool) -> np.ndarray:
        """n responses to each prompt `[prompts, L]`, `[H, S, prompts, n, L + R]`, about as many at once as an update
        samples."""
        at_once, found = self._at_once(n), []
        for turn, first in enumerate(range(0, len(prompt), at_once)):
            place = np.minimum(np.arange(first, first + at_once), len(prompt) - 1)
            arguments = self._warm, *members, state, prompt[place], np.int32(turn)
            static: Any = {"num": n, "deterministic": deterministic}
            found.append(np.asarray(self._compile(self._answer, *arguments, **static)(*arguments)))
        return np.concatenate(found, axis=2)[:, :, : len(prompt)]

    def _at_once(self, n: int) -> int:
        """How many held-out prompts, a multiple of an agent's devices, are answered at once, n responses to each."""
        at_once = min(len(self._held_out.prompt), max(1, self._sampler.num_prompts * self._sampler.group_size // n))
        return at_once + -at_once % self._run.devices_per_agent

    @property
    def _held_out(self) -> Judge:
        assert self._plan.env.held_out is not None
        return self._plan.env.held_out.task.judge

    @property
    def _run(self) -> TextRunConfig:
        assert isinstance(self._plan.run, TextRunConfig)
        return self._plan.run

    @property
    def _judge(self) -> Judge:
        return self._plan.env.task.judge


def _of_rounds(rounds: list[Any], most: int) -> Any:
    """What was recorded in an update: that of its one round, or with up to `most` of all, `[H, S, most, P, G, ...]`."""
    if most == 1:
        return rounds[0]
    rounds = rounds + rounds[-1:] * (most - len(rounds))  # the last ones stand for rounds that nobody needs
    return jax.tree.map(lambda *x: jnp.stack(x, axis=2), *rounds)


class _Member(HostMember):
    """One agent: how it samples, answers held-out prompts, and learns."""

    @property
    def sampler(self) -> Sampler:
        found = self._plan.make(self._program.configs).sampler
        assert found is not None  # `prepare` has checked it
        return found

    def held(self, world: Any, recording: Any) -> Any:
        del world
        return self.sampler.rewarded(*recording) if recording else ()

    def sample(self, hyper: Hyper, s: Array, state: State, prompt: Array, update: Array, turn: Array) -> Any:
        sampler: Any = self._algorithm(hyper).sampler
        key = self.acting_key(s, self.first(state, update))
        key = key if sampler.max_rounds == 1 else jax.random.fold_in(key, turn)
        return sampler.sample(key, state.learner, divided(prompt, 0))

    def answer(self, hyper: Hyper, state: State, prompt: Array, turn: Array, num: int, deterministic: bool) -> Array:
        sampler: Any = self._algorithm(hyper).sampler
        key = jax.random.fold_in(jax.random.key(self._plan.run.eval_seed), EVALUATION_TAG)
        return sampler.answer(jax.random.fold_in(key, turn), state.learner, divided(prompt, 0), num, deterministic)
