"""Terminal output during a run: messages on stderr and the live progress bar."""

import sys
import warnings
from typing import Any

import numpy as np
from tqdm import TqdmWarning, tqdm

quiet = False  # in the processes of a run that leave the terminal to the first


def say(line: str) -> None:
    """Writes one line to stderr, above the progress bar if one is shown."""
    if not quiet:
        tqdm.write(line, file=sys.stderr)


def reason(error: BaseException) -> str:
    """Describes an error in one line: the system's message for an OSError, else the type and the first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


class Progress:
    """The progress bar: updates, environment steps per second, mean return, time left. By default it is shown on
    terminals and in notebooks; `shown` forces it."""

    def __init__(self, total_steps: int, shown: bool | None = None):
        in_notebook = "ipykernel" in sys.modules
        disable = True if quiet else False if shown or in_notebook else None  # None: shown where stderr is a terminal
        self._bar = _bar(in_notebook)(
            total=total_steps, unit="step", unit_scale=True, disable=disable, smoothing=0.1, dynamic_ncols=True
        )

    def update(self, start: int, metrics: dict[str, np.ndarray]) -> None:
        """Advances the bar by a block of updates whose first has number `start`."""
        shown = {"updates": start + metrics["env_steps"].shape[-1]}
        returns = metrics.get("episode_return")
        if returns is not None and np.isfinite(returns).any():
            shown["return"] = f"{np.nanmean(returns):.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(int(metrics["env_steps"].sum()))

    def close(self) -> None:
        self._bar.close()


def _bar(in_notebook: bool) -> Any:
    if not in_notebook:
        return tqdm
    with warnings.catch_warnings():  # without ipywidgets, the bar is text
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm as notebook_bar
    return notebook_bar
