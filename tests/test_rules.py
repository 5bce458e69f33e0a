"Rules between settings: what cannot go together is one line that names the settings and what to set; what can, goes."
import re

import pytest

from prx_nb.core.recipe import Recipe, RecipeError, fields, parse, preset

T = "techniques."
LATENTS = {"latents.autoencoder": "some/autoencoder", "latents.channels": 4, "latents.factor": 2, "denoiser.in_channels": 4, "denoiser.patch_size": 2}
TREAD, FUSION, SPRINT = {T + "tread.rate": 0.5}, {"denoiser.fusion": [1, 2]}, {T + "sprint.rate": 0.75, "denoiser.fusion": [1, 2]}
REPA, PERCEPTUAL, MUON = {T + "repa.weight": 0.5}, {T + "perceptual.weight": 0.1}, {"optimizer.name": "muon"}
REPA_E = REPA | LATENTS | {T + "repa_e.weight": 1.0}
FSDP = {"train.parallel": "fsdp2", "train.processes": 2}

# what is asked for, what the error must say, what undoes it
REFUSED = {
    "tread and sprint": (TREAD | SPRINT, ["techniques.tread.rate = 0.5", "techniques.sprint.rate = 0.75", "only one can"], {T + "tread.rate": 0}),
    "tread and fusion": (TREAD | FUSION, ["techniques.tread.rate = 0.5", "denoiser.fusion = (1, 2)", "null"], {"denoiser.fusion": None}),
    "sprint without fusion": (SPRINT | {"denoiser.fusion": None}, ["techniques.sprint.rate = 0.75", "denoiser.fusion", "[1, 2]"], FUSION),
    "guide without routes": ({"sample.guide": "route"}, ["sample.guide = 'route'", "techniques.sprint.rate or techniques.tread.rate"], TREAD),
    "perceptual in latents": (PERCEPTUAL | LATENTS, ["techniques.perceptual.weight = 0.1", "latents.autoencoder = 'some/autoencoder'", "'pixels'"],
                              {T + "perceptual.weight": 0}),
    "repa_e in pixels": (REPA | {T + "repa_e.weight": 1.0}, ["techniques.repa_e.weight = 1.0", "latents.autoencoder = 'pixels' has none"], LATENTS),
    "repa_e without repa": (REPA_E | {T + "repa.weight": 0}, ["techniques.repa_e.weight = 1.0", "needs techniques.repa.weight above 0"], REPA),
    "repa_e in two processes": (REPA_E | {"train.processes": 2}, ["techniques.repa_e.weight = 1.0", "train.processes = 2", "one process"],
                                {"train.processes": 1}),
    "repa with fsdp2": (REPA | FSDP, ["techniques.repa.weight = 0.5", "train.parallel = 'fsdp2'", "'ddp'"], {"train.parallel": "ddp"}),
    "muon with fsdp2": (MUON | FSDP, ["optimizer.name = 'muon'", "train.parallel = 'fsdp2'", "whole matrices", "'ddp'"], {"train.parallel": "ddp"}),
    "tread beyond the last block": (TREAD | {T + "tread.first": 4}, ["techniques.tread", "first = 4", "0 to 3"], {T + "tread.first": 1}),
    "tread ends beyond the last block": (TREAD | {T + "tread.last": 4}, ["techniques.tread", "last = 4", "0 to 3"], {T + "tread.last": 3}),
    "tread backwards": (TREAD | {T + "tread.first": 2, T + "tread.last": 1}, ["techniques.tread", "first = 2, last = 1", "in order"],
                        {T + "tread.last": 2}),
    "repa beyond the last block": (REPA | {T + "repa.layer": 4}, ["techniques.repa.layer = 4", "0 to 3"], {T + "repa.layer": 3}),
    "fusion beyond the last block": ({"denoiser.fusion": [1, 4]}, ["denoiser.fusion", "to 3"], {"denoiser.fusion": [1, 3]}),
    "fusion from the first block": ({"denoiser.fusion": [0, 2]}, ["denoiser.fusion", "1"], FUSION),
    "stop before start": (REPA | {T + "repa.start": 5, T + "repa.stop": 3}, ["techniques", "stop = 3 does not come after start = 5"],
                          {T + "repa.stop": 6}),
    "stop at start": (PERCEPTUAL | {T + "perceptual.start": 5, T + "perceptual.stop": 5}, ["techniques", "stop = 5", "start = 5"],
                      {T + "perceptual.stop": None}),
    "guidance without empty captions": ({"captions.dropout": 0}, ["sample.guidance = 3.0", "captions.dropout = 0", "set sample.guidance to 1"],
                                        {"sample.guidance": 1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line_that_says_what_to_set(name):
    changes, says, remedy = REFUSED[name]
    with pytest.raises(RecipeError) as error:
        preset("cpu").replace(changes)
    text = str(error.value)
    assert all(word in text for word in says), text
    assert len(text.splitlines()) == 1 and "pydantic" not in text and "http" not in text and len(text) < 250, text
    named = re.findall(r"\b(?:techniques|denoiser|latents|train|sample|optimizer|captions)(?:\.[a-z_0-9]+)+", text)
    branches = {f.rpartition(".")[0] for f in fields(Recipe)}
    assert all(n in fields(Recipe) or n in branches for n in named), "every setting it names exists"
    assert named or "techniques: stop" in text
    assert preset("cpu").replace(changes | remedy), "and what it asks for helps"


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_like_a_change(name):
    "The rules hold for a whole tree too, and do not hang on the order of changes."
    tree = preset("cpu").model_dump(mode="json")
    for path, value in reversed(REFUSED[name][0].items()):
        *branches, leaf = path.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = value
    with pytest.raises(RecipeError) as error:
        parse(tree)
    assert all(word in str(error.value) for word in REFUSED[name][1])


ALLOWED = {
    "repa, contrastive, tread and perceptual": REPA | TREAD | PERCEPTUAL | {T + "contrastive.weight": 0.05},
    "repa, contrastive, sprint and perceptual": REPA | SPRINT | PERCEPTUAL | {T + "contrastive.weight": 0.05},
    "the recipe of PRX Part 3 in kind": REPA | TREAD | PERCEPTUAL | MUON | {"flow.prediction": "x", "sample.guide": "route", "captions.dropout": 0},
    "fusion without routes": FUSION,
    "guide by tread": TREAD | {"sample.guide": "route"},
    "guide by sprint": SPRINT | {"sample.guide": "route"},
    "repa in latents": REPA | LATENTS,
    "tread in latents": TREAD | LATENTS,
    "repa_e with repa in latents": REPA_E,
    "repa_e and muon": REPA_E | MUON,
    "repa with ddp": REPA | {"train.processes": 2},
    "fsdp2 in one process is no fsdp2": REPA | MUON | {"train.parallel": "fsdp2"},
    "tread and perceptual with fsdp2": TREAD | PERCEPTUAL | FSDP,
    "sprint with fsdp2": SPRINT | FSDP,
    "contrastive with fsdp2": FSDP | {T + "contrastive.weight": 0.05},
    "muon with ddp": MUON | {"train.processes": 2},
    "what is switched off may be set": {T + "tread.first": 40, T + "repa.layer": 40, T + "perceptual.t_max": 0.3} | LATENTS,
    "the last blocks": TREAD | REPA | {T + "tread.first": 3, T + "tread.last": 3, T + "repa.layer": 3},
    "no guidance without empty captions": {"captions.dropout": 0, "sample.guidance": 1},
    "one step": REPA | {T + "repa.start": 5, T + "repa.stop": 6},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_can_go_together_goes(name):
    recipe = preset("cpu").replace(ALLOWED[name])
    assert recipe.key != preset("cpu").key and parse(recipe.model_dump(mode="json")) == recipe


def test_several_faults_are_told_one_at_a_time_until_none_is_left():
    tree, seen = TREAD | SPRINT | REPA | FSDP, []
    for remedy in ({T + "tread.rate": 0}, {"train.parallel": "ddp"}, {}):
        try:
            recipe = preset("cpu").replace(tree)
        except RecipeError as error:
            seen.append(str(error))
            assert len(seen[-1].splitlines()) == 1
            tree = tree | remedy
    assert len(set(seen)) == 2 and recipe.techniques.sprint.rate == 0.75


def test_both_techniques_with_weights_are_named():
    "Two rules are broken; the one about processes comes first, and with it out of the way nothing of repa_e is left for fsdp2."
    with pytest.raises(RecipeError, match="one process"):
        preset("cpu").replace(REPA_E | FSDP)
    assert preset("cpu").replace(REPA_E | FSDP | {"train.processes": 1})
