"""A worker process that experiments/benchmark.py times. It answers in lines of JSON.

`purepg_worker.py speed|overhead ALGORITHM SIZE SEEDS UPDATES STEPS DEVICES [DEVICES_PER_AGENT]` compiles a population,
reports that it is ready, and then trains it once for every line on stdin. DEVICES is 0 for as many as can.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from answers import answer
from products import alone, products

from purepg import envs
from purepg.algorithms.groups import source
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.td3 import TD3Config, td3
from purepg.language.model import LanguageModelConfig
from purepg.networks.actor_critic import ActorCritic, ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.networks.heads import ValueHead
from purepg.run.console import Progress
from purepg.run.devices import Spread
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.record import Record
from purepg.run.loop import Interrupt, Job, LogBlock, Saving, run_job
from purepg.run.memory import peak_memory_bytes
from purepg.run.plan import Plan, RunConfig, prepare
from purepg.run.population import Member, Population
from purepg.run.start import language_model
from purepg.run.sweep import Chunk
from purepg.run.watch.sink import WandbSink
from purepg.runtime import compile_options
from purepg.types import Env

WARMUP_STEPS = 300  # finished before the timing starts


def make(name: str, size: int, num_steps: int) -> tuple[Any, Any, Any, Any, str]:
    """The algorithm, its config, the network and its config, and the environment's name.

    Args:
      size: number of environments, or width of the language model.
    """
    if name == "grpo":
        config = GRPOConfig(num_prompts=32, group_size=8, num_held_out=0)
        return grpo, config, language_model, LanguageModelConfig(hidden_size=size, mlp_size=2 * size), "addition"
    steps: dict[str, Any] = {"num_envs": size, "num_steps": num_steps}
    if name == "ppo":
        config = PPOConfig(**steps, learning_rate=2.5e-4, entropy_coef=0.01)
        return ppo, config, actor_critic, NetworkConfig(), "CartPole-v1"
    if name in ("ppo_rnn", "ppo_without_memory"):
        config = PPOConfig(**steps, learning_rate=2.5e-4, entropy_coef=0.01, clip_value_eps=0.2)
        memory: Any = {"memory": "gru", "memory_size": 128} if name == "ppo_rnn" else {}
        network = NetworkConfig(hidden=(128,), activation="relu", shared=True, **memory)
        return ppo, config, deeper, network, "CartPole-v1"
    if name == "sac":
        config = SACConfig(**steps, warmup_steps=WARMUP_STEPS)
        return sac, config, actor_q, ActorQConfig(policy="tanh_gaussian"), "Pendulum-v1"
    config = TD3Config(**steps, warmup_steps=WARMUP_STEPS)
    return td3, config, actor_q, ActorQConfig(policy="deterministic"), "Pendulum-v1"


class Deeper(nn.Module):
    """A head after one more layer of 128."""

    head: Any

    @nn.compact
    def __call__(self, x):
        return self.head(name="head")(nn.relu(nn.Dense(128, name="hidden")(x)))


def deeper(env: Env, config: NetworkConfig) -> ActorCritic:
    """The network of PureJaxRL's ppo_rnn.py: a layer and a GRU that policy and critic share, and a layer of each."""
    network = actor_critic(env, config)
    return network.clone(
        policy_head=partial(Deeper, network.policy_head),
        value_head=lambda features, name: Deeper(partial(ValueHead, features=features), name=name),
    )


def prepared(
    name: str, size: int, num_seeds: int, num_updates: int, num_steps: int, devices: int, per_agent: int = 1
) -> tuple[Plan, Job]:
    """A plan whose budget lasts for a thousand runs of `num_updates`, and its only job."""
    algorithm, config, network, network_config, env = make(name, size, num_steps)
    most = 32 * 8 * 4 if name == "grpo" else size * num_steps  # steps of an update
    spread: Any = {"devices": devices or None, "devices_per_agent": per_agent}
    run = RunConfig(env, 1000 * most * num_updates, num_seeds, compile_cache=False, **spread)
    plan = prepare(algorithm, network, {algorithm.__name__: config, "network": network_config}, run, {})
    (chunk,) = plan.chunks()
    return plan, Job(0, chunk, Population(plan, chunk.program, chunk.shape), plan.run.total_steps)


