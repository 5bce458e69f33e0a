"Plans: what decides a run's key, where runs go, and what is refused before anything is written."
import json
from dataclasses import asdict

import nbformat
import pytest
from toys import BODY, toy

from prx_nb.core.files import write_json
from prx_nb.core.recipe import RecipeError
from prx_nb.lab import identity
from prx_nb.lab import plan as plan_module
from prx_nb.lab.ablations import AblationError
from prx_nb.lab.plan import plan, read_job


def test_what_decides_the_result_decides_the_key(tmp_path, monkeypatch):
    ablation = toy(tmp_path, "ok")
    key = lambda **kw: plan(ablation, out=kw.pop("out", tmp_path), **kw)[0].key
    same = key()
    assert key(out=tmp_path / "elsewhere") == same and key(label="somewhere") == same
    assert key(timeout=3, cell_timeout=2) == same, "limits do not decide a result"
    nb = nbformat.read(tmp_path / "toy.ipynb", 4)
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(nb, str(tmp_path / "toy.ipynb"))
    assert key() == same, "outputs do not decide"
    assert key(overrides={"train.steps": 3}) != same and key(preset="cpu") != same and key(seeds=[1]) != same
    with monkeypatch.context() as m:
        m.setattr(identity, "libraries", lambda: {"torch": "0.1"})
        assert key() != same
    toy(tmp_path, "ok", body=BODY + "\n# a comment")
    assert key() == same, "a comment does not decide"
    toy(tmp_path, "ok", body=BODY + "\nchanged = 1")
    assert key() != same


def test_plans_go_seed_by_seed_and_points_have_homes_of_their_own(tmp_path):
    a = toy(tmp_path, "ok", "other", "third")
    jobs = plan(a, seeds=2, variants=["ok", "third", "ok"], out=tmp_path)
    assert [j.name for j in jobs] == ["ok-s0", "third-s0", "ok-s1", "third-s1"]
    assert {j.group for j in jobs} == {tmp_path / "toy" / "smoke"}
    [point] = plan(a, seeds=[7], variants=["ok"], out=tmp_path, overrides={"train.steps": 3}, label="steps=3")
    assert point.out == str(tmp_path / "toy" / "smoke@steps=3" / "ok-s7") and point.recipe["train"]["steps"] == 3
    assert point.parameters == {"variant": "ok", "seed": 7, "preset": "smoke", "overrides": {"train.steps": 3}, "out": point.out}


@pytest.mark.parametrize("message, choice", [
    ("no variant 'okay'; there is ok", dict(variants=["okay"])),
    ("no variants chosen", dict(variants=[])),
    ("no preset 'tpu'", dict(preset="tpu")),
    ("no field 'train.step'; did you mean 'train.steps'", dict(overrides={"train.step": 3})),
    ("train.steps' = -1", dict(overrides={"train.steps": -1})),
    ("is what the ablation 'toy' sets itself", dict(overrides={"flow.clamp": 0.1})),
    ("seeds = 0", dict(seeds=0)), ("seeds = \\[\\]", dict(seeds=[])), ("seeds = \\[0, -1\\]", dict(seeds=[0, -1])),
    ("timeout = 0", dict(timeout=0)), ("cell_timeout = nan", dict(cell_timeout=float("nan"))),
])
def test_bad_choices_are_refused(tmp_path, message, choice):
    with pytest.raises((AblationError, RecipeError), match=message):
        plan(toy(tmp_path, "ok"), out=tmp_path / "out", **choice)
    assert not (tmp_path / "out").exists()


def test_bad_notebooks_are_refused(tmp_path):
    with pytest.raises(AblationError, match="no ablation 'predict'"):
        plan("predict", out=tmp_path)
    a = toy(tmp_path, "ok")
    other = "variant, seed = 1, 2\npreset = 3\noverrides = 4\nvariant = 5\nseed = 6"
    for message, change in {"0 cells tagged": lambda cells: cells[1]["metadata"].update(tags=[]),
                            "2 cells tagged": lambda cells: cells.insert(1, cells[1]),
                            "does not know 'out'": lambda cells: cells[1].update(source=other)}.items():
        nb = json.loads((tmp_path / "toy.ipynb").read_text())
        change(nb["cells"])
        (tmp_path / "bad.ipynb").write_text(json.dumps(nb))
        with pytest.raises(AblationError, match=message):
            plan_module.check_parameters(tmp_path / "bad.ipynb", ["variant", "seed", "preset", "overrides", "out"])
    (tmp_path / "toy.ipynb").write_text("not a notebook")
    with pytest.raises(AblationError, match="not a notebook"):
        plan(a, out=tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"ablation": "toy"}', '{"surprise": 1}'])
def test_a_file_that_is_no_job_is_said_to_be_none(tmp_path, text):
    [job] = plan(toy(tmp_path, "ok"), out=tmp_path)
    write_json(tmp_path / "job.json", asdict(job))
    assert read_job(tmp_path / "job.json") == job
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(AblationError, match="job.json is no job"):
        read_job(tmp_path / "job.json")
