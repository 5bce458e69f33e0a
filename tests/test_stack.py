"""What goes together: constants that follow rules, presets that were found, ablations of the stack."""
import math

import pytest

from prx_nb.choices.stack import FOUR, RATES, STACK, THRIFTY
from prx_nb.core.recipe import PRESETS, RecipeError, image_tokens, preset
from prx_nb.lab import ablations, factorial, stack

DECIDED = stack.chosen()


@pytest.mark.skipif(DECIDED is None, reason="combine is not published yet: STACK and FOUR follow what is published of each part alone")
def test_the_constants_are_what_the_rules_take_from_the_published_runs():
    assert {"STACK": STACK, "FOUR": FOUR} == DECIDED, "prx_nb.choices.stack"


@pytest.mark.skipif(stack.tuned() is None, reason="equal_time is not published yet: rates are the preset's")
def test_the_rates_are_what_the_published_halvings_found():
    assert stack.tuned() == RATES, "prx_nb.choices.stack"


@pytest.mark.skipif(stack.thrifty() is None, reason="combine and best are not published yet: nothing is known by the clock")
def test_what_is_thrifty_is_what_the_rule_takes_from_the_published_runs():
    assert THRIFTY == stack.thrifty(), "prx_nb.choices.stack"


def test_a_constant_that_does_not_follow_the_runs_would_be_noticed(monkeypatch):
    "On invented records in which nothing but `roll` helps."
    import pandas as pd
    rows = [(v, s, {"joint[a]": (0.8 if "roll" in v else 1.0) * math.exp(0.001 * s)})
            for v in ablations.get("combine").variants for s in range(3)]
    runs = pd.DataFrame(rows, columns=["variant", "seed", "metrics"])
    monkeypatch.setattr(stack, "records_of", lambda *a, **k: runs)
    assert stack.chosen()["STACK"] == ("roll",) != STACK


@pytest.mark.parametrize("name, parts", [("best", STACK), ("thrifty", THRIFTY)])
@pytest.mark.parametrize("size", PRESETS)
def test_a_preset_that_was_found_is_the_variant_of_its_ablation(size, name, parts):
    best, plain = preset(name, base=size), preset(size)
    plain = plain.replace(ablations.in_numbers({k: v for k, v in stack.exam().items() if not k.startswith("evaluate.")}, plain, {}))
    assert image_tokens(plain) == image_tokens(preset(size)) and (plain == preset(size)) == (size != "paper"), "in pixels, as it was found"
    found = ablations.in_numbers(stack.together(parts), plain, {})
    assert dict(best.diff(plain)) and set(best.diff(plain)) <= set(found) and best == plain.replace(found)
    assert preset(name, 10, base=size).train.steps == 10


def test_a_preset_that_is_not_there_is_refused_with_all_that_are():
    with pytest.raises(RecipeError, match="no preset 'bset'; there are smoke, cpu, gpu, paper, best, thrifty, speedrun"):
        preset("bset")


def test_the_design_is_of_resolution_five_and_the_parts_are_read_back_from_it():
    variants = ablations.get("combine").variants
    x = factorial.signs(list(variants))
    assert factorial.resolution(x.to_numpy()) == 5 and len(variants) == 16
    assert list(factorial.design(stack.parts())) == list(variants)


def test_each_ablation_of_the_stack_follows_the_constants():
    known = ablations.known()
    assert list(known["leave_one_out"].variants) == ["stack", *(f"without_{p}" for p in STACK)]
    assert [v for v in known["pairs"].variants if "+" not in v] == ["none", *FOUR]
    for name, names in (("best", STACK), ("thrifty", THRIFTY)):
        assert known[name].variants == stack.at_lengths(name, names) and known[name].baseline == "plain"
    for size in PRESETS:
        a, b = (ablations.recipe(known["equal_time"], v, size) for v in ("baseline", "best"))
        assert a.train.seconds == b.train.seconds and a.train.steps == b.train.steps == 50 * preset(size).train.steps
    mine = ablations.recipe(known["equal_time"], "best", "smoke", overrides={"train.seconds": 3.0})
    assert mine.train.seconds == 3.0, "the reader's own budget"


@pytest.mark.parametrize("size", PRESETS)
def test_preset_speedrun_is_the_whole_recipe_at_each_size(size):
    run, whole = preset("speedrun", base=size), ablations.recipe(ablations.get("speedrun"), "whole", size)
    assert set(run.diff(whole)) <= {p for p in run.diff(preset(size)) if p.startswith("evaluate")} | {"evaluate.features", "evaluate.beside", "evaluate.choose"}
    assert run.optimizer.name == "muon" and run.sample.guide == "route" and run.latents.autoencoder == "pixels"


def test_each_part_of_the_speedrun_is_left_out_alone():
    ablation = ablations.get("speedrun")
    whole = ablations.recipe(ablation, "whole", "cpu")
    left = {v: {p.rpartition(".")[0] for p in ablations.recipe(ablation, v, "cpu").diff(whole)} for v in ablation.variants if v.startswith("without_")}
    assert len(left) == 9 and all(left.values())
    assert left["without_muon"] == {"optimizer"} and left["without_routing"] == {"techniques.tread", "sample"} and left["without_x"] == {"flow"}
