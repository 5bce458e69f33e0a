"A reader's own technique and ablation, in a folder of their own, are run, killed, resumed, reported and sampled like ours."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.train import Run, train
from prx_nb.lab import ablations
from prx_nb.lab.ablations import AblationError

PRX = Path(sys.executable).with_name("prx-nb")

TECHNIQUE = '''#| export
from pydantic import Field
from torch import nn

from prx_nb.core.settings import Acts
from prx_nb.core.technique import Technique


class Settings(Acts):
    "Answers shall be small. `weight` 0: off."
    weight: float = Field(0.0, ge=0)
    power: int = 2


class Damp(Technique, name="damp", settings=Settings):
    "Adds the size of the answer, by a scale that is learnt."
    def __init__(self, weight, power):
        super().__init__()
        self.weight, self.power = weight, power
        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(1, 1).weight.data))

    @classmethod
    def of(cls, recipe, prepared, device="cpu", built=None):
        c = recipe.techniques.damp
        return cls(c.weight, c.power)

    def loss(self, step):
        return self.weight * (self.scale * step.output.prediction).abs().pow(self.power).mean()
'''
DECLARED = '''from prx_nb.lab.ablations import Ablation

ablation = Ablation("damped", "Do small answers help?", "plain", {"plain": {}, "damped": {"techniques.damp.weight": 0.1}},
                    base={"uses": ["tricks/damp.ipynb"], "train.steps": 6, "train.checkpoint_every": 2})
'''
PARAMETERS = "variant = 'damped'\nseed = 0\npreset = 'smoke'\noverrides = {}\nout = None"
BODY = '''import tempfile, time
from prx_nb.core import train
from prx_nb.core.batch import prepare
from prx_nb.lab import ablations, judge
begin = time.time()
recipe = ablations.recipe(ablation, variant, preset, seed, overrides)
prepared = prepare(recipe, progress=False)
run = train.train(recipe, out or tempfile.mkdtemp(), prepared=prepared, progress=False)
questions, images = judge.take(run, prepared)
measured = judge.judge(run, prepared, questions, images)
record = judge.complete(run, ablation, variant, preset, measured, begin, bounds=judge.bounds(prepared, recipe))
'''


def write(path, *cells):
    new = nbformat.v4
    made = [new.new_code_cell(source, metadata={"tags": [tag]} if tag else {}) for source, tag in cells]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new.new_notebook(cells=made, metadata={"kernelspec": kernel}), str(path))
    return path


def prx(folder, *args, code=0):
    done = subprocess.run([PRX, *map(str, args)], cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write(folder / "tricks" / "damp.ipynb", ("'a note that is not exported: it would fail here' / 1", ""), (TECHNIQUE, ""))
    write(folder / "mine.ipynb", (DECLARED, "ablation"), (PARAMETERS, "parameters"), (BODY, ""))
    return folder


@pytest.fixture(scope="module")
def done(folder):
    "Two seeds of both variants. The driver and its first run are killed, and the same command does the rest."
    command = [PRX, "ablate", "mine.ipynb", "--preset", "smoke", "--seeds", "2", "--jobs", "2"]
    driver = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    first = folder / "outputs/damped/smoke/plain-s0"
    until = time.monotonic() + 200
    while not list(first.glob("checkpoint/step-*")) and time.monotonic() < until and driver.poll() is None:
        time.sleep(0.02)
    said = json.loads((first / "status.json").read_text())
    driver.kill()
    driver.wait()
    if said["state"] == "running":
        os.kill(said["pid"], signal.SIGKILL)
    return prx(folder, *command[1:])


def test_both_variants_are_run_and_reported(folder, done):
    home = folder / "outputs/damped/smoke"
    records = {p.name: json.loads((p / "record.json").read_text()) for p in home.iterdir() if (p / "job.json").exists()}
    assert sorted(records) == ["damped-s0", "damped-s1", "plain-s0", "plain-s1"]
    assert all(r["status"] == "done" and r["ablation"] == "damped" for r in records.values())
    assert "Do small answers help?" in (home / "report/report.md").read_text()
    damped = Run.load(home / "damped-s0")
    assert damped.recipe.techniques.damp.weight == 0.1 and "loss Damp" in set(damped.curves.name)
    assert damped.recipe.uses == (str(folder / "tricks/damp.ipynb"),)


def test_it_counts_as_done_and_is_seen_by_status_retry_and_sample(folder, done):
    again = prx(folder, "ablate", folder / "mine.ipynb", "--preset", "smoke", "--seeds", "2", "--no-report")
    assert "4 runs, 4 of them done already" in again
    assert "damped" in prx(folder, "status") and "nothing" in prx(folder, "retry").lower()
    prx(folder, "sample", "outputs/damped/smoke/damped-s0", "--prompt", "red apple", "--out", "apple.png")
    assert (folder / "apple.png").stat().st_size > 100


def test_a_misspelt_setting_is_named(folder):
    said = prx(folder, "ablate", "mine.ipynb", "--preset", "smoke", "--set", "techniques.damp.powr=3", code=2)
    assert "did you mean 'techniques.damp.power'" in said


def test_a_sweep_names_it_by_a_path_beside_the_file(folder):
    (folder / "sweep.yaml").write_text("runs:\n- ablation: mine.ipynb\n  preset: smoke\n  grid: {techniques.damp.power: [1, 2]}\n")
    said = prx(folder, "ablate", "sweep.yaml", "--dry-run")
    assert "damped" in said and "power=1" in said


def test_two_processes_know_it(folder, tmp_path):
    recipe = preset("smoke").replace({"uses": [str(folder / "tricks/damp.ipynb")], "techniques.damp.weight": 0.1,
                                      "train.steps": 3, "train.processes": 2})
    run = train(recipe, tmp_path, progress=False, device="cpu")
    assert run.record["status"] == "done" and len(run.curves[run.curves.name == "loss Damp"]) == 3


def test_what_cannot_be_found_is_one_line(folder, tmp_path):
    with pytest.raises(RecipeError, match="recipe.uses names '.*no_such.py', which cannot be imported"):
        preset("smoke").replace("uses", [str(tmp_path / "no_such.py")])
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match="broken.py', which cannot be imported: ZeroDivisionError"):
        preset("smoke").replace("uses", [str(tmp_path / "broken.py")])
    with pytest.raises(RecipeError, match="another module|there is a technique 'tread' already"):
        (tmp_path / "theirs.py").write_text(TECHNIQUE.replace('name="damp"', 'name="tread"').removeprefix("#| export\n"))
        preset("smoke").replace({"techniques.tread.rate": 0.5}).replace("uses", [str(tmp_path / "theirs.py")])
    write(tmp_path / "tread.ipynb", (DECLARED.replace('"damped", "Do', '"tread", "Do').replace('"uses": ["tricks/damp.ipynb"], ', ""), "ablation"))
    with pytest.raises(AblationError, match="give it another name"):
        ablations.get(str(tmp_path / "tread.ipynb"))
