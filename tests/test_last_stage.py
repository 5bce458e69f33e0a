"A last stage with other captions, two exams, and prompts of growing length."
import numpy as np
import pytest
import torch

from prx_nb.choices import captions as choice
from prx_nb.core import batch, captions
from prx_nb.core.metrics import joint_error
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.train import train
from prx_nb.lab import ablations

LATE = preset("smoke").replace({"captions.last": "short", "captions.last_share": 0.25})       # steps 10 to 12 of 12


@pytest.fixture(scope="module")
def prepared():
    return batch.prepare(LATE, progress=False)


def test_until_the_last_stage_a_run_is_the_one_without_to_the_bit(prepared, tmp_path):
    plain = LATE.replace({"captions.last": None, "captions.last_share": 0.2})
    assert plain.key == preset("smoke").key != LATE.key
    late = train(LATE, tmp_path / "late", progress=False, prepared=prepared, device="cpu").curves
    usual = train(plain, tmp_path / "plain", progress=False, device="cpu").curves
    losses = [c[c.name == "loss flow"].sort_values("step").value.to_numpy() for c in (late, usual)]
    assert np.array_equal(losses[0][:9], losses[1][:9]) and not np.array_equal(losses[0][9:], losses[1][9:])


def test_steps_draw_the_captions_of_their_stage_held_on_a_device_or_not(prepared):
    held = batch.hold(prepared, "cpu", 10**9)
    assert isinstance(held, batch.Held) and held.early == prepared.early == 1
    said = {n: t for t, n in prepared.states._index.items()}
    for step, kind in ((0, "dense"), (8, "dense"), (9, "short"), (11, "short")):
        a, b = (batch.read_batch(source, LATE, step) for source in (prepared, held))
        assert a.text.equal(b.text) and a.mask.equal(b.mask) and a.caption.equal(b.caption)
        for image, row, dropped in zip(a.index.tolist(), a.caption.tolist(), a.dropped.tolist()):
            assert said[row] == ("" if dropped else captions.caption(prepared.images.items[image], kind))


def test_a_wrong_caption_is_wrong_in_both_stages():
    found = batch.prepare(LATE.replace("captions.wrong", 0.2), progress=False)
    items = found.images.items
    mine = [[captions.caption(i, kind) for kind in ("dense", "short")] for i in items]
    wrong = [n for n, said in enumerate(found.texts) if said != mine[n]]
    assert len(wrong) == pytest.approx(0.2 * len(found.split.train), abs=2)
    assert all(found.texts[n] in mine for n in wrong), "both are another's, the same one's"


def test_bad_stages_are_refused():
    with pytest.raises(RecipeError, match="captions.last = 'dense' is the kind of all steps before it"):
        LATE.replace("captions.last", "dense")
    with pytest.raises(RecipeError, match="captions.last_share.* = 1.0"):
        LATE.replace("captions.last_share", 1.0)
    with pytest.raises(RecipeError, match="did you mean 'mixed'"):
        LATE.replace("captions.last", "mixd")


def test_what_decides_between_variants_is_none_of_the_two_exams_alone():
    ablation = ablations.get("captions")
    measured = {"joint[eye]": 1.0, "joint asked short[eye]": 4.0, **choice.both({"joint[eye]": 4.0}, {"joint[eye]": 1.0})}
    assert ablation.decides(measured) == "joint both lengths[eye]" and measured["joint both lengths[eye]"] == 2.0
    assert joint_error(4.0, 1.0) == 2.0, "the same mean as the one inside"


def test_a_ladder_only_adds(prepared):
    for item in prepared.images.items[:50]:
        rungs = choice.ladder(item)
        said = [set(prompt.replace(":", " ").replace(",", " ").replace(";", " ").split()) for prompt in rungs.values()]
        assert all(a <= b for a, b in zip(said, said[1:])), rungs
        assert rungs["ground"] == captions.head(item) and rungs["all"].startswith(rungs["facts"])


def test_errors_know_which_facts_are_not_told():
    items = [captions.Item("a", "a", facts={"colours": [("red", 1.0)]}, background="white")] * 2
    red = torch.ones(2, 3, 16, 16)
    red[:, 1:, 4:12, 4:12] = -0.6
    scale = {"ground-error": 0.5, "palette-error": 0.25}
    assert choice.prompt_errors(red, items, scale).max() < 0.3 < choice.prompt_errors(-red, items, scale).min()
    assert np.isnan(choice.prompt_errors(red, [captions.Item("a", "a")] * 2, scale)).all()


@pytest.mark.parametrize("variant", ["last_mixed", "mixed"])
def test_variants_train(variant, tmp_path):
    r = ablations.recipe(ablations.get("captions"), variant, "smoke", 0, {"train.steps": 4})
    assert train(r, tmp_path, progress=False, device="cpu").record["status"] == "done"
