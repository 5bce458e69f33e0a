"A last stage on chosen images: part of one run, exact, refused where it means nothing."
import pytest
import torch
from runs import weights

from prx_nb.choices import fine_tuning as choice
from prx_nb.core import batch
from prx_nb.core.checkpoint import find_checkpoint, read_checkpoint
from prx_nb.core.data import DataError, load, named
from prx_nb.core.recipe import PRESETS, Data, RecipeError, parse, preset
from prx_nb.core.settings import counted
from prx_nb.core.train import continue_, train
from prx_nb.lab import ablations, identity, plan

SMOKE = preset("smoke").replace({"train.checkpoint_every": 1, "train.keep": 9})
TUNED = SMOKE.replace({"tuning.subset": "style=fluent", "tuning.share": 0.25, "tuning.old": 0.25, "tuning.rate": 0.5})       # steps 10 to 12
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def prepared():
    return batch.prepare(TUNED, progress=False)


@pytest.fixture(scope="module")
def tuned(prepared, tmp_path_factory):
    return train(TUNED, tmp_path_factory.mktemp("tuned"), prepared=prepared, **QUIET)


def test_what_comes_before_the_stage_is_a_whole_run_to_the_bit(tuned, tmp_path):
    alone = train(SMOKE.replace("train.steps", 9), tmp_path, **QUIET)
    there = read_checkpoint(tuned.dir / "checkpoint/step-0000009.safetensors")[0]
    here = find_checkpoint(alone.dir / "checkpoint", alone.recipe)[0]
    assert there.keys() == here.keys() and [k for k in here if not here[k].equal(there[k])] == [], "weights, average, optimizer"


def test_a_run_that_stops_within_the_stage_goes_on_to_the_bit(tuned, prepared, tmp_path):
    stage = choice.Trace(choice.apart(prepared, TUNED.tuning.subset), TUNED)
    whole = train(TUNED, tmp_path / "whole", prepared=prepared, watch=stage, every=stage.every, **QUIET)
    before, rows = weights(whole), choice.traced(whole.dir)
    for last in ("step-0000011.safetensors", "step-0000012.safetensors"):
        (tmp_path / "whole/checkpoint" / last).unlink()
    again = train(TUNED, tmp_path / "whole", prepared=prepared, watch=stage, every=stage.every, **QUIET)
    assert all(before[k].equal(v) and weights(tuned)[k].equal(v) for k, v in weights(again).items())
    assert choice.traced(again.dir) == rows and [row["step"] for row in rows] == [9, 10, 11, 12]
    assert again.record["data_summary"]["tuning"] == {"rules": ["style=fluent"], "images": len(prepared.chosen)}


def test_batches_of_the_stage_are_chosen_whoever_reads_them(prepared):
    held = batch.hold(prepared, "cpu", 10**9)
    inside = set(prepared.chosen.tolist())
    for step in range(12):
        a, b = (batch.read_batch(source, TUNED, step) for source in (prepared, held))
        halves = [batch.read_batch(prepared, TUNED, step, part) for part in (slice(0, 4), slice(4, 8))]
        assert a.index.equal(b.index) and a.x0.equal(b.x0) and torch.cat([h.index for h in halves]).equal(a.index)
        assert (set(a.index[:6].tolist()) <= inside) == (step >= 9)


def test_old_recipes_know_of_no_stage():
    tree = preset("cpu").model_dump(mode="json")
    assert parse({k: v for k, v in tree.items() if k != "tuning"}).key == preset("cpu").key
    assert "tuning" in tree and "tuning" not in counted(preset("cpu")) and "tuning" in counted(TUNED)
    assert TUNED.key != SMOKE.key and identity.training(TUNED) != identity.training(SMOKE)
    assert batch.prepare(SMOKE, progress=False).chosen is None


def test_an_empty_set_is_known_before_anything_is_drawn(tmp_path):
    wrong = ablations.Ablation("fine_tuning", "?", "a", {"a": {}, "b": {"tuning.subset": ["style=fluid"]}}, ablations.get("fine_tuning").notebook)
    with pytest.raises(RecipeError, match="'style=fluid' fits none: there are style=twemoji"):
        plan.plan(wrong, out=tmp_path)
    with pytest.raises(DataError, match="'fill>=1' fits none|no image has a fill|there are fill="):
        batch.prepare(SMOKE.replace("tuning.subset", ["style=noto", "fill>=1"]), progress=False)


def test_a_set_of_ones_own_is_a_folder_a_column_or_words(tmp_path):
    from PIL import Image
    for kind in ("good", "rest"):
        (tmp_path / kind).mkdir()
        for n in range(8):
            Image.new("RGB", (16, 16), (20 * n, 90, 200 if kind == "good" else 10)).save(tmp_path / kind / f"p{n}.png")
    lines = [f'{kind}/p{n}.png,a square,{"line" if n % 2 else "fill"}' for kind in ("good", "rest") for n in range(8)]
    (tmp_path / "metadata.csv").write_text("file_name,text,style\n" + "\n".join(lines) + "\n")
    settings = Data(source="folder", path=str(tmp_path), size=8)
    items = load(settings, progress=False).items
    for rules, many in ((["key=good/*"], 8), (["style=line"], 8), (["key=good/*", "style!=line"], 4), (["key=*"], 16)):
        assert sum(choice.matches(item, rules) for item in items) == many == sum(choice.matches(item, rules) for item in named(settings))


@pytest.mark.parametrize("changes,why", [
    ({"tuning.rate": 0.1}, "tuning.rate = 0.1 without tuning.subset would do nothing"),
    ({"tuning.subset": "noto"}, "'noto': a rule is like 'style=noto'"),
    ({"tuning.subset": "style=noto", "tuning.share": 0.01}, "of train.steps = 12 is not one step"),
    ({"tuning.subset": "style=noto", "tuning.old": 0.99}, "leaves no room for a chosen image"),
    ({"tuning.subst": "style=noto"}, "did you mean 'tuning.subset'")])
def test_what_means_nothing_is_refused(changes, why):
    with pytest.raises(RecipeError, match=why):
        preset("smoke").replace(changes)


def test_a_tuned_run_is_not_made_longer(tuned):
    with pytest.raises(ValueError, match="ended with a stage of fine-tuning"):
        continue_(tuned, 5, **QUIET)


def test_variants_are_recipes_at_every_size_and_train(tmp_path):
    declared = ablations.get("fine_tuning")
    for size in PRESETS:
        keys = [ablations.recipe(declared, v, size).key for v in declared.variants]
        assert len(set(keys)) == len(keys)
    found = ablations.recipe(declared, "only", "smoke", 0, {"train.steps": 4})
    assert train(found, tmp_path, **QUIET).record["status"] == "done"
