"Images that another run drew: whose they are is part of a run, and nothing that is judged by is drawn."
import numpy as np
import pytest
import torch
from runs import weights

from prx_nb.choices import synthetic as choice
from prx_nb.core import autoencoder, batch
from prx_nb.core.images import DataError
from prx_nb.core.recipe import PRESETS, RecipeError, preset
from prx_nb.core.train import train, validation_set
from prx_nb.lab import ablations, identity, judge, plan

SMOKE = preset("smoke").replace({"data.limit": 64, "evaluate.samples": 4, "evaluate.choose": 2})
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "A small run that draws at 16 px."
    return train(SMOKE.replace("train.steps", 4), tmp_path_factory.mktemp("runs") / "teacher", **QUIET)


@pytest.fixture(scope="module")
def recipe(teacher):
    return SMOKE.replace({"synthetic.share": 0.5, "synthetic.teacher": str(teacher.dir), "synthetic.steps": 2, "synthetic.until": 0.5})


def test_a_run_learns_from_what_was_drawn_and_goes_on_to_the_bit(recipe, teacher, tmp_path):
    prepared = batch.prepare(recipe, progress=False)
    whole = train(recipe, tmp_path / "a", prepared=prepared, **QUIET)
    real = train(SMOKE, tmp_path / "b", **QUIET)
    losses = [r.curves[r.curves.name == "loss flow"].value.to_numpy() for r in (whole, real)]
    assert not np.array_equal(losses[0][:6], losses[1][:6])
    told = whole.record["data_summary"]["drawn"]
    assert told["weights"] == choice.mark_of(str(teacher.dir)) and told["until"] == 6 and told["images"] == round(0.5 * len(prepared.split.train))
    assert whole.record["data_key"] != real.record["data_key"]
    before = weights(whole)
    (whole.dir / "checkpoint/step-0000012.safetensors").unlink()
    again = train(recipe, whole.dir, **QUIET)                           # the drawings come from disk
    assert all(before[k].equal(v) for k, v in weights(again).items())


def test_batches_show_what_was_drawn_until_then_however_they_are_read(recipe):
    prepared, real = batch.prepare(recipe, progress=False), batch.prepare(SMOKE, progress=False)
    held = batch.hold(prepared, "cpu", 10**9)
    differ = []
    for step in range(12):
        a, b, plain = batch.read_batch(prepared, recipe, step), batch.read_batch(held, recipe, step), batch.read_batch(real, SMOKE, step)
        assert a.index.equal(plain.index) and a.caption.equal(plain.caption), "the same images and captions, drawn or not"
        assert a.x0.equal(b.x0)
        parts = [batch.read_batch(prepared, recipe, step, part) for part in (slice(0, 4), slice(4, 8))]
        assert torch.cat([p.x0 for p in parts]).equal(a.x0)
        replaced = (prepared.drawn.instead[a.index] >= 0) & (step < 6)
        assert (a.x0 != plain.x0).flatten(1).any(1).equal(replaced)
        differ.append(replaced.float().mean().item())
    assert 0.2 < np.mean(differ[:6]) < 0.8 and sum(differ[6:]) == 0


def test_what_judges_is_real(recipe):
    prepared, real = batch.prepare(recipe, progress=False), batch.prepare(SMOKE, progress=False)
    assert judge.exam(prepared, recipe).reference.equal(judge.exam(real, SMOKE).reference)
    for a, b in zip(validation_set(prepared, recipe, "cpu"), validation_set(real, SMOKE, "cpu")):
        assert a.x0.equal(b.x0)
    assert not set(prepared.heldout.tolist()) & set((prepared.drawn.instead >= 0).nonzero().flatten().tolist())


