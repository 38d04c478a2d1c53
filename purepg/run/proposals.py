"""Settings that Optuna's TPE proposes (Bergstra et al. 2011), given the returns of those before."""

from typing import Any

import numpy as np

from purepg.run.search import Sweep, Uniform, draw, takes_integers
from purepg.run.sweep import Configs, Setting
from purepg.types import UsageError

TRIES = 20  # proposals, before a Sobol point is taken in place of one that was trained before


class Proposals:
    """A study of Optuna, kept in memory: a resumed run tells it the same returns again, and it proposes the same.

    Args:
      settings: the first ones, which were not proposed.
    Raises:
      UsageError: Optuna is not installed.
    """

    def __init__(self, configs: Configs, sweep: Sweep, seed: int, settings: list[Setting]):
        try:
            import optuna
        except ImportError:
            raise UsageError('tpe needs Optuna: pip install -e ".[tpe]"') from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._drawn = optuna, (configs, sweep, seed)
        self._ranges = {name: self._distribution(name) for name in sweep}
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(settings), constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._trials: dict[tuple[Any, ...], Any] = {}  # by the values of the swept fields
        for setting in settings:
            self._enqueue(setting)

    def tell(self, setting: Setting, iqm: float) -> None:
        """Takes note of a setting's return; one that is not finite counts as failed."""
        trial = self._trials[tuple(setting.hyperparameters.values())]
        state = None if np.isfinite(iqm) else self._optuna.trial.TrialState.FAIL
        self._study.tell(trial, None if state else iqm, state=state)

    def ask(self, number: int) -> list[tuple[Any, ...]]:
        """Proposes values of the swept fields that differ from all before. While a batch is chosen, those that are in
        it count as bad ones (`constant_liar`), so that it spreads."""
        return [self._ask() for _ in range(number)]

    def _ask(self) -> tuple[Any, ...]:
        for _ in range(TRIES):
            trial = self._study.ask(self._ranges)
            values = tuple(self._value(name, x) for name, x in trial.params.items())
            if values not in self._trials:
                self._trials[values] = trial
                return values
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        configs, sweep, seed = self._drawn
        points = draw(configs, sweep, len(self._trials) + 1, seed)
        return self._enqueue(next(x for x in points if tuple(x.hyperparameters.values()) not in self._trials))

    def _enqueue(self, setting: Setting) -> tuple[Any, ...]:
        values = tuple(setting.hyperparameters.values())
        params = {}
        for name, x in setting.hyperparameters.items():
            among = self._drawn[1][name]
            params[name] = x if isinstance(among, Uniform) else list(among).index(x)
        self._study.enqueue_trial(params)
        self._trials[values] = self._study.ask(self._ranges)
        return values

    def _distribution(self, name: str) -> Any:
        configs, sweep, _ = self._drawn
        values, of = sweep[name], self._optuna.distributions
        if not isinstance(values, Uniform):
            return of.CategoricalDistribution(range(len(values)))
        kind = of.IntDistribution if takes_integers(configs, name, values) else of.FloatDistribution
        return kind(values.low, values.high, log=values.log)

    def _value(self, name: str, x: Any) -> Any:
        values = self._drawn[1][name]
        if not isinstance(values, Uniform):
            return values[x]
        return x if isinstance(x, int) else values.rounded(x)
