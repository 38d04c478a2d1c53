"""Opening a W&B run in silence: no prompt, no login, nothing printed."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from purepg.run.console import reason
from purepg.run.folder.files import WANDB
from purepg.types import UsageError

INIT_SECONDS = 15  # a run that cannot go online within this time is recorded offline
FINISH_SECONDS = 30  # what is not uploaded within this time stays on disk
MAX_NAME_LENGTH = 128  # W&B's limit

Mode = Literal["online", "offline", "disabled"]


def refuse_several_under_an_agent(num_runs: int) -> None:
    """Raises UsageError where `wandb agent` has started this process, in which all W&B runs would be the agent's one:
    W&B then ignores the ids that `open_run` gives."""
    if num_runs > 1 and "WANDB_SWEEP_ID" in os.environ:
        remedy = "set --wandb-per setting, and leave the choice of settings to the agent instead of --sweep"
        raise UsageError(f"wandb agent has one W&B run for this process, which would open {num_runs}: {remedy}")


def set_up(mode: Mode) -> None:
    """Silences W&B for the whole process. Silencing each run would not do: a missing key prompts in a terminal."""
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode=mode))


def open_run(mode: Mode, out: Path, name: str, say: Callable[[str], None], **options: Any) -> tuple[Any, Mode]:
    """Opens a run with files in `out/wandb` and further options of `wandb.init`. If it cannot go online it is recorded
    offline, and `say` is told. An exception means that not even this worked.

    Returns:
      (run, mode): the run and whether it is "online" or "offline".
    """
    import wandb

    def init(mode: Mode) -> Any:
        settings = wandb.Settings(  # new for each run, as `init` writes into them
            silent=True,
            console="off",
            disable_git=True,
            x_save_requirements=False,  # reading them takes most of the time to open a run
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            reinit="create_new",
        )
        run_id = secrets.token_hex(4)  # else a WANDB_RUN_ID of the user would make all runs one
        return wandb.init(id=run_id, name=name[:MAX_NAME_LENGTH], dir=out, mode=mode, settings=settings, **options)

    if mode == "online":
        try:
            return init(mode), mode
        except Exception as error:
            say(f"cannot go online ({reason(error)}); recording offline, {sync(out, 'offline-run-*')} sends the files")
    return init("offline"), "offline"


def sync(out: Path, runs: str) -> str:
    """The command that uploads the runs of a folder."""
    return f"`wandb sync {out}/{WANDB}/{runs}`"
