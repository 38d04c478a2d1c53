"""Rewards in Python: found by the names in `--reward`, and called for all responses of an update at once."""

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from purepg.run.console import reason
from purepg.run.folder.files import CONFIG
from purepg.run.text.prompts import Prompts
from purepg.run.text.ready import OF_ARGUMENT, READY
from purepg.types import UsageError

LARGEST = float(np.finfo(np.float32).max)
SHOWN = 60  # characters of a completion in an error


class Reward(NamedTuple):
    """A function of prompts, completions and columns, or of some of these, to a list of numbers."""

    name: str
    function: Callable[..., Any]
    weight: float
    needs: tuple[str, ...]  # the names that it must be given
    takes: tuple[str, ...] | None  # the names that it may be given; None: all

    def __call__(self, prompts: Prompts, place: Sequence[int], completions: list[str]) -> np.ndarray:
        """The rewards `[B]` of responses to the prompts at these places.

        Raises:
          UsageError: the function fails, or does not return as many finite numbers; one line names the row.
        """
        try:
            numbers = self._called(prompts, place, completions)
        except (Exception, SystemExit) as error:
            at = self._failing(prompts, place, completions)
            raise UsageError(f"reward {self.name} failed: {reason(error)}{at}") from error
        if not isinstance(numbers, list):
            raise UsageError(f"reward {self.name} must return a list of numbers, not {_short(repr(numbers))}")
        if len(numbers) != len(completions):
            some = f"{len(numbers)} numbers for {len(completions)} completions"
            raise UsageError(f"reward {self.name} returned {some}: return one number for each{_row(prompts, place, 0)}")
        for i, value in enumerate(numbers):
            if not _is_number(value):
                at = _row(prompts, place, i, completions)
                raise UsageError(f"reward {self.name} returned {_short(repr(value))}, which is no finite number{at}")
        return np.array([float(value) for value in numbers], np.float32)

    def _called(self, prompts: Prompts, place: Sequence[int], completions: list[str]) -> Any:
        text = prompts.text
        given = {name: [values[i] for i in place] for name, values in prompts.columns.items()}
        given |= {"prompts": [text[i] for i in place], "completions": list(completions)}
        found = self.function(**{name: x for name, x in given.items() if self.takes is None or name in self.takes})
        in_order = isinstance(found, Iterable) and not isinstance(found, str | Mapping | Set)
        return list(found) if in_order else found

    def _failing(self, prompts: Prompts, place: Sequence[int], completions: list[str]) -> str:
        """Names the first row with which the function fails by itself."""
        for i, (at, completion) in enumerate(zip(place, completions, strict=True)):
            try:
                self._called(prompts, [at], [completion])
            except (Exception, SystemExit):
                return _row(prompts, place, i, completions)
        return f"; no row of {prompts.file.name} makes it fail by itself"


class Learned(NamedTuple):
    """A reward model in a run's folder (`reward_model.LearnedReward`)."""

    folder: Path
    weight: float
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | None) and abs(float(value)) <= LARGEST
    except (TypeError, ValueError, OverflowError):
        return False


def _row(prompts: Prompts, place: Sequence[int], i: int, completions: Sequence[str] = ()) -> str:
    """Names the row that a completion answers, and the completion."""
    said = f", completion {_short(repr(completions[i]))}" if completions else ""
    return f"; {prompts.file.name}, row {prompts.line[place[i]]}{said}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def find_rewards(specs: Sequence[str], prompts: Sequence[Prompts]) -> list[Reward | Learned]:
    """The rewards that texts name: FILE.py:FUNCTION, the folder of a reward model's run, or a ready one, each perhaps
    with =WEIGHT.

    Args:
      prompts: the files whose columns each of them may take.
    Raises:
      UsageError: there is none, a text is none of these, the file cannot be loaded, two have one name, or a function
        takes what is no column.
    """
    if not specs:
        raise UsageError("reward () must name at least one, such as --reward my_rewards.py:correct, or exact")
    modules: dict[Path, ModuleType] = {}
    found = [_find(spec, modules) for spec in specs]
    names = [reward.name for reward in found]
    for reward in found:
        if names.count(reward.name) > 1:
            raise UsageError(f"reward names {reward.name} twice: each is logged under its name")
        for file in prompts:
            for name in reward.needs:
                if name not in ("prompts", "completions", *file.columns):
                    columns = ", ".join(file.columns) or "none"
                    raise UsageError(f"reward {reward.name} takes {name}, no column of {file.file.name} ({columns})")
    return found


def _find(spec: str, modules: dict[Path, ModuleType]) -> Reward | Learned:
    named, weight = _weighted(spec)
    if (Path(named) / CONFIG).is_file():
        return Learned(Path(named), weight)
    name, _, argument = named.partition(":")
    if named in READY:
        name, function = named, READY[named]
    elif name in OF_ARGUMENT and argument:
        function = OF_ARGUMENT[name](argument)
    elif ".py:" in named:
        file, _, name = named.rpartition(":")
        function = _loaded(Path(file), name, spec, modules)
    else:
        ready = ", ".join([*READY, *(f"{name}:..." for name in OF_ARGUMENT)])
        kinds = f"FILE.py:FUNCTION or a ready one ({ready}), or the folder of a reward model"
        raise UsageError(f"reward ({spec}) must be {kinds}, perhaps with =WEIGHT")
    return Reward(name, function, weight, *_parameters(name, function))


def _weighted(spec: str) -> tuple[str, float]:
    named, equals, weight = spec.rpartition("=")
    try:
        return (named, float(weight)) if equals and math.isfinite(float(weight)) else (spec, 1.0)
    except ValueError:  # an = of a regular expression
        return spec, 1.0


def _loaded(file: Path, name: str, spec: str, modules: dict[Path, ModuleType]) -> Callable[..., Any]:
    """The function of a file, which is executed unless it is among the modules.

    As in a script, it can import what lies beside it.
    """
    if not file.is_file():
        raise UsageError(f"reward ({spec}): there is no file {file}")
    if file not in modules:
        own = f"{__name__}.{file.stem}"  # a name of its own, under which dataclasses and pickle look for the module
        found = importlib.util.spec_from_file_location(own, file)
        assert found and found.loader
        modules[file] = sys.modules[own] = importlib.util.module_from_spec(found)
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        try:
            found.loader.exec_module(modules[file])
        except (Exception, SystemExit) as error:
            raise UsageError(f"reward ({spec}): {file} cannot be loaded: {reason(error)}") from error
    function = getattr(modules[file], name, None)
    if not callable(function):
        raise UsageError(f"reward ({spec}): {file} has no function {name}")
    return function


def _parameters(name: str, function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The names that a function must be given, and those that it may be given; None: any."""
    by_name = [x for x in inspect.signature(function).parameters.values() if x.kind is not x.VAR_KEYWORD]
    if any(x.kind in (x.POSITIONAL_ONLY, x.VAR_POSITIONAL) for x in by_name):
        raise UsageError(f"reward {name} must take prompts, completions and columns by their names")
    takes_any = len(by_name) < len(inspect.signature(function).parameters)
    needs = tuple(x.name for x in by_name if x.default is x.empty)
    return needs, None if takes_any else tuple(x.name for x in by_name)
