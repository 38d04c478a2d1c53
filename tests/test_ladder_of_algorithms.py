"""experiments/ladder.py: the lines that it counts, and the table that it has written."""

import importlib.util
import sys
from pathlib import Path

import pytest

from purepg.run.study import read_block

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
MODULE = '''"""A docstring
of two lines."""

from dataclasses import dataclass
import jax  # an import

# a comment
@dataclass(frozen=True)
class ToyConfig:
    """Settings."""

    rate: float = 0.1


def toy(x):
    """One line."""

    y = x + 1  # counted without this comment
    name = "# no comment"
    return (
        y
    )
'''


@pytest.fixture(scope="module")
def ladder():
    spec = importlib.util.spec_from_file_location("ladder", EXPERIMENTS / "ladder.py")
    assert spec and spec.loader
    module = sys.modules["ladder"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_docstrings_comments_empty_lines_and_the_config_do_not_count(ladder):
    expected = ["def toy(x):", "    y = x + 1", '    name = "# no comment"', "    return (", "        y", "    )"]
    assert ladder.code_lines(MODULE) == expected


def test_a_changed_line_counts_once_and_a_stretch_as_many_as_its_longer_side(ladder):
    assert ladder.compare(list("abcd"), list("abcd")) == ((0, 0), 0)
    assert ladder.compare(list("abcd"), list("axcd")) == ((1, 1), 1)
    assert ladder.compare(list("abcd"), list("axyzd")) == ((2, 3), 3)
    assert ladder.compare(list("abcd"), list("bcde")) == ((1, 1), 2)


def test_the_page_has_the_table_of_the_files_as_they_are(ladder):
    """If not: python experiments/ladder.py --page experiments/results.md."""
    assert read_block(EXPERIMENTS / "results.md", "ladder") == ladder.study(ladder.Config()).table


@pytest.mark.parametrize(
    "pair",
    [("a2c", "ppo"), ("ppo", "ppo_penalty"), ("npg", "trpo"), ("ddpg", "td3"), ("td3", "sac"), ("sac", "sac_discrete")],
)
def test_where_the_mathematics_allows_neighbours_differ_in_thirty_lines_at_most(ladder, pair):
    rows = {(row["first"], row["second"]): row for row in ladder.study(ladder.Config()).numbers["rows"]}
    assert rows[pair]["differ"] <= 30
