"Declared ablations, seeds moved out of each other's way, and the exam that all their runs sit."
import json
from dataclasses import replace

import pytest
import torch

from prx_nb.core import captions, train
from prx_nb.core import recipe as recipes
from prx_nb.lab import ablations, judge
from prx_nb.lab.ablations import Ablation, AblationError, Scaled, Solved

ABLATIONS = ablations.known()

TWIN = Ablation("twin", "?", "a", {"a": {}, "b": {}, "c": {"flow.prediction": "x"}}, seed_shift={"b": 50, "c": 70})


@pytest.mark.parametrize("preset", recipes.PRESETS)
@pytest.mark.parametrize("name", ABLATIONS)
def test_each_variant_is_what_its_declaration_says_and_nothing_else(name, preset):
    ablation = ABLATIONS[name]
    base = ablations.recipe(ablation, ablation.baseline, preset, 3)
    for variant in ablation.variants:
        mine, sets = ablations.recipe(ablation, variant, preset, 3), ablations.changes(ablation, variant)
        flat, base_s = recipes.flatten(mine), recipes.preset(preset)
        preset_s, plain = recipes.flatten(base_s), {k: v for k, v in sets.items() if not isinstance(v, Solved)}
        found = {k: v.of(base_s, plain)[k] for k, v in sets.items() if isinstance(v, Solved)}
        found |= {k: v.of(preset_s[k]) if isinstance(v, Scaled) else v for k, v in plain.items()}
        assert {k: flat[k] for k in sets} == found
        allowed = set().union(*ablation.variants.values()) | ({"seed"} if ablation.seed_shift else set())
        assert set(mine.diff(base)) <= allowed
        assert mine.seed == 3 + ablation.seed_shift.get(variant, 0)
        assert (mine.key == base.key) == (variant == ablation.baseline), "no two variants are the same run"


def test_the_null_checks_two_pools_share_no_seed():
    a = ABLATIONS["null_check"]
    pools = [{ablations.recipe(a, v, "smoke", s).key for s in range(999)} for v in a.variants]
    assert not pools[0] & pools[1] and [len(p) for p in pools] == [999, 999]


def test_all_lengths_of_caption_are_examined_with_the_same_words():
    exams = {ablations.recipe(ABLATIONS["caption_length"], v, "cpu").evaluate for v in ABLATIONS["caption_length"].variants}
    assert len(exams) == 1 and exams.pop().captions == "dense"
    assert {(p.variant, p.verdict) for p in ABLATIONS["caption_length"].published} == {("short", "worse")}


def test_published_numbers_are_those_of_the_post():
    post = {
        "baseline": (18.20, 0.41, 0.39), "baseline, 1024 px": (17.42, 0.71, 0.56),
        "prediction_target x": (16.80, 0.54, 0.49), "caption_length short": (36.84, 0.98, 1.14),
        "repa repa DINOv2": (16.6, 0.39, 0.31), "repa repa DINOv3": (14.64, 0.35, 0.30), "repa_e repa_e": (12.08, 0.26, 0.18),
        "contrastive roll": (20.03, 0.40, 0.36), "jit x": (16.80, 0.54, 0.49),
        "muon muon": (15.55, 0.36, 0.35), "bf16_weights bf16": (21.87, 0.61, 0.57),
        "tread tread": (21.61, 0.55, 0.41), "sprint sprint": (22.56, 0.72, 0.42),
        "baseline, Part 1": (13.16, 0.217), "architectures dit, Part 1": (14.02, 0.253), "architectures dit_air, Part 1": (13.16, 0.244),
        "architectures mmdit, Part 1": (13.81, 0.190), "architectures uvit, Part 1": (14.60, 0.239),
        "tread tread, 1024 px": (14.10, 0.46, 0.37), "sprint sprint, 1024 px": (16.90, 0.51, 0.41),
    }
    for ablation in ABLATIONS.values():
        for p in ablation.published:
            place, size = ("FID", "CMMD", "DINO-MMD").index(p.metric), next((f", {s}" for s in ("1024 px", "Part 1") if s in p.source), "")
            row = " ".join([ablation.name, p.variant, *(t for t in ("DINOv2", "DINOv3") if t in p.source and ablation.name == "repa")])
            assert (p.baseline_value, p.value) == (post["baseline" + size][place], post[row + size][place])
            assert not p.higher_is_better and "Photoroom" in p.source


def test_shifted_seeds_never_meet():
    assert [ablations.recipe(TWIN, v, seed=19).seed for v in "abc"] == [19, 69, 89]
    with pytest.raises(AblationError, match="seed 20 of 'twin' would be that of another variant's run: its seeds go from 0 to 19"):
        ablations.recipe(TWIN, "a", seed=20)
    plain = Ablation("p", "?", "a", {"a": {}, "c": {"flow.prediction": "x"}})
    assert ablations.recipe(plain, "a", seed=10**6).seed == 10**6
    assert (ablations.shift(TWIN, "c"), ablations.shift(plain, "c"), ablations.shift("null_check", "b"), ablations.shift("none", "b")) == (70, 0, 1000, 0)


