"""Writes rows of experiments/results.md from saved runs: final evaluations, sampled and with the mode, and training. A
run that swept has a row for each setting.

A row with the same environment, algorithm and number of steps is updated, except for its published return to reach and
its command. Otherwise, the new row is added at the end.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from parts.compare import finished, number

from purepg.run.cli import leave, parse_flags
from purepg.run.console import reason
from purepg.run.pages import cells, read_block, write_block
from purepg.run.summary import short, with_interval
from purepg.run.sweep import label_of
from purepg.types import UsageError

MARKER = "results"
KEY, FOUND = slice(0, 3), slice(4, 7)  # columns that identify a row, and columns that a run fills


@dataclass(frozen=True)
class Config:
    """Which runs become rows, and in which page.

    Attributes:
      runs: folders of finished runs, before any flag.
      algorithm: name of the algorithm in the rows. None: the name of the run's script.
      page: Markdown page whose block <!-- results --> holds the table.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    algorithm: str | None = None
    page: Path = Path(__file__).parent / "results.md"


def rows_of(run: Path, algorithm: str | None) -> list[list[str]]:
    """The cells of a run's rows, one for each setting, which is named after the algorithm; the return to reach is left
    empty. Raises UsageError where the folder holds no finished run."""
    config, summary = finished(run)
    env = " ".join([config["run"]["env"], *config["run"].get("env_params", ())])
    rows = []
    for setting in summary["settings"]:
        label = label_of(setting["hyperparameters"])
        name = ", ".join(filter(None, [algorithm or config["script"], label]))
        sampled = with_interval(number(setting["iqm"]), [number(end) for end in setting["interval"]])
        others = (short(number(setting[name]["iqm"])) for name in ("mode", "training"))
        command = f"`python experiments/{config['script']}.py`"
        rows.append([env, name, steps(config["run"]["total_steps"]), "", sampled, *others, command])
    return rows


def steps(n: int) -> str:
    """Formats 25600 as 25.6k, and 1000000 as 1M."""
    return f"{n / 1e6:g}M" if n >= 1_000_000 else f"{n / 1e3:g}k"


def merged(block: str, rows: list[list[str]]) -> str:
    """Merges rows into a Markdown table: each replaces the row that it matches, or is added at the end."""
    lines = block.splitlines()
    place = {tuple(cells(line)[KEY]): i for i, line in enumerate(lines)}
    for new in rows:
        if (i := place.get(tuple(new[KEY]))) is None:
            place[tuple(new[KEY])] = len(lines)
            lines.append(join(new))
        else:
            kept = cells(lines[i])
            kept[FOUND] = new[FOUND]
            lines[i] = join(kept)
    return "\n".join(lines)


def join(row: list[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in row) + "|"


def main(arguments: list[str] | None = None) -> None:
    """Writes the rows into the page and prints them."""
    try:
        config: Any = parse_flags(Config, sys.argv[1:] if arguments is None else arguments, __doc__)
        if not config.runs:
            raise UsageError("no run was named: give the out folders whose rows the table should have")
        rows = [row for run in config.runs for row in rows_of(run, config.algorithm)]
        write_block(config.page, MARKER, merged(read_block(config.page, MARKER), rows))
    except UsageError as error:
        leave("results", error, 2)
    except OSError as error:
        leave("results", f"cannot write the page: {reason(error)}", 1)
    print("\n".join(map(join, rows)))


if __name__ == "__main__":
    main()
