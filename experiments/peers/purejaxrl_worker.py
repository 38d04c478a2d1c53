"""A worker process with PureJaxRL's PPO (ppo.py or ppo_rnn.py at commit 31756b1), which the benchmark times in turn
with purepg. It answers in the same lines of JSON as the others. ppo_rnn.py needs the flax of its time and so JAX
0.4.13.

The work is `jit(vmap(make_train(config)))` on CartPole, which trains from the first parameters on in every run; its
learning rate is not annealed and its debugging output is off. It always clips the value. What it imports for other
environments, brax and navix, is replaced by empty modules. A time limit is a terminal state in it.
"""

import argparse
import importlib
import sys
import time
import types
from pathlib import Path

import jax
from answers import ready, timed_runs


def imported(algorithm: str) -> types.ModuleType:
    """A file of the checkout in this Python's virtual environment."""
    names = ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["brax"].envs = sys.modules["brax.envs"]  # pyright: ignore
    for name in ("EpisodeWrapper", "AutoResetWrapper"):
        setattr(sys.modules["brax.envs.wrappers.training"], name, None)
    sys.path.insert(0, str(Path(sys.prefix) / "purejaxrl" / "purejaxrl"))
    return importlib.import_module(algorithm)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--algorithm", choices=["ppo", "ppo_rnn"], default="ppo")
    for name, default in (("num-envs", 4), ("num-seeds", 1), ("num-updates", 10), ("num-steps", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    steps = args.num_envs * args.num_steps * args.num_updates
    sizes = {"NUM_ENVS": args.num_envs, "NUM_STEPS": args.num_steps, "TOTAL_TIMESTEPS": steps}
    sizes |= {"UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 4, "ENV_NAME": "CartPole-v1", "ANNEAL_LR": False, "DEBUG": False}
    loss = {"LR": 2.5e-4, "GAMMA": 0.99, "GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5}
    rest = {"MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh"}
    train = jax.vmap(imported(args.algorithm).make_train(sizes | loss | rest))
    keys = jax.random.split(jax.random.PRNGKey(0), args.num_seeds)

    start = time.perf_counter()
    program = jax.jit(train).lower(keys).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(program(keys))
    env_steps = steps * args.num_seeds
    ready(compile_seconds, env_steps, ("gymnax", "jax", "jaxlib", "flax", "optax", "distrax"))
    timed_runs(lambda: program(keys), env_steps)


if __name__ == "__main__":
    main()
