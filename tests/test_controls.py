"The controls at smoke size: what must be called is, what must not is not. Real trainings of seconds."
import math
from dataclasses import replace

import pytest

from prx_nb.core import metrics, train
from prx_nb.lab import ablations, judge, results
from prx_nb.lab.decision import decide

SIZE = {"train.steps": 80, "train.validate_every": 40, "train.checkpoint_every": 80, "optimizer.lr": 3e-3, "evaluate.stretch": (1.0, 1.15, 1.3)}


@pytest.fixture(scope="module")
def exams(tmp_path_factory):
    "(ablation, variant, seed) -> metrics, trained once and judged as a run is."
    prepared, made, home = {}, {}, tmp_path_factory.mktemp("controls")

    def sit(name, variant, seed, weights=None):
        if (name, variant, seed) not in made:
            ablation = ablations.get(name)
            recipe = ablations.recipe(ablation, variant, "smoke", seed, SIZE)
            ready = prepared.setdefault(recipe.captions.wrong, None) or train.prepare(recipe, progress=False)
            prepared[recipe.captions.wrong] = ready
            run = (replace(weights, recipe=recipe) if weights else
                   train.train(recipe, home / f"{name}-{variant}-{seed}", progress=False, prepared=ready))
            questions, images = judge.take(run, ready, ablation)
            made[name, variant, seed] = run, judge.judge(run, ready, questions, images) | run.record["metrics"]
        return made[name, variant, seed]
    return sit


def words(exams, name, variant, metric, seeds=3):
    ablation = ablations.get(name)
    sides = [[exams(name, v, s)[1][metric] for s in range(seeds)] for v in (variant, ablation.baseline)]
    return decide(*sides, metrics.higher_is_better(metric), ablation.margin)


def test_half_the_steps_are_called_worse(exams):
    found = words(exams, "training_length", "steps50", "val")
    assert found.word == ablations.get("training_length").expected["steps50"] == "worse" and found.low > 1


def test_a_thing_against_itself_is_equivalent(exams):
    found = words(exams, "null_check", "b", "val")
    assert found.word == ablations.get("null_check").expected["b"] == "equivalent"


@pytest.mark.parametrize("variant", ["longer", "more_guidance", "less_guidance"])
def test_a_dial_of_the_sampler_is_not_better(exams, variant):
    "The same weights, another setting: judged at its best it is what it was."
    for seed in range(3):
        run, _ = exams("dial", "as_it_is", seed)
        exams("dial", variant, seed, weights=run)
    found = words(exams, "dial", variant, "joint[effnet-lite0]")
    assert found.word not in ("better", "worse") and abs(math.log(found.ratio)) < 0.05, str(found)


def test_a_longer_velocity_leaves_less_noise_where_nothing_was_trained(exams):
    "Why the exam has a grid: at one setting for all, a dial cleans the pictures as if something had been learnt."
    run, _ = exams("dial", "as_it_is", 0)
    prepared = train.prepare(run.recipe, progress=False)
    questions, reference = judge.exam(prepared, run.recipe), metrics.prepare(run.recipe, prepared)
    at = lambda f: metrics.evaluate(judge.draw(run, prepared, questions, run.recipe.replace("sample.stretch", f)), questions.items, reference)
    moved = at(1.3)["residual-noise"] / at(1.0)["residual-noise"]
    assert moved < 0.9, "less noise is left, and nothing was trained"


def test_wrong_captions_are_heard_and_only_in_training(exams):
    ablation = ablations.get("wrong_captions")
    right, wrong = (train.prepare(ablations.recipe(ablation, v, "smoke", 0, SIZE), progress=False) for v in ("right", "wrong20"))
    differ = [i for i, (a, b) in enumerate(zip(right.texts, wrong.texts)) if a != b]
    training = right.split.train.tolist()
    assert len(differ) == pytest.approx(0.2 * len(training), abs=0.02 * len(training)) and set(differ) <= set(training)
    assert right.asked == wrong.asked and (right.rows != wrong.rows).any(1).sum() == len(differ)


def test_a_report_says_whether_the_control_passes(tmp_path):
    group = results.pretend_runs(tmp_path, ablation="null_check", seeds=5)
    found = ablations.get("null_check")
    table = results.table(results.collect(group), found)
    lines = results.control_words(table, found)
    assert len(lines) == 1 and lines[0].startswith("Control: b must be equivalent, and is ")
