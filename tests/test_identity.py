"What decides a run is told part by part: comments change nothing, constants change what uses them."
import shutil
from pathlib import Path

import pytest

from prx_nb.core import recipe as recipes
from prx_nb.core.batch import data_key
from prx_nb.core.checkpoint import CheckpointError
from prx_nb.core.recipe import preset
from prx_nb.core.train import train
from prx_nb.lab import ablations, batch, identity, plan

PACKAGE = Path(recipes.__file__).parents[1]
SMOKE = preset("smoke")
TREAD = SMOKE.replace("techniques.tread.rate", 0.5)


@pytest.fixture
def keys(tmp_path, monkeypatch):
    "Keys of runs by a copy of the package that may be edited."
    copy = tmp_path / "prx_nb"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    notebook = Path(ablations.get("prediction_target").notebook)

    def of(recipe):
        identity._KEPT.clear()
        return identity.key(identity.parts(notebook, {"variant": "v"}, recipe, copy))
    return copy, of


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_comment_or_a_docstring_changes_no_key(keys):
    copy, of = keys
    first = of(SMOKE), of(TREAD)
    for path in copy.rglob("*.py"):
        path.write_text("# a comment\n" + path.read_text() + "\n\n# another\n")
    edit(copy / "core/flow.py", '    "Move times towards noise', '    "Pull times towards noise')
    assert (of(SMOKE), of(TREAD)) == first


def test_a_constant_in_flow_changes_all_and_one_in_tread_only_those_that_use_it(keys):
    copy, of = keys
    first = of(SMOKE), of(TREAD)
    edit(copy / "techniques/tread.py", "rate: float = 0.5", "rate: float = 0.6")
    assert of(SMOKE) == first[0] and of(TREAD) != first[1]
    edit(copy / "core/flow.py", "MIN_TIME = 1e-3", "MIN_TIME = 2e-3")
    assert of(SMOKE) != first[0]


def test_what_only_reports_is_in_no_key(keys):
    copy, of = keys
    first = of(SMOKE)
    for name in ("report", "figures", "batch", "slurm", "cli", "docs"):
        (copy / "lab" / f"{name}.py").write_text("changed = True")
    assert of(SMOKE) == first


def test_a_recipe_that_uses_a_file_has_its_meaning_in_the_key(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("answer = 42")
    notebook = Path(ablations.get("prediction_target").notebook)
    of = lambda: identity.key(identity.parts(notebook, {}, SMOKE.replace("uses", [str(mine)])))
    first = of()
    mine.write_text("answer = 42  # the same")
    assert of() == first
    mine.write_text("answer = 43")
    assert of() != first


def test_finished_runs_that_no_longer_count_are_named_before_they_are_trained_again(tmp_path, monkeypatch):
    toy = plan.pretend_ablation(tmp_path, "ok", "other")
    first, said = plan.plan(toy, seeds=2, out=tmp_path), []
    batch.run(first, prepare=None, say=said.append)
    assert not batch.outdated(first) and not any("no longer" in line for line in said)
    now = identity.libraries()
    monkeypatch.setattr(identity, "libraries", lambda: now | {"torch": "0.1"})
    [line] = batch.outdated(plan.plan(toy, seeds=2, out=tmp_path))
    assert line.startswith("4 finished runs no longer count and will be trained again") and "library torch was 2" in line and "is 0.1" in line


def test_a_run_on_other_data_does_not_go_on(prepared, tmp_path):
    from dataclasses import replace
    recipe = SMOKE.replace({"train.steps": 4, "train.checkpoint_every": 2})
    run = train(recipe, tmp_path, prepared=prepared, progress=False)
    assert run.record["data_key"] == data_key(prepared)
    pixels = prepared.images.pixels.copy()
    pixels[0, 0, 0, 0] ^= 1
    other = replace(prepared, images=replace(prepared.images, pixels=pixels))
    with pytest.raises(CheckpointError, match=f"{data_key(prepared)}.*{data_key(other)}"):
        train(recipe, tmp_path, prepared=other, progress=False)
