"""Bytes and floating point, once each; grids."""
import numpy as np
import pytest
import torch
from PIL import Image

from prx_nb.core.show import from_uint8, picture, show_images, tile, to_uint8


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