def speed(name: str, size: int, num_seeds: int, num_updates: int, num_steps: int, *spread: int) -> None:
    """Times the training of `num_updates` updates, without logging."""
    plan, (_, chunk, population, *_) = prepared(name, size, num_seeds, num_updates, num_steps, *spread)
    members = chunk.members
    state = population.init(members)

    def train(state, start):
        state, metrics = population.advance(members, state, start, num_updates)
        return state, int(np.asarray(metrics["env_steps"], np.int64).sum())

    before = population.compile_seconds
    (state, _), start = train(state, 0), num_updates
    answer(
        ready=True,
        compile_seconds=population.compile_seconds - before,
        devices=plan.num_devices,
        device=jax.devices()[0].device_kind,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    generate = generation(size, num_seeds) if name == "grpo" else None
    multiply = None
    for line in sys.stdin:
        if line.strip() == "products":
            multiply = multiply or products_alone(plan, chunk, num_updates)
            answer(seconds=multiply())
            continue
        begun = time.perf_counter()
        state, env_steps = train(state, start)
        seconds, start = time.perf_counter() - begun, start + num_updates
        generated = generate(state.learner.params, start) if generate else None
        answer(
            seconds=seconds, env_steps=env_steps, generated_per_second=generated, peak_memory_bytes=peak_memory_bytes()
        )


def products_alone(plan: Plan, chunk: Chunk, num_updates: int) -> Callable[[], float]:
    """A function that makes the matrix products of `num_updates` updates of all agents, and returns the seconds."""
    member, (hyper, seeds) = Member(plan, chunk.program), chunk.members
    hyper, s = jax.tree.map(lambda x: x[0], hyper), seeds[0]
    state = jax.eval_shape(member.init, hyper, s)
    update = jax.make_jaxpr(lambda hyper, s, state: member.advance(hyper, s, state, jnp.int32(0), 1))(hyper, s, state)
    multiply = alone(products(update.jaxpr), num_updates)
    spread = Spread(*chunk.shape, plan.num_devices)(lambda hyper, s: multiply(1e-3 * s))
    compiled = jax.jit(spread).lower(*chunk.members).compile(compiler_options=compile_options())
    jax.block_until_ready(compiled(*chunk.members))

    def seconds() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*chunk.members))
        return time.perf_counter() - begun

    return seconds


def generation(width: int, num_seeds: int) -> Callable[[Any, int], float]:
    """A function that samples the responses of one update for every seed, and returns the tokens per second."""
    _, config, network, network_config, env = make("grpo", width, 0)
    env = envs.make(env)
    groups = source(env, network(env, network_config))

    @jax.jit
    def sample(key, params):
        def of_seed(key, params):
            return groups.sample(key, params, config.num_prompts, config.group_size).mask.sum()

        return jax.vmap(of_seed)(jax.random.split(key, num_seeds), params)

    def tokens_per_second(params: Any, seed: int) -> float:
        params = jax.tree.map(lambda x: x[0], params)
        np.asarray(sample(jax.random.key(seed), params))
        begun, tokens = time.perf_counter(), 0
        for i in range(5):
            tokens += int(np.asarray(sample(jax.random.key(seed + i), params)).sum())
        return tokens / (time.perf_counter() - begun)

    return tokens_per_second


def overhead(name: str, size: int, num_seeds: int, num_updates: int, num_steps: int, devices: int) -> None:
    """For each line on stdin, times a run of `num_updates` updates with the kind of logging or saving it names."""
    plan, job = prepared(name, size, num_seeds, num_updates, num_steps, devices)
    job = job._replace(chunk=replace(job.chunk, program=replace(job.chunk.program, num_updates=num_updates)))
    log_every = plan.run.log_every
    run_job(job, plan.env, log_every, lambda *block: None, Interrupt())
    answer(ready=True)
    for line in sys.stdin:
        what = line.strip()
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
            out, saving = Path(folder), None
            log = watching(what, out, ends, plan)
            if what == "a checkpoint":
                checkpoints = Checkpoints(out, 0, 2)
                ends.callback(checkpoints.close)
                saving = Saving(checkpoints, 1e9, lambda error: sys.exit(str(error)))  # only the last checkpoint
            trained = run_job(job, plan.env, log_every, log, Interrupt(), saving).run_seconds
        answer(seconds=time.perf_counter() - begun, trained=trained)


def watching(what: str, out: Path, ends: contextlib.ExitStack, plan: Plan) -> LogBlock:
    """The function that receives every block of metrics."""
    if what == "log.jsonl":
        record = ends.enter_context(Record.open(out))
        return lambda chunk, start, metrics: record.append_block(chunk.settings, start, metrics, chunk.seeds)
    if what == "progress bar":
        bar = Progress(plan.run.total_steps, shown=True)
        ends.callback(bar.close)
        return lambda chunk, start, metrics: bar.update(start, metrics)
    if what == "W&B":
        seeds = list(range(plan.run.num_seeds))
        sink = WandbSink("offline", "seed", "benchmark", "benchmark", out, {}, [{}], seeds, plan.run.log_every)
        ends.callback(sink.finish, {})
        return lambda chunk, start, metrics: sink.log_block(chunk.settings, start, metrics, chunk.seeds)
    return lambda *block: None


if __name__ == "__main__":
    work, name, *numbers = sys.argv[1:]
    {"speed": speed, "overhead": overhead}[work](name, *map(int, numbers))
