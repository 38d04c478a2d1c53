"""`RunConfig`, the settings of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from purepg.config import Count, CountOrZero, NonNegative, Positive, Range, Seed


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, apart from those of the algorithm and the network.

    Attributes:
      env: name of the environment, such as CartPole-v1 or craftax/Craftax-Symbolic.
      total_steps: budget of environment steps for each agent.
      num_seeds: number of agents trained for each setting.
      seed: seed of the run. Agent s of every setting derives its key from (seed, s).
      log_every: updates in a block. After each block the progress bar and log.jsonl advance, and W&B gets one row, the
        mean over the block. 0: the whole run is one program, and W&B gets a row for every update at the end.
      eval_episodes: number of episodes in each agent's final evaluation.
      eval_seed: seed of the final evaluation, the same for every agent.
      eval_max_steps: truncate evaluation episodes after this many steps. None: at the environment's time limit.
      search: number of settings drawn from the ranges and lists of the sweep, by Sobol points. None: the grid of lists.
      halve: after each rung, only the best 1/halve of the settings are trained on (successive halving). The first rung
        is so short that one setting is left in the last, which ends at total_steps. None: all are trained to the end.
      first_rung: environment steps of each agent in the first rung; each later one ends after halve times the steps of
        the one before. None: as short as leaves one setting.
      tpe: number of settings that are trained at once in a search; the first are Sobol points, and those of each later
        round are proposed by Optuna's TPE, from the returns so far. None: all settings are Sobol points.
      pbt: population-based training of the search's settings (`purepg.pbt`): the environment steps between two rounds,
        in which the worst copy the best and change hyperparameters, rounded down to whole updates. None: off.
      fresh_seeds: number of seeds, unseen in the run, on which the best setting, or with pbt the schedule of the best
        member, is trained and evaluated again. None: after a search, as many as num_seeds, or the first multiple of it
        from 10 on; after a grid, none.
      schedule: float fields that change during the run, each as NAME=STEP:VALUE,STEP:VALUE,... in environment steps,
        such as learning_rate=0:1e-3,50000:1e-4.
      max_parallel: number of agents trained at once. None: all of them, or as many as fit into memory.
      devices: devices for the agents (a CPU is split); must divide the seeds or, without pbt, the settings. None: as
        many as can, on a CPU at most two for each core.
      devices_per_agent: devices over which the environments (or prompts, or episodes) of each agent are spread. The
        result is that of one device, up to rounding and to how minibatches are dealt.
      compile_cache: keep compiled programs on disk, so that the next run starts faster.
      checkpoint_every: seconds between checkpoints, which are saved at the ends of blocks, and always after the last.
      keep: number of checkpoints to keep; older ones are deleted.
      out: folder for the results. None: the command line makes a new one under runs/; Python writes no files.
      overwrite: replace the run in the folder.
      resume: continue the run in the folder, with the same results as if it had never stopped. total_steps may be
        raised; schedules keep their original length.
      wandb: online (log in once with `wandb login`), offline (files in the folder), or disabled.
      wandb_per: log one W&B run for each seed, or one for each setting, with mean and interval.
      wandb_project: name of the W&B project.
      wandb_group: name of the W&B group. None: the folder's name.
      distributed: this is one of several processes, perhaps on several hosts, which share the agents
        (experiments/clusters.md). All are started with the same arguments. On SLURM, Open MPI and Kubernetes, JAX finds
        the values of the next three fields.
      coordinator: HOST:PORT of process 0. None: JAX_COORDINATOR_ADDRESS.
      num_processes: number of processes. None: JAX_NUM_PROCESSES.
      process_id: this process's number, from 0. None: JAX_PROCESS_ID.
      connect_timeout: seconds for which a process waits for the others.
      env_params: parameters of the environment, each as KEY=VALUE, such as gravity=9.0; of any, max_episode_steps; and
        of any in JAX, action_repeat, observed=0,2, average_pool=2 and previous=true (`envs.make`).
    """

    env: str = "CartPole-v1"
    total_steps: Count = 100_000
    num_seeds: Count = 16
    seed: Seed = 0
    log_every: CountOrZero = 10
    eval_episodes: Count = 128
    eval_seed: Seed = 0
    eval_max_steps: Count | None = None
    search: Count | None = None
    halve: Annotated[int, Range(2)] | None = None
    first_rung: Count | None = None
    tpe: Count | None = None
    pbt: Count | None = None
    fresh_seeds: CountOrZero | None = None
    schedule: tuple[str, ...] = ()
    max_parallel: Count | None = None
    devices: Count | None = None
    devices_per_agent: Count = 1
    compile_cache: bool = True
    checkpoint_every: NonNegative = 300.0
    keep: Count = 2
    out: Path | None = None
    overwrite: bool = False
    resume: bool = False
    wandb: Literal["online", "offline", "disabled"] = "offline"
    wandb_per: Literal["seed", "setting"] = "seed"
    wandb_project: str = "purepg"
    wandb_group: str | None = None
    distributed: bool = False
    coordinator: str | None = None
    num_processes: Count | None = None
    process_id: CountOrZero | None = None
    connect_timeout: Positive = 60.0
    env_params: tuple[str, ...] = ()