def test_drawings_are_made_once_and_shares_are_nested(recipe, teacher, monkeypatch):
    first = batch.prepare(recipe, progress=False)
    import prx_nb.core.drawing as drawing
    monkeypatch.setattr(drawing, "sample", lambda *a, **k: pytest.fail("drawn again"))
    fewer = batch.prepare(recipe.replace({"synthetic.share": 1.0, "synthetic.images": 9}), progress=False).drawn
    assert len(fewer.pixels) == 9 and (fewer.pixels == first.drawn.pixels[:9]).all()
    mine, theirs = (set((d.instead >= 0).nonzero().flatten().tolist()) for d in (fewer, first.drawn))
    assert mine < theirs


def test_other_weights_are_another_run(recipe, teacher, tmp_path):
    other = train(teacher.recipe.replace("seed", 3), tmp_path / "other", **QUIET)
    theirs = recipe.replace("synthetic.teacher", str(other.dir))
    assert choice.mark_of(str(other.dir)) != choice.mark_of(str(teacher.dir))
    assert batch.data_key(batch.prepare(theirs, progress=False)) != batch.data_key(batch.prepare(recipe, progress=False))
    before = identity.training(theirs)
    for path in other.dir.glob("checkpoint/*"):
        path.unlink()
    for path in teacher.dir.glob("checkpoint/*"):                       # other weights under the same name
        (other.dir / "checkpoint" / path.name).write_bytes(path.read_bytes())
    (other.dir / "recipe.json").write_bytes((teacher.dir / "recipe.json").read_bytes())
    assert identity.training(theirs) != before and choice.mark_of(str(other.dir)) == choice.mark_of(str(teacher.dir))


def test_what_is_off_counts_nowhere():
    quiet = SMOKE.replace({"synthetic.teacher": "elsewhere", "synthetic.guidance": 2.0})
    assert quiet.key == SMOKE.key and identity.training(quiet) == identity.training(SMOKE)
    assert batch.prepare(SMOKE, progress=False).drawn is None


@pytest.mark.parametrize("changes,why", [
    ({"synthetic.share": 0.5, "synthetic.teacher": "runs/none"}, "synthetic.teacher = 'runs/none': there is no trained run"),
    ({"synthetic.share": 0.5, "synthetic.until": 0.01}, "synthetic.until = 0.01 of train.steps = 12 is not one step"),
    ({"synthetic.share": 0.5, "techniques.repa.weight": 0.5}, "not as another run draws them; set one to 0"),
    ({"synthetic.until": 0.5}, "synthetic.until = 0.5 without synthetic.share would do nothing"),
    ({"synthetic.share": 1.5}, "less than or equal to 1")])
def test_what_cannot_be_is_refused_before_anything_is_drawn(changes, why, tmp_path):
    with pytest.raises(RecipeError, match=why):
        plan.plan("hyperparameters", "smoke", overrides=changes, out=tmp_path)
    with pytest.raises(DataError, match="synthetic.share = 0.001 of"):
        batch.prepare(SMOKE.replace("synthetic.share", 0.001), progress=False)


def test_drawings_become_latents_too(recipe):
    pytest.importorskip("diffusers")
    made = autoencoder.made(autoencoder.Settings(data=SMOKE.data, blocks=(8, 16, 16), channels=4, steps=30), progress=False)
    coded = recipe.replace({"latents.autoencoder": str(made), "latents.channels": 4, "latents.factor": 4, "denoiser.in_channels": 4, "denoiser.patch_size": 1})
    prepared = batch.prepare(coded, progress=False)
    shown = batch.read_batch(prepared, coded, 0)
    rows = prepared.drawn.instead[shown.index]
    wanted = torch.from_numpy(prepared.drawn.latents[rows.clamp(min=0).numpy()]).float()
    assert len(prepared.drawn.latents) == len(prepared.drawn.pixels) and (rows >= 0).any() and shown.x0[rows >= 0].equal(wanted[rows >= 0])


def test_variants_are_recipes_at_every_size():
    declared = ablations.get("synthetic")
    for size in PRESETS:
        keys = [ablations.recipe(declared, v, size, 0, {"synthetic.teacher": "mine/run"}).key for v in declared.variants]
        assert len(set(keys)) == len(keys)
