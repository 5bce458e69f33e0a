"Every pair of techniques trains, resumes bit for bit from its checkpoint, samples and exports; or the recipe refuses it and says why."
import itertools
import shutil

import pytest
import torch
from runs import TECHNIQUES, weights

from prx_nb.core import autoencoder, interop, sample
from prx_nb.core.checkpoint import find_checkpoint
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.batch import prepare
from prx_nb.core.train import train

SMOKE = preset("smoke").replace({"train.steps": 4, "train.checkpoint_every": 2, "train.validate_every": 4, "train.validate_samples": 8,
                                 "optimizer.warmup": 1, "data.limit": 64, "sample.steps": 2})
ON = TECHNIQUES | {"repa_e": {"techniques.repa.weight": 0.5, "techniques.repa_e.weight": 1.5}}
LATENT = {"latents.channels": 4, "latents.factor": 4, "denoiser.in_channels": 4, "denoiser.patch_size": 1}   # where there is an autoencoder to train
REFUSED = {("tread", "sprint"): "both route tokens and only one can", ("perceptual", "repa_e"): "it compares images, and latents are none",
           ("p_dino", "repa_e"): "it compares images, and latents are none",
           ("repa", "augment_label"): "with data.augment", ("irepa", "augment_label"): "with data.augment",
           ("augment_label", "repa_e"): "data.augment"}
SAME = {("repa", "irepa"), ("repa", "repa_e")}         # one is the other, and more
PAIRS = [pair for pair in itertools.combinations(ON, 2) if pair not in SAME]


@pytest.fixture(scope="module")
def latent():
    "The same in the latents of an autoencoder that has hardly learnt, and its data."
    pytest.importorskip("diffusers")
    made = autoencoder.made(autoencoder.Settings(data=SMOKE.data, blocks=(8, 16, 16), channels=4, steps=30), progress=False)
    recipe = SMOKE.replace(LATENT | {"latents.autoencoder": str(made)})
    return recipe, prepare(recipe, progress=False)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair(pair, prepared, tmp_path, request):
    recipe = SMOKE
    if "repa_e" in pair:
        recipe, prepared = request.getfixturevalue("latent")
    changes = ON[pair[0]] | ON[pair[1]]
    if pair in REFUSED:
        with pytest.raises(RecipeError, match=REFUSED[pair]):
            recipe.replace(changes)
        return
    recipe = recipe.replace(changes)
    whole = train(recipe, tmp_path / "whole", prepared=prepared, progress=False)
    losses = {name for name in whole.curves.name if name.startswith("loss ")}
    adds = {"repa": ["REPA"], "irepa": ["REPA"], "repa_e": ["REPA", "REPAE"], "contrastive": ["Contrastive"], "perceptual": ["Perceptual"],
            "p_dino": ["PDINO"]}
    assert losses == {f"loss {name}" for name in ("flow", *adds.get(pair[0], []), *adds.get(pair[1], []))}, "each adds its own"

    shutil.copytree(whole.dir, tmp_path / "half")
    (tmp_path / "half/checkpoint/step-0000004.safetensors").unlink()
    halfway = find_checkpoint(tmp_path / "half/checkpoint", recipe)[0]
    resumed = train(recipe, tmp_path / "half", prepared=prepared, progress=False)
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys() and [k for k in first if not first[k].equal(second[k])] == []
    assert any(not first[k].equal(halfway[k]) for k in first if k.startswith("model.")), "it did go on"

    words, mask = prepared.states.lookup(prepared.asked[:2])
    images = sample.draw(whole.model, recipe, words, mask, *prepared.states.null(1))
    assert images.shape == (2, recipe.denoiser.in_channels, *(16 // recipe.latents.factor,) * 2) and images.isfinite().all()
    assert torch.equal(images, sample.draw(resumed.model, recipe, words, mask, *prepared.states.null(1)))

    unknown = "fusion" if "sprint" in pair else "flow.prediction = 'x' in the latents" if set(pair) == {"x", "repa_e"} else None
    if unknown:
        with pytest.raises(interop.InteropError, match=unknown):
            interop.to_diffusers(whole, tmp_path / "export")
        assert not (tmp_path / "export").exists()
    else:
        interop.to_diffusers(whole, tmp_path / "export")
        parts, mine = interop.from_diffusers(tmp_path / "export"), whole.model.state_dict()
        assert [k for k, v in parts.model.state_dict().items() if not v.equal(mine[k])] == [] and len(mine) == len(parts.model.state_dict())
