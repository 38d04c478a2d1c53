"""The notebook: it runs from its first cell to its last, draws, and learns."""

import base64
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pytest

from purepg.runtime import users_environment

NOTEBOOK = Path(__file__).parent.parent / "experiments" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook's code cells, executed in an empty folder with two agents a setting, and what it then holds."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert sum(cell.source.count("num_seeds=8") for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace("num_seeds=8", "num_seeds=2")
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute(env=users_environment())
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    return [cell for cell in notebook.cells if cell.cell_type == "code"], names


def results(cell: Any) -> list[Any]:
    return [output.data for output in cell.outputs if output.output_type == "execute_result"]


def final_return(table: str) -> float:
    return float(re.findall(r"\| default +\| +([\d.]+) \[", table)[0])


def test_it_trains_and_leaves_no_run_behind(ran):
    cells, names = ran
    assert names == {"my_ppo.py"}
    assert final_return(results(cells[0])[0]["text/plain"]) > 200
    progress = "".join(output.text for output in cells[0].outputs if output.output_type == "stream")
    assert "25.6k/25.6k" in progress and "return=" in progress


def test_its_three_pictures_are_drawn(ran):
    cells, _ = ran
    pictures = [data["image/png"] for cell in cells for data in results(cell) if "image/png" in data]
    assert len(pictures) == len(set(pictures)) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_the_smallest_learning_rate_learns_least(ran):
    cells, _ = ran
    (series,) = (data["text/plain"] for cell in cells for data in results(cell) if "Name: final_return" in str(data))
    found = [float(line.split()[1]) for line in series.splitlines() if re.match(r"0\.0", line)]
    assert len(found) == 3 and int(np.argmin(found)) == 0


def test_the_committed_outputs_are_those_of_its_cells(ran):
    cells, _ = ran
    committed = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    kinds = [[sorted(data) for data in results(cell)] for cell in committed]
    assert kinds == [[sorted(data) for data in results(cell)] for cell in cells]
