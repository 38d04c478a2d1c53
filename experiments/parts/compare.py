"""Reads saved runs to compare them: the scores of every setting's seeds, by label and environment."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purepg.run.console import reason
from purepg.run.folder.config import read_config, read_summary
from purepg.run.reliability import iqm
from purepg.run.sweep import label_of
from purepg.types import UsageError

PROTOCOL = "env_params", "total_steps", "eval_episodes", "eval_max_steps"  # a note says where runs differ in these
Strata = list[np.ndarray]  # one label's scores, `[S_k]` for each environment


class Row(NamedTuple):
    """A setting of a saved run."""

    folder: Path
    label: str
    setting: str
    env: str
    score: np.ndarray  # [S]
    num_diverged: int
    protocol: tuple[Any, ...]


def finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the summary of a run. Raises UsageError where it is not a finished run."""
    config, summary = read_config(folder), read_summary(folder)
    if summary["interrupted"]:
        raise UsageError(f"{folder} was interrupted: finish it (--resume) or leave it out")
    return config, summary


def number(x: float | None) -> float:
    """JSON's null is NaN."""
    return float("nan") if x is None else x


def rows_of(folder: Path, label: str, scores: str) -> list[Row]:
    """A row for each setting of a finished run.

    Raises:
      UsageError: the folder does not hold a finished run.
    """
    config, summary = finished(folder)
    rows = []
    try:
        run = config["run"] | {"env_params": " ".join(config["run"].get("env_params", ())) or "none"}
        for entry in summary["settings"]:
            finals = (entry if scores == "sampled" else entry[scores])["finals"]
            score = np.array(finals, np.float64)  # JSON's null becomes NaN
            protocol = tuple(run[field] for field in PROTOCOL)
            setting = label_of(entry["hyperparameters"])
            rows.append(Row(folder, label, setting, run["env"], score, len(entry["diverged"]), protocol))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{folder} is not a run's folder of this version: {reason(error)}") from error
    return rows


def gather(folders: Sequence[Path], labels: str | None, scores: str, best: bool) -> tuple[list[Row], list[str]]:
    """The rows of all runs, and notes on what the reader must know about them.

    Args:
      labels: comma-separated names of the runs; None: the folders' names. The settings of a sweep are named after the
        run.
      scores: "sampled", "mode" or "training".
      best: keep only the setting with the highest IQM of each run.
    Raises:
      UsageError: there is nothing to compare, or a run cannot be compared.
    """
    if not folders:
        raise UsageError("name the folder of at least one run")
    names = [folder.resolve().name for folder in folders]
    if labels is not None:
        names = [name.strip() for name in labels.split(",")]
        if len(names) != len(folders) or not all(names):
            raise UsageError(f"--labels ({labels}) must have a name for each run ({len(folders)}), separated by commas")
    alone = len(folders) == 1 and labels is None  # its settings need no name of the run
    kept, notes = [], []
    for folder, name in zip(folders, names, strict=True):
        rows = []
        for row in rows_of(folder, name, scores):
            label = row.setting if row.setting and alone else f"{name} {row.setting}".strip()
            if np.isfinite(row.score).all() and len(row.score):
                rows.append(row if best else row._replace(label=label))
            else:
                seeds = ", ".join(map(str, np.flatnonzero(~np.isfinite(row.score))))
                notes.append(f"{label} on {row.env} is left out: no score of seed {seeds}.")
        if best and len(rows) > 1:
            row = max(rows, key=lambda row: float(iqm(row.score)))
            of = f"the best of {len(rows)} settings by these same scores, which flatters it"
            notes.append(f"{name} on {row.env}: {row.setting}, {of}.")
            rows = [row]
        kept += rows
    if not kept:
        raise UsageError(f"nothing to compare. {' '.join(notes)}".strip())
    for row in kept:
        if row.num_diverged:
            diverged = f"{row.num_diverged} of {len(row.score)} seeds diverged, and count as they scored."
            notes.append(f"{row.label} on {row.env}: {diverged}")
    for env in dict.fromkeys(row.env for row in kept):
        for field, *values in zip(PROTOCOL, *(row.protocol for row in kept if row.env == env), strict=True):
            if len(different := dict.fromkeys(map(str, values))) > 1:
                notes.append(f"The runs on {env} differ in {field}: {', '.join(different)}.")
    return kept, notes


def ranges(texts: Sequence[str], envs: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Parses `["CartPole-v1=0,500"]` into a range for each environment; empty where returns are not normalised.

    Raises:
      UsageError: a range cannot be used, or an environment has none.
    """
    parsed = {}
    for text in texts:
        env, _, ends = text.rpartition("=")
        try:
            low, high = map(float, ends.split(","))
        except ValueError:
            low = high = math.nan
        if not env or not -math.inf < low < high < math.inf:
            raise UsageError(f"--range {text!r} must be ENV=LOW,HIGH with LOW below HIGH, as in CartPole-v1=0,500")
        if env not in envs or env in parsed:
            why = "twice" if env in parsed else f"but the runs are on {', '.join(envs)}"
            raise UsageError(f"--range names {env} {why}")
        parsed[env] = low, high
    missing = [env for env in envs if env not in parsed]
    if missing and (len(envs) > 1 or parsed):
        needed = " ".join(f"--range {env}=LOW,HIGH" for env in missing)
        raise UsageError(f"{len(envs)} environments can only be compared by normalised scores: add {needed}")
    return parsed


def stratify(rows: Sequence[Row], scale: Mapping[str, tuple[float, float]]) -> dict[str, Strata]:
    """Each label's scores, an array for each environment, normalised to its range in `scale` if it has one.

    Raises:
      UsageError: a label has no run on an environment, or two.
    """
    envs, labels = (list(dict.fromkeys(names)) for names in ([r.env for r in rows], [r.label for r in rows]))
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        other = found.setdefault((row.label, row.env), row)
        if other is not row:
            both = f"{other.folder} and {row.folder} are both {row.label!r} on {row.env}"
            raise UsageError(f"{both}: give them --labels that differ")

    def score(label, env):
        if (label, env) not in found:
            remedy = "all labels need the same environments (--labels says which runs belong together)"
            raise UsageError(f"{label!r} has no run on {env}: {remedy}")
        low, high = scale.get(env, (0.0, 1.0))
        return (found[label, env].score - low) / (high - low)

    return {label: [score(label, env) for env in envs] for label in labels}
