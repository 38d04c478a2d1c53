"""A population in environments that are not JAX: Python steps them, between compiled acting and compiled learning."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import in_units
from purepg.equations.distributions import executed
from purepg.experience.rollout import Recording
from purepg.run.host_population import HostMember, HostPopulation
from purepg.run.outside import EVALUATED_AT_ONCE, Recorder, evaluate_outside, seed_of
from purepg.run.plan import Plan
from purepg.run.population import EVALUATION_TAG, Evaluation, Members
from purepg.run.sweep import Hyper, Program
from purepg.types import Actor, Array, Explorer, Metrics, Obs, State, Transition, moment, seen


class OutsidePopulation(HostPopulation):
    """H settings x S seeds in one vector of H * S * N environments, on one device.

    The environments are not part of a state. They begin anew with `init`, and after a resume.
    """

    def __init__(self, plan: Plan, program: Program, shape: tuple[int, int]):
        super().__init__(plan, program, shape, partial(_Member, plan, program))
        member = _Member(plan, program)
        spread = self._spread
        self._act = jax.jit(
            lambda hyper, s, learner, carry, obs, starts, update, t: spread(
                lambda *of_agent: member.act(update, t, *of_agent)
            )(hyper, s, learner, carry, obs, starts)
        )
        self._choose = jax.jit(
            lambda hyper, s, state, memory, obs, turn, t, deterministic: spread(
                lambda hyper, s, state, memory, obs: member.choose(hyper, state, memory, obs, turn, t, deterministic)
            )(hyper, s, state, memory, obs),
            static_argnames="deterministic",
        )
        self._first_memory = jax.jit(
            lambda hyper, s, state, num_envs: spread(
                lambda hyper, s, state: member.policy(hyper, state).memory(num_envs)
            )(hyper, s, state),
            static_argnames="num_envs",
        )
        self._explorer = member.explorer
        self._recorder: Recorder | None = None
        self._carry: Any = ()

    def init(self, members: Members) -> State:
        self._close()
        return super().init(members)

    def with_more_steps(self, state: State, more: int) -> State:
        """The state as its environments begin anew: a running return that scales rewards starts from 0."""
        world = state.world
        if getattr(world, "running_return", None) is not None:
            state = state._replace(world=world._replace(running_return=jnp.zeros_like(world.running_return)))
        return super().with_more_steps(state, more)

    def final(self, members: Members, state: State) -> Evaluation:
        self._close()
        run = self._plan.run
        at_once = max(EVALUATED_AT_ONCE, self._explorer.num_envs)
        members = jax.device_put(members)

        def returns(deterministic: bool) -> Any:
            def act(turn, t, memory, obs):
                arguments = *members, state, memory, obs, np.int32(turn), np.int32(t)
                return self._compile(self._choose, *arguments, deterministic=deterministic)(*arguments)

            sizes = self._shape, run.eval_episodes, self._plan.eval_max_steps, run.eval_seed, at_once
            return evaluate_outside(act, memory, self._plan.env, *sizes).episode_return.mean(-1)

        def memory(num_envs: int) -> Any:
            return self._first_memory(*members, state, num_envs=num_envs)

        return Evaluation(returns(False), returns(True), None, None)

    def _record(self, members: Members, state: State, update: np.int32) -> tuple[tuple[Recording, Any], Metrics]:
        N, T = self._explorer.num_envs, self._explorer.num_steps
        if self._recorder is None:
            H, seeds = self._shape[0], np.asarray(members[1])
            own = [seed_of(self._plan.run.seed, int(s), i, int(update)) for s in seeds for i in range(N)]
            self._recorder = Recorder(self._plan.env, self._shape, N, T, own * H, self._explorer.joined)
            self._carry = self._first_carry(state)

        def act(t, obs, starts):
            arguments = state.learner, self._carry, obs, starts, update, np.int32(t)
            chosen = self._compile(self._act, *members, *arguments)(*members, *arguments)
            action, log_prob, memories, self._carry, taken = chosen
            return action, log_prob, memories, taken

        recording = self._recorder.record(act)
        return (recording, self._recorder.parted), {}

    def _first_carry(self, state: State) -> Any:
        shapes = jax.eval_shape(jax.vmap(jax.vmap(self._explorer.carry)), state.world.envs.obs)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    def _start_recording(self, members: Members, state: State) -> tuple[Recording, Any]:
        T, obs = self._explorer.num_steps, state.world.envs.obs
        flag: Any = jax.ShapeDtypeStruct(state.world.envs.episode_length.shape, bool)
        carry = jax.eval_shape(lambda: self._first_carry(state))
        number = jax.eval_shape(lambda: jnp.int32(0))
        arguments = state.learner, carry, obs, flag
        action, log_prob, (before, after), _, _ = jax.eval_shape(self._act, *members, *arguments, number, number)
        reward: Any = jax.ShapeDtypeStruct(flag.shape, np.float32)
        step = Transition(seen(obs, flag, before), action, log_prob, reward, flag, flag, moment(obs, after))

        def of_update(x):
            return jax.ShapeDtypeStruct((*x.shape[:2], T, *x.shape[2:]), x.dtype)

        finished: Any = jax.ShapeDtypeStruct((*self._shape, T, 3), np.float32)
        self._compile(self._act, *members, *arguments, number, number)
        return Recording(jax.tree.map(of_update, step), finished), flag

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


class _Member(HostMember):
    """One agent: how it acts, learns from a recording, and acts when it is evaluated."""

    @property
    def explorer(self) -> Explorer:
        found = self._plan.make(self._program.configs).explorer
        assert found is not None  # `prepare` has checked it
        return found

    def act(
        self, update: Array, t: Array, hyper: Hyper, s: Array, learner: Any, carry: Any, obs: Obs, starts: Array
    ) -> tuple[Any, ...]:
        key = jax.random.fold_in(self.acting_key(s, update), t)
        explorer = self._algorithm(hyper).explorer
        assert explorer is not None
        action, log_prob, memories, carry = explorer.act(key, learner, carry, update, t, obs, starts)
        return action, log_prob, memories, carry, in_units(self._plan.env.action_space, executed(action))

    def held(self, world: Any, recording: Any) -> Any:
        recording, parted = recording or ((), False)
        if getattr(world, "running_return", None) is not None:
            world = world._replace(running_return=jnp.where(parted, 0, world.running_return))
        return world._replace(envs=world.envs._replace(env_state=recording))

    def policy(self, hyper: Hyper, state: State, deterministic: bool = False) -> Actor:
        return self._algorithm(hyper).policy(state, deterministic)

    def choose(
        self, hyper: Hyper, state: State, memory: Any, obs: Obs, turn: Array, t: Array, deterministic: bool
    ) -> tuple[Any, Array]:
        key = jax.random.fold_in(jax.random.key(self._plan.run.eval_seed), EVALUATION_TAG)
        key = jax.random.fold_in(jax.random.fold_in(key, turn), t)
        memory, action, _ = self.policy(hyper, state, deterministic)(key, memory, obs)
        return memory, in_units(self._plan.env.action_space, executed(action))
