"""Runs of November 2026, before techniques had rooms of their own: the same recipes give the same numbers, and their checkpoints go on.

tests/old_runs was written by commit 5be5716, whose checkpoints number techniques and the optimizer's memory by position.
On the machine that wrote it the weights are the same to the bit; other processors round otherwise.
"""
import json
import shutil
from pathlib import Path

import pytest

from prx_nb.core.recipe import preset
from prx_nb.core.train import train

OLD = Path(__file__).with_name("old_runs")
RUNS = json.loads((OLD / "runs.json").read_text())


def same(run, old, first=0):
    "Curves from a step on, and the size of every tensor of the network."
    curves = run.curves.sort_values("step")
    for name, values in old["curves"].items():
        late = values[first:] if name.startswith("loss") else values
        assert curves[(curves.name == name) & (curves.step > first)].value.tolist() == pytest.approx(late, rel=1e-5), name
    norms = {name: tensor.double().norm().item() for name, tensor in run.model.state_dict().items()}
    assert norms == pytest.approx(old["norms"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_gives_what_it_gave(name, tmp_path):
    recipe = preset("smoke").replace(RUNS[name]["changes"])
    same(train(recipe, tmp_path, progress=False, device="cpu"), RUNS[name])


@pytest.mark.parametrize("name", RUNS)
def test_a_half_way_checkpoint_goes_on_and_ends_equal(name, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(OLD / f"{name}.safetensors", tmp_path / "checkpoint/step-0000004.safetensors")
    run = train(preset("smoke").replace(RUNS[name]["changes"]), tmp_path, progress=False, device="cpu")
    assert run.curves[run.curves.name == "loss flow"].step.min() == 5, "not from the start"
    same(run, RUNS[name], 4)
