"""A population whose experience Python makes, between compiled programs; `OutsidePopulation` and `TextPopulation`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.run.memory import Memory
from purepg.run.plan import Plan, Warm
from purepg.run.population import EVALUATION_TAG, Member, Members, Population
from purepg.run.sweep import Hyper, Program
from purepg.train import train
from purepg.types import Array, Metrics, State, UsageError

ACTING_TAG = EVALUATION_TAG - 1  # no agent uses it either


class HostMember(Member):
    """One agent, which learns from what was recorded."""

    def held(self, world: Any, recording: Any) -> Any:
        """The world of a state, with a recording in its place."""
        raise NotImplementedError

    def acting_key(self, s: Array, update: Array) -> Array:
        """The key of what is drawn to act in an update."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._plan.run.seed), ACTING_TAG), s)
        return jax.random.fold_in(key, update)

    def learn(self, hyper: Hyper, s: Array, state: State, recording: Any, update: Array) -> tuple[State, Metrics]:
        state = state._replace(world=self.held(state.world, recording))
        first = self.first(state, update)
        state, metrics = train(self._key(s, training=True), self._algorithm(hyper), state, first, 1)
        return state._replace(world=self.held(state.world, ())), metrics


class HostPopulation(Population):
    """H settings x S seeds of one program. `_record` makes an update's experience, from which `_learn` learns."""

    def __init__(
        self, plan: Plan, program: Program, shape: tuple[int, int], member: Callable[[Warm | None], HostMember]
    ):
        super().__init__(plan, program, shape)
        self._plan, self._shape = plan, shape
        spread = self._spread

        def learn(warm, hyper, s, state, recording, update):
            state, metrics = spread(
                lambda hyper, s, state, recording: member(warm).learn(hyper, s, state, recording, update)
            )(hyper, s, state, recording)
            return spread.divided(state), metrics

        self._learn = jax.jit(learn, donate_argnames="state", out_shardings=(spread.placed, spread.read))
        self.failure: UsageError | None = None

    def start_compiling(self, members: Members, *block_lengths: int) -> None:
        state = self.abstract_state(members)
        if block_lengths:
            number = jax.eval_shape(lambda: jnp.int32(0))
            recording = self._start_recording(members, state)
            self._compile(self._learn, self._warm, *members, state, recording, number)
        self._compile(self._init, self._warm, *members)

    def memory(self, members: Members, num_updates: int) -> Memory:
        del num_updates
        return self._memory_of((self._learn,), members)

    def advance(
        self,
        members: Members,
        state: State,
        start: int,
        num_updates: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[State, Metrics]:
        """Runs updates until `stop`, or until one in which no agent takes a step. Where Python fails, it returns the
        updates before that, perhaps none, and sets `failure`."""
        made: list[Metrics] = []
        members = jax.device_put(members)
        for update in range(start, start + num_updates):
            number = np.int32(update)
            try:
                recording, measured = self._record(members, state, number)
            except UsageError as error:
                self.failure = error
                self._close()
                break
            arguments = self._warm, *members, state, recording, number
            state, metrics = self._compile(self._learn, *arguments)(*arguments)
            made.append(metrics | measured)
            if stop() or (self._updates_vary and not np.asarray(metrics["env_steps"]).any()):
                break  # asked to, or because all agents have used up their budgets
        return state, jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *jax.device_get(made)) if made else {}

    def _start_recording(self, members: Members, state: State) -> Any:
        """Starts to compile what acts; returns the shapes of a recording."""
        raise NotImplementedError

    def _record(self, members: Members, state: State, update: np.int32) -> tuple[Any, Metrics]:
        """An update's recording, and metrics `[H, S, 1]` that Python measured. Raises UsageError where it fails."""
        raise NotImplementedError

    def _close(self) -> None:
        """Ends what a later `_record` can begin anew."""
