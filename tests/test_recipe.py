"""The recipe: one clear error for every wrong value, exact round trips, keys that name runs."""
import itertools

import pytest

from prx_nb.core.recipe import PRESETS, RecipeError, fields, flatten, load, parse, preset


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_round_trip(name, ending, tmp_path):
    recipe = preset(name)
    recipe.save(tmp_path / f"r.{ending}")
    assert load(tmp_path / f"r.{ending}") == recipe
    assert load(tmp_path / f"r.{ending}").key == recipe.key


def test_keys_differ_between_presets_and_with_every_leaf():
    keys = {preset(n).key for n in PRESETS}
    assert len(keys) == len(PRESETS)
    base, changed = preset("cpu"), 0
    for path, value in flatten(base).items():
        for other in ([not value] if isinstance(value, bool) else [value * 2, value + 1, value / 2] if isinstance(value, int | float) else []):
            if other == value:
                continue
            try:
                assert base.replace(path, other).key != base.key, path
                changed += 1
                break
            except RecipeError:
                continue
    assert changed > 35


def test_the_order_of_settings_in_a_file_does_not_change_the_key(tmp_path):
    tree = preset("cpu").model_dump(mode="json")
    turned = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in reversed(tree.items())}
    assert parse(turned).key == preset("cpu").key


WRONG = [
    ("flow.prediction", "z", "'v', 'x' or 'eps'"),
    ("flow.predicton", "x", "did you mean 'flow.prediction'"),
    ("flow", 3, "flow"),
    ("nothing.at.all", 3, "no field 'nothing.at.all'"),
    ("train.steps", 0, "greater than or equal to 1"),
    ("train.steps", "many", "train.steps"),
    ("optimizer.lr", float("nan"), "optimizer.lr"),
    ("optimizer.betas", [0.9, 1.0], "optimizer.betas"),
    ("denoiser.num_heads", 5, "not a multiple"),
    ("denoiser.axes_dim", [15, 17], "must be even"),
    ("denoiser.in_channels", 4, "latents.channels = 3"),
    ("data.size", 30, "data.size = 30"),
    ("data.source", "folder", "need one"),
    ("data.path", "/x", "emoji takes no path"),
    ("data.styles", ["noto", "noto"], "each once"),
    ("captions.dropout", 0, "sample.guidance"),
    ("latents.scale", 2.0, "pixels"),
    ("train.processes", 3, "train.batch = 32 cannot be shared out evenly among train.processes = 3"),
    ("train.parallel", "fsdp", "'ddp' or 'fsdp2'"),
    ("evaluate.captions", "mixed", "'short', 'long' or 'dense'"),
]


@pytest.mark.parametrize("path,value,says", WRONG, ids=[f"{p}={v}" for p, v, _ in WRONG])
def test_one_clear_error(path, value, says):
    with pytest.raises(RecipeError) as error:
        preset("cpu").replace(path, value)
    text = str(error.value)
    assert says in text and path.split(".")[0] in text
    assert len(text.splitlines()) == 1 and "pydantic" not in text and "http" not in text


def test_two_faults_are_two_lines():
    with pytest.raises(RecipeError) as error:
        preset("cpu").replace({"train.steps": 0, "optimizer.lr": -1})
    assert len(str(error.value).splitlines()) == 2


def test_a_broken_file_is_named(tmp_path):
    for text in ("{", "- 1", "flow: {prediction: z}", "a: b: c"):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match=str(tmp_path / "r.yaml")):
            load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="missing.json"):
        load(tmp_path / "missing.json")


@pytest.mark.parametrize("ask,space", itertools.product(("v", "x", "eps"), repeat=2))
def test_every_question_goes_with_every_loss_given_a_clamp(ask, space):
    assert preset("cpu").replace({"flow.prediction": ask, "flow.loss": space}).flow.loss == space
    if ask != space:
        with pytest.raises(RecipeError, match="clamp"):
            preset("cpu").replace({"flow.prediction": ask, "flow.loss": space, "flow.clamp": 0})


def test_frozen_and_diff():
    base = preset("cpu")
    with pytest.raises(Exception, match="frozen"):
        base.seed = 3
    other = base.replace({"seed": 3, "flow.path": "cosine"})
    assert other.diff(base) == {"seed": (0, 3), "flow.path": ("linear", "cosine")} and base.diff(base) == {}
    assert set(flatten(base)) == {f for f in fields() if not f.startswith("techniques.")}, "what is off is not in the tree"


def test_what_is_asked_does_not_follow_what_is_trained_on():
    assert preset("cpu").replace("captions.kind", "short").evaluate.captions == preset("cpu").evaluate.captions == "dense"
    assert preset("paper").evaluate.captions == preset("paper").captions.kind == "long", "its images come with a long caption"
