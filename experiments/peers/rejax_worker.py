"""A worker process with rejax 0.1.3's PPO, SAC and TD3, which the benchmark times in turn with purepg.

It runs in its own virtual environment, because rejax needs gymnax 0.0.9 and purepg needs gymnax 1.0.1:

    pip install rejax==0.1.3 gymnax==0.0.9 jax==0.10.2 jaxlib==0.10.2

The worker prints {"ready": true, ...} once the program is compiled and has run once. For each line `run` on stdin it
then prints a line {"seconds": ..., "env_steps": ...}; `quit` or the end of stdin ends it.

The work is rejax's own `train` under `jit(vmap(...))`. Evaluation is off: none at the start, and the one that `train`
requires at the end is replaced by a constant. Each run continues from the state where the last one stopped. rejax
differs from purepg in these points, for which it has no switch: it clips each gradient element instead of the global
norm, its PPO always clips the value and updates actor and critic separately, its replay samples without replacement,
in time that grows with the capacity, and its SAC updates the policy before the critics.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from answers import ready, timed_runs
from rejax import PPO, SAC, TD3  # pyright: ignore[reportMissingImports]


def make_algorithm(args, env_steps):
    common = {
        "num_envs": args.num_envs,
        "gamma": args.gamma,
        "learning_rate": args.learning_rate,
        "total_timesteps": env_steps,
        "eval_freq": env_steps,  # one evaluation, after all updates ...
        "skip_initial_evaluation": True,
    }
    if args.algorithm == "ppo":
        return PPO.create(
            env="CartPole-v1",
            agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
            num_steps=args.num_steps,
            num_epochs=args.num_epochs,
            num_minibatches=args.num_minibatches,
            gae_lambda=args.gae_lambda,
            clip_eps=args.clip_eps,
            ent_coef=args.entropy_coef,
            vf_coef=args.value_coef,
            max_grad_norm=args.max_grad_norm,
            **common,
        )
    replay = {
        "env": "Pendulum-v1",
        "buffer_size": args.capacity,
        "fill_buffer": args.warmup_steps,
        "batch_size": args.batch_size,
        "num_epochs": 1,
        "polyak": 1 - args.tau,
    }
    if args.algorithm == "sac":  # rejax's networks are 64 x 64 by default
        return SAC.create(agent_kwargs={"activation": "relu"}, **replay, **common)
    relu = {"activation": "relu"}
    return TD3.create(actor_kwargs=dict(relu), critic_kwargs=dict(relu), exploration_noise=0.1, **replay, **common)


def make_program(args):
    env_steps = args.num_envs * args.num_steps * args.num_updates
    algorithm = make_algorithm(args, env_steps)
    algorithm = algorithm.replace(eval_callback=lambda algorithm, state, rng: jnp.zeros(()))  # ... which does nothing

    def init(keys):
        return jax.vmap(algorithm.init_state)(keys)

    def train(state):
        return jax.vmap(lambda state: algorithm.train(train_state=state)[0])(state)

    return init, train, env_steps * args.num_seeds


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--algorithm", default="ppo", choices=["ppo", "sac", "td3"])
    ints = dict(num_envs=4, num_seeds=1, num_updates=100, num_steps=128, num_epochs=4, num_minibatches=4)
    ints |= dict(capacity=100_000, warmup_steps=300, batch_size=256, seed=0)
    floats = dict(learning_rate=2.5e-4, gamma=0.99, gae_lambda=0.95, clip_eps=0.2, entropy_coef=0.01, value_coef=0.5)
    floats |= dict(max_grad_norm=0.5, tau=0.005)
    for name, default in (ints | floats).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    init, train, env_steps = make_program(args)

    state = jax.block_until_ready(jax.jit(init)(jax.random.split(jax.random.PRNGKey(args.seed), args.num_seeds)))
    start = time.perf_counter()
    program = jax.jit(train, donate_argnums=0).lower(state).compile()
    compile_seconds = time.perf_counter() - start
    state = jax.block_until_ready(program(state))
    assert int(state.global_step.sum()) == env_steps, "rejax made another number of environment steps than asked for"
    ready(compile_seconds, env_steps, ("rejax", "gymnax", "jax", "jaxlib", "flax", "optax"))

    def run():
        nonlocal state
        state = program(state)
        return state

    timed_runs(run, env_steps)


if __name__ == "__main__":
    main()