def test_bad_declarations_and_choices_are_refused():
    with pytest.raises(AblationError, match="seed_shift 'd' is none of a"):
        Ablation("n", "?", "a", {"a": {}}, seed_shift={"d": 1})
    with pytest.raises(AblationError, match="no ablation 'caption_lenght'.* did you mean 'caption_length'"):
        ablations.get("caption_lenght")
    with pytest.raises(AblationError, match="no variant 'denser'.* did you mean 'dense'"):
        ablations.recipe(ABLATIONS["caption_length"], "denser")
    with pytest.raises(AblationError, match="'captions.kind' is what the ablation 'caption_length' sets itself"):
        ablations.recipe(ABLATIONS["caption_length"], "dense", overrides={"captions.kind": "long"})
    with pytest.raises(AblationError, match="'seed' is what"):
        ablations.recipe(ABLATIONS["null_check"], "b", overrides={"seed": 4})
    with pytest.raises(TypeError):
        TWIN.seed_shift["a"] = 1


@pytest.fixture(scope="module")
def sat(tmp_path_factory):
    "Two short runs, of variants that hear different captions, and their exams."
    found = {}
    for variant in ("short", "dense"):
        recipe = ablations.recipe(ABLATIONS["caption_length"], variant, "smoke", 2, {"train.steps": 4})
        prepared = train.prepare(recipe, progress=False)
        run = train.train(recipe, tmp_path_factory.mktemp(variant), progress=False, prepared=prepared)
        found[variant] = run, prepared, *judge.take(run, prepared)
    return found


def test_all_variants_are_asked_the_same(sat):
    (_, short, questions, _), (_, dense, others, _) = sat["short"], sat["dense"]
    assert short.texts != dense.texts and questions.prompts == others.prompts
    assert questions.prompts == [captions.caption(i, "dense") for i in questions.items]
    assert questions.index.equal(others.index) and questions.reference.equal(others.reference)


def test_asking_in_other_words_changes_the_words_only(sat):
    run, prepared, questions, images = sat["short"]
    for kind in captions.KINDS:
        other = judge.reworded(prepared, run.recipe, kind)
        asked = judge.exam(other, run.recipe)
        assert asked.prompts == [captions.caption(i, kind) for i in questions.items] and asked.index.equal(questions.index)
        assert judge.draw(run, other, asked).equal(images) == (kind == "dense")
        for mine, theirs in zip(train.validation_set(other, run.recipe, "cpu"), train.validation_set(prepared, run.recipe, "cpu")):
            assert mine.x0.equal(theirs.x0) and mine.noise.equal(theirs.noise) and mine.t.equal(theirs.t)
            assert (mine.text.shape == theirs.text.shape and mine.text.equal(theirs.text)) == (kind == "dense")


def test_the_noise_of_the_exam_knows_no_seed(sat):
    run, prepared, questions, images = sat["dense"]
    other = replace(run, recipe=run.recipe.replace({"seed": 7}))
    assert judge.draw(other, prepared, questions).equal(images) and judge.exam(prepared, other.recipe).prompts == questions.prompts


def test_what_is_kept_of_an_exam(sat):
    from safetensors import safe_open
    run, _, questions, images = sat["dense"]
    with safe_open(run.dir / "samples.safetensors", "pt") as f:
        count = run.recipe.evaluate.pictures
        assert json.loads(f.metadata()["prompts"]) == questions.prompts[:count]
        assert (f.get_tensor("images").float() / 127.5 - 1 - images[:count]).abs().max() <= 1 / 127.5
    assert (run.dir / "samples.png").stat().st_size > 100 and torch.isfinite(images).all()


def test_a_record_says_the_plans_seed_and_the_recipe_the_true_one(sat):
    run = sat["dense"][0]
    shifted = replace(run, recipe=run.recipe.replace({"seed": 1002}))
    for name, variant, seed in (("null_check", "b", 2), ("null_check", "a", 1002), ("caption_length", "dense", 1002), ("unknown", "b", 1002)):
        assert judge.complete(shifted, name, variant, "smoke", {}, 0.0)["seed"] == seed
    assert recipes.load(run.dir / "recipe.json").seed == 2


def test_published_numbers_that_are_no_test_of_ours_are_declared():
    "Latents against pixels, a thousand tokens against sixty-four, another baseline, another rate, other sizes."
    apart = {(name, p.source.split(", ")[2]) for name, a in ablations.known().items() for p in a.published if p.differs}
    assert apart == {("jit", "256 px"), ("tread", "1024 px"), ("sprint", "1024 px"), ("repa_e", "256 px"), ("bf16_weights", "256 px"), ("architectures", "256 px")}
    for a in ablations.known().values():
        for p in a.published:
            assert len(p.differs.split()) < 25 and str(p).endswith(f"(not comparable: {p.differs})") == bool(p.differs)
