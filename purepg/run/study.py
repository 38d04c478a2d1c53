"""The command line of an experiment that computes one thing: the laboratory's scripts."""

import contextlib
import json
import re
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
END = "<!-- end -->"


class Study(NamedTuple):
    """What an experiment found."""

    report: str
    numbers: Mapping[str, Any]  # what JSON can hold, arrays too
    figure: "Figure | None" = None
    table: str | None = None  # Markdown, for the page that --page names


def main(
    study: Callable[[Any], Study], config: Any, description: str | None = None, arguments: Sequence[str] | None = None
) -> None:
    """Runs `study(config)`, a flag for each field of the config, writes what it found into a folder and prints the
    report. With `--page`, its table also replaces the block of a Markdown page that is marked with the script's name.
    Exits: 0 done, 2 a bad argument, 1 a failed write, 130 Ctrl-C.

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
            ("page", Annotated[Path | None, tyro.conf.arg(help=page_help(script))], field(default=None)),
        ],
        frozen=True,
    )
    made = None
    try:
        chosen = parse_flags(commands, sys.argv[1:] if arguments is None else arguments, description)
        config = check(chosen.config)
        if chosen.page is not None:
            read_block(chosen.page, script)  # a missing page or marker is said before anything is computed
        out = _folder(chosen.out, script)
        made = out if chosen.out is None else None
        found = study(config)
    except UsageError as error:
        _remove_empty(made)
        leave(script, error, 2)
    except KeyboardInterrupt:
        _remove_empty(made)
        leave(script, "interrupted; nothing was written", 130)
    written = [out]
    try:
        (out / REPORT).write_text(found.report + "\n")
        (out / NUMBERS).write_text(json.dumps(plain(found.numbers), indent=1) + "\n")
        if found.figure is not None:
            found.figure.savefig(out / FIGURE)
    except OSError as error:
        print(found.report)
        leave(script, f"cannot write into {out}: {reason(error)}", 1)
    if chosen.page is not None:
        try:
            if found.table is None:
                raise UsageError(f"{script} makes no table for a page; leave --page out")
            write_block(chosen.page, script, found.table)
        except (UsageError, OSError) as error:
            print(f"{found.report}\nwrote {out}")
            why = error if isinstance(error, UsageError) else f"cannot write {chosen.page}: {reason(error)}"
            leave(script, why, 1)
        written.append(chosen.page)
    print(f"{found.report}\nwrote {' and '.join(map(str, written))}")


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
    # A rule of a right-aligned column is "-:" at the least; ":" alone makes no table.
    widths = [max(2, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])


# --- the pages that hold the tables ---


def page_help(marker: str) -> str:
    """What `--help` says of `--page`."""
    return f"A Markdown page whose block from <!-- {marker} --> to {END} becomes this run's table. None: no page."


def read_block(page: Path, marker: str) -> str:
    """What stands in a page between the line `<!-- marker -->` and the next `<!-- end -->`.

    Raises:
      UsageError: the page cannot be read, or it does not have exactly one such block.
    """
    return _split(page, marker)[1].strip("\n")


def write_block(page: Path, marker: str, text: str) -> None:
    """Replaces what stands between the line `<!-- marker -->` and the next `<!-- end -->` of a page.

    Raises:
      UsageError: the page cannot be read, or it does not have exactly one such block.
      OSError: it cannot be written.
    """
    before, _, after = _split(page, marker)
    page.write_text(f"{before}\n{text}\n\n{after}", encoding="utf-8")


def _split(page: Path, marker: str) -> tuple[str, str, str]:
    """A page in three: up to the marker's line, the block, and from the block's end."""
    start = f"<!-- {marker} -->"
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the page {page}: {reason(error)}; name a Markdown page with {start}") from error
    found = list(re.finditer(rf"^{re.escape(start)}\n(.*?)^{re.escape(END)}$", text, re.MULTILINE | re.DOTALL))
    if len(found) != 1 or "<!--" in found[0][1]:
        raise UsageError(f"{page} must have one block that begins with the line {start} and ends with the line {END}")
    return text[: found[0].start(1)], found[0][1], text[found[0].end(1) :]
