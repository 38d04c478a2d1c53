"""A stand-in for W&B's `init` and its runs, which remembers what it is given: no process, no files, no network."""

import json
from typing import Any

import pytest
import wandb


class FakeRun:
    """What one run was opened with and what it was given."""

    def __init__(self, options: dict[str, Any]):
        self.options = options  # of `wandb.init`
        self.config = options.get("config")
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.step_metrics: dict[str, str | None] = {}  # by metric, or by pattern: its x axis
        self.has_finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.step_metrics[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        numbers = {name: x for name, x in row.items() if not isinstance(x, wandb.Image | wandb.Table | wandb.Video)}
        json.dumps(numbers, allow_nan=False)  # raises where W&B would store something else
        self.rows.append(row)

    def finish(self) -> None:
        json.dumps(self.summary, allow_nan=False)
        self.has_finished = True


class FakeWandb:
    """Takes the place of `wandb.setup` and `wandb.init`; settings, images and tables are W&B's own."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.opened: list[FakeRun] = []
        self.modes: list[str] = []  # of every call of `init`, also those that raised
        self.online_error: Exception | None = None
        self._is_silent = False
        patch.setattr(wandb, "setup", self._setup)
        patch.setattr(wandb, "init", self._init)

    @property
    def runs(self) -> dict[str, FakeRun]:
        """By name, the last run that was opened under it."""
        return {run.options["name"]: run for run in self.opened}

    def _setup(self, settings: wandb.Settings) -> None:
        self._is_silent = settings.silent

    def _init(self, **options: Any) -> FakeRun:
        assert self._is_silent and options["settings"].silent, "a missing key would prompt in a terminal"
        assert options["id"] not in {run.options["id"] for run in self.opened}, "two runs of one id are one run"
        self.modes.append(options["mode"])
        if options["mode"] == "online" and self.online_error:
            raise self.online_error
        self.opened.append(FakeRun(options))
        return self.opened[-1]
