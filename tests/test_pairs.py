"Every pair of techniques trains, resumes bit for bit from its checkpoint, samples and exports; or the recipe refuses it and says why."
import itertools
import shutil

import pytest
import torch

from prx_nb.core import interop, sample
from prx_nb.core.checkpoint import find_checkpoint
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.train import prepare, train

SMOKE = preset("smoke").replace({"train.steps": 4, "train.checkpoint_every": 2, "train.validate_every": 4, "train.validate_samples": 8,
                                 "optimizer.warmup": 1, "data.limit": 64, "sample.steps": 2})
ON = {
    "repa": {"techniques.repa.weight": 0.5},
    "irepa": {"techniques.repa.weight": 0.5, "techniques.repa.projector": "conv", "techniques.repa.spatial_norm": "scalar"},
    "contrastive": {"techniques.contrastive.weight": 0.05},
    "x": {"flow.prediction": "x", "denoiser.bottleneck_size": 16},
    "tread": {"techniques.tread.rate": 0.5},
    "sprint": {"techniques.sprint.rate": 0.75, "denoiser.fusion": [1, None]},
    "perceptual": {"techniques.perceptual.weight": 0.1, "techniques.perceptual.size": 32},
    "muon": {"optimizer.name": "muon"},
    "bf16": {"train.weights": "bf16"},
    "average": {"ema.decay": None, "ema.half_life": 3.0, "ema.also": [1.0, 8.0]},
}
REFUSED = {("tread", "sprint"): "both route tokens and only one can"}
SAME = {("repa", "irepa")}                     # the same technique twice
PAIRS = [pair for pair in itertools.combinations(ON, 2) if pair not in SAME]


@pytest.fixture(scope="module")
def prepared():
    return prepare(SMOKE, progress=False)


def state(run):
    return find_checkpoint(run.dir / "checkpoint", run.recipe)[0]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair(pair, prepared, tmp_path):
    changes = ON[pair[0]] | ON[pair[1]]
    if pair in REFUSED:
        with pytest.raises(RecipeError, match=REFUSED[pair]):
            SMOKE.replace(changes)
        return
    recipe = SMOKE.replace(changes)
    whole = train(recipe, tmp_path / "whole", prepared=prepared, progress=False)
    losses = {name for name in whole.curves.name if name.startswith("loss ")}
    assert len(losses) == 1 + len({"repa", "irepa", "contrastive", "perceptual"} & set(pair)), "each adds its own"

    shutil.copytree(whole.dir, tmp_path / "half")
    (tmp_path / "half/checkpoint/step-0000004.safetensors").unlink()
    halfway = find_checkpoint(tmp_path / "half/checkpoint", recipe)[0]
    resumed = train(recipe, tmp_path / "half", prepared=prepared, progress=False)
    first, second = state(whole), state(resumed)
    assert first.keys() == second.keys() and [k for k in first if not first[k].equal(second[k])] == []
    assert any(not first[k].equal(halfway[k]) for k in first if k.startswith("model.")), "it did go on"

    words, mask = prepared.states.lookup(prepared.asked[:2])
    images = sample.draw(whole.model, recipe, words, mask, *prepared.states.null(1))
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    assert torch.equal(images, sample.draw(resumed.model, recipe, words, mask, *prepared.states.null(1)))

    if "sprint" in pair:
        with pytest.raises(interop.InteropError, match="fusion"):
            interop.to_diffusers(whole, tmp_path / "export")
        assert not (tmp_path / "export").exists()
    else:
        interop.to_diffusers(whole, tmp_path / "export")
        parts, mine = interop.from_diffusers(tmp_path / "export"), whole.model.state_dict()
        assert [k for k, v in parts.model.state_dict().items() if not v.equal(mine[k])] == [] and len(mine) == len(parts.model.state_dict())
