"Paths of a reader's own ablation: the folder in which the command was given, in every process, and when it goes on."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from test_own_data import folder

from prx_nb.lab import plan, watch

DECLARED = '''from prx_nb.lab.ablations import Ablation
ablation = Ablation("mine", "Which pictures?", "few", {"few": {"data.path": "pics"}, "more": {"data.path": "./others/pics"}},
                    base={"data.source": "folder", "data.size": 16, "data.limit": None, "data.holdout_concepts": 0.3, "train.steps": 4})'''
PARAMETERS = "variant = 'few'\nseed = 0\npreset = 'smoke'\noverrides = {}\nout = None"
BODY = '''import json, os, pathlib
from prx_nb.core import data
from prx_nb.lab import ablations
recipe = ablations.recipe(ablation, variant, preset, seed, overrides)
found = len(data.load(recipe.data, progress=False))
record = {"status": "done", "metrics": {"KID[toy]": float(found)}, "path": recipe.data.path, "key": recipe.key, "cwd": os.getcwd()}
(pathlib.Path(out) / "record.json").write_text(json.dumps(record))
'''


def written(path):
    new = nbformat.v4
    cells = [new.new_code_cell(s, metadata={"tags": [tag]} if tag else {})
             for s, tag in ((DECLARED, "ablation"), (PARAMETERS, "parameters"), (BODY, ""))]
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": kernel}), str(path))
    return path


def prx(cwd, *args):
    done = subprocess.run([str(Path(sys.executable).with_name("prx-nb")), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder to call from, with two folders of pictures and, elsewhere, the notebook."
    folder(tmp_path / "home" / "pics", 6)
    folder(tmp_path / "home" / "others" / "pics", 9)
    folder(tmp_path / "home" / "books" / "pics", 3)                 # beside the notebook: not what is meant
    written(tmp_path / "home" / "books" / "mine.ipynb")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_every_process_finds_the_same_folder(here):
    prx(here, "ablate", "books/mine.ipynb", "--preset", "smoke", "--seeds", "1", "--no-report", "--out", "runs")
    for name, path, count in (("few", here / "pics", 6), ("more", here / "others" / "pics", 9)):
        run = here / "runs" / "mine" / "smoke" / f"{name}-s0"
        record, job = (json.loads((run / f"{n}.json").read_text()) for n in ("record", "job"))
        assert record["path"] == job["recipe"]["data"]["path"] == str(path) and record["metrics"]["KID[toy]"] == count
        assert record["cwd"] == str(run) and job["home"] == str(here)


def test_the_same_command_elsewhere_is_another_plan_but_a_retry_is_not(here, tmp_path, monkeypatch):
    jobs = plan.plan("books/mine.ipynb", "smoke", 1, out="runs")
    for job in jobs:
        Path(job.out).mkdir(parents=True)
        (Path(job.out) / "job.json").write_text(json.dumps(vars(job)))
    monkeypatch.chdir(here / "books")
    assert watch.replan([job.out for job in jobs]) == jobs
    other, _ = plan.plan("mine.ipynb", "smoke", 1, out="runs")
    assert other.recipe["data"]["path"] == str(here / "books" / "pics") and other.key != jobs[0].key


def test_a_teacher_in_a_folder_is_meant_as_it_stands_there_too(here):
    toy = plan.pretend_ablation(here, "a")
    os.mkdir("eye")
    changed = {"techniques.perceptual.encoder": "./eye", "text.encoder": "static", "latents.autoencoder": "owner/name", "latents.channels": 4,
               "denoiser.in_channels": 4}
    [job] = plan.plan(toy, "smoke", 1, overrides=changed, out="o")
    assert job.overrides["techniques.perceptual.encoder"] == str(here / "eye")
    assert (job.overrides["text.encoder"], job.overrides["latents.autoencoder"]) == ("static", "owner/name"), "names stay names"
