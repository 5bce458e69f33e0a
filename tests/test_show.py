"""Bytes and floating point, once each; grids."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from prx_nb.core.show import from_uint8, picture, show_images, tile, to_uint8

ROOT = Path(__file__).parents[1]


def test_every_byte_survives_and_twice_is_refused():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(from_uint8(every)).equal(every)
    with pytest.raises(TypeError, match="converted already"):
        to_uint8(every)
    with pytest.raises(TypeError, match="converted already"):
        from_uint8(from_uint8(every))


def test_range_is_clipped_and_rounded():
    values = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_torchmetrics_style_wrap_around_is_what_we_avoid():
    "Multiplying bytes by 255 in eight bits gives nearly the negative."
    bytes_ = to_uint8(torch.linspace(-1, 1, 256))
    wrapped = (bytes_ * 255).to(torch.uint8)
    assert np.corrcoef(bytes_[1:], wrapped[1:])[0, 1] < -0.99


def test_tiles_lie_row_by_row():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 4, 5)
    sheet = tile(images, columns=4, gap=2)
    assert sheet.shape == (10, 26, 3)
    assert sheet[0, 0, 0] == 0 and sheet[6, 7, 0] == 255 and sheet[0, 5, 0] == 255 and sheet[0, 21, 0] == to_uint8(images)[3, 0, 0, 0]
    enlarged = picture(images, columns=4, zoom=3)
    assert isinstance(enlarged, Image.Image) and enlarged.size == (78, 30)


def test_figures_have_a_title_an_image():
    fig = show_images(torch.zeros(5, 3, 8, 8), [f"caption {i}" for i in range(5)], columns=3)
    assert [a.get_title() for a in fig.axes][:5] == [f"caption {i}" for i in range(5)] and len(fig.axes) == 6


CONTROLS = """
%matplotlib inline
import matplotlib.pyplot as plt
from prx_nb.core.show import interact
def figure(slope=1):
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.plot([0, slope])
    return fig
"""


CALLS = ["interact(figure, slope=(0, 2));", "interact(lambda slope=1: figure(slope).axes, slope=(0, 2));",
         "interact(lambda slope=1: (figure(slope), None)[1], slope=(0, 2));",
         "moved = interact(figure, slope=(0, 2)); moved.widget.children[0].value = 2",
         "import ipywidgets; ipywidgets.interact(figure, slope=(0, 2));"]


@pytest.mark.slow
def test_a_control_shows_its_picture_once_in_a_real_kernel():
    nb = new_notebook(cells=[new_code_cell(source) for source in (CONTROLS, *CALLS)])
    NotebookClient(nb, timeout=40, kernel_name="python3").execute()        # ipykernel at times leaves its last question unanswered: waited for in vain
    state = nb.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    kinds = lambda outputs: ["picture" if "image/png" in o.get("data", {}) else "text" for o in outputs
                             if not any("widget" in kind for kind in o.get("data", {}))]
    areas = [kinds(w["state"]["outputs"]) for w in state if w["model_name"] == "OutputModel"]
    shown = [area + kinds(cell.outputs) for area, cell in zip(areas, nb.cells[1:], strict=True)]
    assert shown[:4] == [["picture"]] * 4
    assert shown[4] == ["picture"] * 2, "ipywidgets alone; where this has changed, ours is no longer needed"


def test_every_control_is_the_one_that_shows_a_picture_once():
    found = []
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"^(from ipywidgets import .*\binteract\b|.*widgets\.interact\()", source, re.M):
                found.append((path.name, cell["id"]))
    assert [name for name, _ in found] == ["04_show.ipynb"], "from prx_nb.core.show import interact"
