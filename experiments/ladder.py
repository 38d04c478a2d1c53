"""Counts by how many lines the files of neighbouring algorithms differ.

Only code counts: no imports, docstrings, comments, empty lines or config classes. difflib aligns the two files. Each
block that differs counts as many lines as its longer side has, so that a changed line counts once.
"""

import ast
import io
import tokenize
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import purepg.algorithms
from purepg.run.pages import table
from purepg.run.study import Study, main

PAIRS = {
    ("reinforce", "a2c"): "rollouts for whole episodes",
    ("q_actor_critic", "a2c"): "an advantage from V for a learned Q",
    ("a2c", "off_policy_pg"): "an importance ratio; several steps",
    ("a2c", "npg"): "the natural gradient; a critic fitted separately",
    ("npg", "trpo"): "a line search",
    ("trpo", "ppo"): "a clipped ratio for the trust region",
    ("a2c", "ppo"): "a clipped ratio; epochs of minibatches",
    ("ppo", "ppo_penalty"): "a KL penalty for the clip",
    ("ppo", "grpo"): "groups of episodes for rollouts; a reference policy",
    ("q_actor_critic", "dpg"): "the gradient through Q",
    ("dpg", "ddpg"): "replay and targets",
    ("ddpg", "td3"): "the least of two critics; noise; delays",
    ("td3", "sac"): "a stochastic policy; entropy",
    ("sac", "sac_discrete"): "sums over actions for samples",
    ("clone", "dpo"): "pairs for demonstrations",
}


@dataclass(frozen=True)
class Config:
    """This experiment has no settings."""


class Row(NamedTuple):
    """Two neighbours, and the lines in which they differ."""

    first: str
    second: str
    changes: str
    lines: tuple[int, int]
    only_in: tuple[int, int]
    differ: int


def code_lines(text: str) -> list[str]:
    """The lines of a module that the comparison counts."""
    ignored: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            ignored |= _lines(node)
        elif isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            ignored |= _lines(node).union(*map(_lines, node.decorator_list))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            ignored |= _lines(node.body[0])
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return [line for number, line in enumerate(lines, 1) if line.strip() and number not in ignored]


def _lines(node: ast.stmt | ast.expr) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def compare(first: list[str], second: list[str]) -> tuple[tuple[int, int], int]:
    """Returns ((lines only in the first, lines only in the second), lines that differ)."""
    changed = [op for op in SequenceMatcher(None, first, second, autojunk=False).get_opcodes() if op[0] != "equal"]
    sizes = [(i2 - i1, j2 - j1) for _, i1, i2, j1, j2 in changed]
    return (sum(a for a, _ in sizes), sum(b for _, b in sizes)), sum(map(max, sizes))


def study(config: Config) -> Study:
    """Compares the files of the installed package."""
    del config
    rows = []
    for (first, second), changes in PAIRS.items():
        texts = [(Path(purepg.algorithms.__path__[0]) / f"{name}.py").read_text() for name in (first, second)]
        a, b = map(code_lines, texts)
        rows.append(Row(first, second, changes, (len(a), len(b)), *compare(a, b)))
    header = (
        "from",
        "to",
        "what changes",
        "lines of each",
        "only in the first",
        "only in the second",
        "lines that differ",
    )
    cells = [
        [f"`{r.first}`", f"`{r.second}`", r.changes, "{}, {}".format(*r.lines), *map(str, r.only_in), str(r.differ)]
        for r in rows
    ]
    return Study(table(header, cells), {"rows": [row._asdict() for row in rows]}, table=table(header, cells))


if __name__ == "__main__":
    main(study, Config(), __doc__)
