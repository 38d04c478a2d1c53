"""Saved runs, read back to be compared: the scores of every setting's seeds, by label and environment."""

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

PROTOCOL = "total_steps", "eval_episodes", "eval_max_steps"  # what should be equal, and is said where it is not
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


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the summary of a finished run.

    Raises:
      UsageError: there is none.
    """
    config, summary = read_config(folder), read_summary(folder)
    if summary["interrupted"]:
        raise UsageError(f"{folder} was interrupted: finish it (--resume) or leave it out")
    return config, summary


def settings_of(folder: Path, label: str, scores: str) -> list[Row]:
    """A row for each setting of a run.

    Raises:
      UsageError: it is not a finished run.
    """
    config, summary = read(folder)
    rows = []
    try:
        protocol = tuple(config["run"][field] for field in PROTOCOL)
        for found in summary["settings"]:
            finals = (found if scores == "sampled" else found[scores])["finals"]
            row = Row(
                folder=folder,
                label=label,
                setting=label_of(found["hyperparameters"]),
                env=config["run"]["env"],
                score=np.array(finals, np.float64),  # JSON's null becomes NaN
                num_diverged=len(found["diverged"]),
                protocol=protocol,
            )
            rows.append(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{folder} is not a run's folder of this version: {reason(error)}") from error
    return rows


def gather(folders: Sequence[Path], labels: str | None, scores: str, best: bool) -> tuple[list[Row], list[str]]:
    """The rows of all runs, and what is to be said of them.

    Args:
      labels: a name for each run, with commas between; None: the folder's. Where a run has several settings, they are
        named after it.
      scores: "sampled", "mode" or "training".
      best: of each run, only the setting with the highest IQM.
    Raises:
      UsageError: nothing to compare, or a run that cannot be.
    """
    if not folders:
        raise UsageError("name the folder of at least one run")
    names = [folder.resolve().name for folder in folders]
    if labels is not None:
        names = [name.strip() for name in labels.split(",")]
        if len(names) != len(folders) or not all(names):
            raise UsageError(f"--labels ({labels}) must be a name for each run ({len(folders)}), by commas")
    alone = len(folders) == 1 and labels is None  # its settings need not say whose they are
    kept, notes = [], []
    for folder, name in zip(folders, names, strict=True):
        rows = []
        for row in settings_of(folder, name, scores):
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
    notes += [
        f"{row.label} on {row.env}: {row.num_diverged} of {len(row.score)} seeds diverged, and count as they scored."
        for row in kept
        if row.num_diverged
    ]
    for env in dict.fromkeys(row.env for row in kept):
        for field, *values in zip(PROTOCOL, *(row.protocol for row in kept if row.env == env), strict=True):
            if len(different := dict.fromkeys(map(str, values))) > 1:
                notes.append(f"The runs on {env} differ in {field}: {', '.join(different)}.")
    return kept, notes


def ranges(texts: Sequence[str], envs: Sequence[str]) -> dict[str, tuple[float, float]]:
    """`["CartPole-v1=0,500"]` by environment; empty where returns are compared as they are.

    Raises:
      UsageError: one that cannot be used, or one is missing.
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
        raise UsageError(f"{len(envs)} environments are comparable by normalised scores only: add {needed}")
    return parsed


def stratify(rows: Sequence[Row], scale: Mapping[str, tuple[float, float]]) -> dict[str, Strata]:
    """Each label's scores, one array for each environment, normalised where there is a scale.

    Raises:
      UsageError: a label has no run in an environment, or two.
    """
    envs, labels = (list(dict.fromkeys(names)) for names in ([r.env for r in rows], [r.label for r in rows]))
    by_place: dict[tuple[str, str], Row] = {}
    for row in rows:
        other = by_place.setdefault((row.label, row.env), row)
        if other is not row:
            raise UsageError(
                f"{other.folder} and {row.folder} are both {row.label!r} on {row.env}: give them --labels that differ"
            )
    for label in labels:
        for env in envs:
            if (label, env) not in by_place:
                remedy = "all labels need the same environments (--labels says which runs belong together)"
                raise UsageError(f"{label!r} has no run on {env}: {remedy}")

    def score(label, env):
        low, high = scale.get(env, (0.0, 1.0))
        return (by_place[label, env].score - low) / (high - low)

    return {label: [score(label, env) for env in envs] for label in labels}
