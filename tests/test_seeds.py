"""Named streams: the same everywhere, independent of each other."""
import subprocess
import sys

import pytest
import torch

from prx_nb.core.seeds import order, stream


def test_a_stream_is_the_same_in_another_process():
    code = "import torch; from prx_nb.core.seeds import stream; print(torch.randint(0, 10**9, (3,), generator=stream(7, 'noise', 12)).tolist())"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "5", "PATH": ""}).stdout
    assert theirs.strip() == str(torch.randint(0, 10**9, (3,), generator=stream(7, "noise", 12)).tolist())


def test_streams_are_uncorrelated():
    draws = torch.stack([torch.randn(2000, generator=stream(0, "noise", s)) for s in range(40)])
    r = torch.corrcoef(draws) - torch.eye(40)
    assert r.abs().max() < 5 / 2000**0.5


def test_names_are_not_glued_together():
    draw = lambda *n: torch.rand(1, generator=stream(*n)).item()
    assert len({draw(1, "a", 23), draw(1, "a2", 3), draw(12, "a", 3), draw(1, "a|2", 3), draw(1, "a", "23")}) == 5


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    stream(0, "x"), order(0, 3, 5, 7)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("batch,count", [(3, 10), (10, 10), (7, 5), (64, 100), (1, 1)])
def test_every_epoch_holds_every_image_once(batch, count):
    seen = torch.cat([order(2, s, batch, count) for s in range(4 * count)])
    if count > 3:
        assert len({tuple(seen[e * count:(e + 1) * count].tolist()) for e in range(4)}) > 1, "each epoch has its own shuffle"
    for e in range(4):
        assert seen[e * count:(e + 1) * count].sort().values.equal(torch.arange(count))
