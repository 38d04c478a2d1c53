"""The command line of an experiment that computes one thing: the laboratory's scripts."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from purepg.config import check
from purepg.run.cli import leave, parse_flags
from purepg.run.record import new_folder, plain, reason
from purepg.types import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = REPORT, NUMBERS, FIGURE = "report.txt", "numbers.json", "figure.png"


class Study(NamedTuple):
    """What an experiment found."""

    report: str
    numbers: Mapping[str, Any]  # what JSON can hold, arrays too
    figure: "Figure | None" = None


def main(
    study: Callable[[Any], Study], config: Any, description: str | None = None, arguments: Sequence[str] | None = None
) -> None:
    """Runs `study(config)`, a flag for each field of the config, writes what it found into a folder and prints the
    report. Exits: 0 done, 2 a bad argument, 1 a failed write, 130 Ctrl-C.

    Args:
      config: a frozen dataclass with the defaults.
      arguments: taken instead of the command line's.
    """
    import tyro

    script = Path(sys.argv[0]).stem
    out_help = f"Folder of {', '.join(FILES)}. None: a new one under runs/."
    commands = make_dataclass(
        "Commands",
        [
            ("config", Annotated[type(config), tyro.conf.arg(name="")], field(default=config)),
            ("out", Annotated[Path | None, tyro.conf.arg(help=out_help)], field(default=None)),
        ],
        frozen=True,
    )
    made = None
    try:
        chosen = parse_flags(commands, sys.argv[1:] if arguments is None else arguments, description)
        config = check(chosen.config)
        out = _folder(chosen.out, script)
        made = out if chosen.out is None else None
        found = study(config)
    except UsageError as error:
        _remove_empty(made)
        leave(script, error, 2)
    except KeyboardInterrupt:
        _remove_empty(made)
        leave(script, "interrupted; nothing was written", 130)
    try:
        (out / REPORT).write_text(found.report + "\n")
        (out / NUMBERS).write_text(json.dumps(plain(found.numbers), indent=1) + "\n")
        if found.figure is not None:
            found.figure.savefig(out / FIGURE)
    except OSError as error:
        print(found.report)
        leave(script, f"cannot write into {out}: {reason(error)}", 1)
    print(f"{found.report}\nwrote {out}")


def _folder(out: Path | None, script: str) -> Path:
    """The folder, made before anything is computed; what it holds is not overwritten."""
    if out is None:
        return new_folder(script)
    if any((out / name).exists() for name in FILES):
        raise UsageError(f"{out} holds results already; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {out}: {reason(error)}; choose another --out") from error
    return out


def _remove_empty(folder: Path | None) -> None:
    """A new folder in which nothing was written."""
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.rmdir()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])
