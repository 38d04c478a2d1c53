"""Aligned Markdown tables, and the marked blocks of pages that scripts rewrite."""

import re
from collections.abc import Sequence
from pathlib import Path

from purepg.run.console import reason
from purepg.types import UsageError

END = "<!-- end -->"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column is left-aligned, the others right-aligned."""
    # A right-aligned column's rule needs at least "-:"; ":" alone is not a table.
    widths = [max(2, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def page_help(marker: str) -> str:
    """The help text of `--page`."""
    return f"Markdown page; this run's table replaces its block from <!-- {marker} --> to {END}. None: no page."


def read_block(page: Path, marker: str) -> str:
    """Reads the block of a page between the line `<!-- marker -->` and the next `<!-- end -->`.

    Raises:
      UsageError: the page cannot be read, or it does not have exactly one such block.
    """
    return _split(page, marker)[1].strip("\n")


def write_block(page: Path, marker: str, text: str) -> None:
    """Replaces the block of a page between the line `<!-- marker -->` and the next `<!-- end -->`.

    Raises:
      UsageError: the page cannot be read, or it does not have exactly one such block.
      OSError: it cannot be written.
    """
    before, _, after = _split(page, marker)
    page.write_text(f"{before}\n{text}\n\n{after}", encoding="utf-8")


def _split(page: Path, marker: str) -> tuple[str, str, str]:
    """Splits a page into the text up to the marker's line, the block, and the rest from the end line on."""
    start = f"<!-- {marker} -->"
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the page {page}: {reason(error)}; name a Markdown page with {start}") from error
    found = list(re.finditer(rf"^{re.escape(start)}\n(.*?)^{re.escape(END)}$", text, re.MULTILINE | re.DOTALL))
    if len(found) != 1 or "<!--" in found[0][1]:
        raise UsageError(f"{page} must have one block that begins with the line {start} and ends with the line {END}")
    return text[: found[0].start(1)], found[0][1], text[found[0].end(1) :]
