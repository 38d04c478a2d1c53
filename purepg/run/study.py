"""The command line of experiments that return a report, such as the laboratory's scripts."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from purepg.config import check
from purepg.run.cli import leave, parse_flags
from purepg.run.console import reason
from purepg.run.folder.files import folder_for, plain
from purepg.run.pages import page_help, read_block, write_block
from purepg.types import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = REPORT, NUMBERS, FIGURE = "report.txt", "numbers.json", "figure.png"


class Study(NamedTuple):
    """The results of an experiment."""

    report: str
    numbers: Mapping[str, Any]  # JSON values and arrays
    figure: "Figure | None" = None
    table: str | None = None  # Markdown, for the page given by --page


def main(
    study: Callable[[Any], Study], config: Any, description: str | None = None, arguments: Sequence[str] | None = None
) -> None:
    """Runs `study(config)` from the command line, writes its results into a folder and prints the report. With --page,
    its table also replaces the block of a Markdown page that is marked with the script's name. The exit code is 0 on
    success, 1 after a failed write, 2 for a bad argument and 130 after Ctrl-C.

    Args:
      config: a frozen dataclass of defaults; each field becomes a flag.
      arguments: parsed instead of `sys.argv`.
    """
    import tyro

    script = Path(sys.argv[0]).stem
    out_help = f"Folder for {', '.join(FILES)}. None: a new one under runs/."
    commands = make_dataclass(
        "Commands",
        [
            ("config", Annotated[type(config), tyro.conf.arg(name="")], field(default=config)),
            ("out", Annotated[Path | None, tyro.conf.arg(help=out_help)], field(default=None)),
            ("page", Annotated[Path | None, tyro.conf.arg(help=page_help(script))], field(default=None)),
        ],
        frozen=True,
    )
    try:
        chosen = parse_flags(commands, sys.argv[1:] if arguments is None else arguments, description)
        config = check(chosen.config)
        if chosen.page is not None:
            read_block(chosen.page, script)  # a missing page or marker is reported before anything is computed
        if chosen.out is not None:
            _claim(chosen.out)
        with folder_for(chosen.out, script) as out:
            found = study(config)
    except UsageError as error:
        leave(script, error, 2)
    except KeyboardInterrupt:
        leave(script, "interrupted; nothing was written", 130)
    failure = _write(found, out)
    if failure:
        print(found.report)
        leave(script, failure, 1)
    if chosen.page is None:
        print(f"{found.report}\nwrote {out}")
        return
    try:
        if found.table is None:
            raise UsageError(f"{script} makes no table for a page; leave --page out")
        write_block(chosen.page, script, found.table)
    except (UsageError, OSError) as error:
        print(f"{found.report}\nwrote {out}")
        leave(script, error if isinstance(error, UsageError) else f"cannot write {chosen.page}: {reason(error)}", 1)
    print(f"{found.report}\nwrote {out} and {chosen.page}")


def _claim(out: Path) -> None:
    """Makes the folder given by --out before anything is computed; refuses one that already holds results."""
    if any((out / name).exists() for name in FILES):
        raise UsageError(f"{out} holds results already; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {out}: {reason(error)}; choose another --out") from error


def _write(found: Study, out: Path) -> str | None:
    """Writes the results of a study; returns an error message if a file could not be written."""
    try:
        (out / REPORT).write_text(found.report + "\n")
        (out / NUMBERS).write_text(json.dumps(plain(found.numbers), indent=1) + "\n")
        if found.figure is not None:
            found.figure.savefig(out / FIGURE)
    except OSError as error:
        return f"cannot write into {out}: {reason(error)}"
    return None
