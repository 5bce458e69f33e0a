"The prx-nb command as a user meets it: real processes, exit codes, one line an error."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

PRX = str(Path(sys.executable).parent / "prx-nb")
ROOT = Path(__file__).parents[1]
SMALL = ["--set", "train.steps=4", "--set", "train.validate_every=4", "--set", "train.checkpoint_every=2"]


def prx(*arguments, timeout=300):
    done = subprocess.run([PRX, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", [[], ["data"], ["data", "pack"], ["ablate"], ["report"], ["sample"], ["export"]], ids=" ".join)
def test_help_teaches(command):
    code, out, _ = prx(*command, "--help")
    assert code == 0 and ("prx-nb" in out or "ablate" in out) and out.count("\n") > 8


def test_help_loads_nothing_heavy():
    script = """
import sys
from prx_nb.lab.cli import main
try: main(["ablate", "--help"])
except SystemExit as e: assert e.code == 0
heavy = {"torch", "numpy", "pandas", "papermill", "matplotlib", "transformers", "diffusers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words, arguments", {
    "no ablation 'predict'": ["ablate", "predict"],
    "no variant 'z'; there are v, x, eps": ["ablate", "prediction_target", "--variants", "v,z"],
    "no variants chosen": ["ablate", "prediction_target", "--variants", ","],
    "no preset 'huge'": ["ablate", "prediction_target", "--preset", "huge"],
    "did you mean 'train.steps'": ["ablate", "prediction_target", "--set", "train.step=3"],
    "'train.steps' = 'many'": ["ablate", "prediction_target", "--set", "train.steps=many"],
    "expected path=value": ["ablate", "prediction_target", "--set", "train.steps"],
    "is what the ablation 'prediction_target' sets itself": ["ablate", "prediction_target", "--set", "flow.prediction=x"],
    "seeds = 0": ["ablate", "prediction_target", "--seeds", "0"],
    "jobs = 0": ["ablate", "prediction_target", "--preset", "smoke", "--jobs", "0"],
    "nosuchcommand": ["nosuchcommand"],
    "no finished run in": ["report", "prediction_target", "--out", "nowhere"],
    "nowhere": ["sample", "nowhere", "--prompt", "a cat"],
    "recipe.json": ["export", "nowhere", "model"],
    "did you mean 'data.size'": ["data", "--set", "data.sise=64"],
}.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_one_line_and_code_2(words, arguments, tmp_path):
    code, out, err = prx(*arguments)
    assert code == 2 and words in err
    assert len([line for line in err.splitlines() if line.startswith("prx-nb:")]) <= 1


def test_what_is_missing_on_disk_is_said_before_any_run(tmp_path):
    base = ["ablate", "prediction_target", "--preset", "smoke", "--out", tmp_path / "out"]
    code, out, err = prx(*base, "--set", f"text.encoder={tmp_path}/no-encoder")
    assert code == 2 and "no-encoder" in err and "started" not in out
    code, out, err = prx(*base, "--set", "data.source=folder", "--set", f"data.path={tmp_path}/no-images")
    assert code == 2 and "no-images" in err and "started" not in out
    (tmp_path / "file").write_text("in the way")
    code, out, err = prx(*base[:-1], tmp_path / "file")
    assert code == 2 and "cannot write to the folder" in err and "started" not in out


def test_debug_shows_where():
    done = subprocess.run([PRX, "ablate", "predict", "--debug"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_data_is_described(tmp_path):
    code, out, _ = prx("data", "--preset", "smoke", "--picture", tmp_path / "look.png")
    assert code == 0 and "held out" in out and "caption, long" in out and "openmoji" in out
    assert Image.open(tmp_path / "look.png").width > 400


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    "An ablation at smoke size that was interrupted by Ctrl-C and then started again."
    out = tmp_path_factory.mktemp("swept")
    command = [PRX, "ablate", "prediction_target", "--preset", "smoke", "--seeds", "2", "--variants", "v,x", *SMALL, "--out", str(out), "--jobs", "2"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    lines = []
    for line in first.stdout:
        lines.append(line)
        if " done in " in line:
            time.sleep(1)
            first.send_signal(signal.SIGINT)
            break
    rest, err = first.communicate(timeout=60)
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    return out, (first.returncode, "".join(lines) + rest, err), (second.returncode, second.stdout, second.stderr)


@pytest.mark.slow
def test_an_interrupted_ablation_goes_on(swept):
    out, (code, said, err), (again, more, err2) = swept
    assert code == 130 and "The same command again does the rest" in said and "Traceback" not in err
    assert again == 0, more + err2
    done = int(said.split("the runs were stopped, ")[1].split(" of 4 are done")[0])
    assert done >= 1 and f"4 runs, {done} of them done already" in more and more.count(" started ") == 4 - done


@pytest.mark.slow
def test_the_ablation_leaves_all_its_files(swept):
    home = swept[0] / "prediction_target" / "smoke"
    for run in ("v-s0", "v-s1", "x-s0", "x-s1"):
        record = json.loads((home / run / "record.json").read_text())
        assert (record["variant"], record["seed"], record["ablation"]) == (run[:-3], int(run[-1]), "prediction_target")
        assert {"KID[effnet-lite0]", "val"} <= set(record["metrics"]) and record["cost"]["total_seconds"] > 0
        for name in ("recipe.json", "curves.parquet", "samples.png", "notebook.ipynb", "log.txt", "status.json"):
            assert (home / run / name).stat().st_size > 0, name
        assert len(list((home / run / "checkpoint").glob("step-*.safetensors"))) == 2
    rows = pd.read_csv(home / "report" / "table.csv")
    assert set(rows.variant) == {"v", "x"} and set(rows.seeds) == {2}
    for name in ("report.md", "report.html", "report.ipynb", "samples.png", "curves.png", "metrics.png"):
        assert (home / "report" / name).stat().st_size > 1000
    assert "KID[effnet-lite0]" in swept[2][1] and "report.html" in swept[2][1]


@pytest.mark.slow
def test_a_run_can_be_sampled_and_exported(swept, tmp_path):
    run = swept[0] / "prediction_target" / "smoke" / "x-s0"
    code, out, err = prx("sample", run, "--prompt", "noto on blue: red apple", "--prompt", "a cat", "--out", tmp_path / "a.png", "--steps", "2")
    assert code == 0 and Image.open(tmp_path / "a.png").size[0] >= 500, err
    code, out, err = prx("export", run, tmp_path / "model")
    assert code == 0 and (tmp_path / "model" / "model_index.json").exists(), err


@pytest.mark.slow
def test_publishing(swept):
    code, out, err = prx("report", "prediction_target", "--preset", "smoke", "--out", swept[0], "--publish")
    to = swept[0] / "published" / "prediction_target" / "smoke"
    assert code == 0 and (to / "table.csv").exists() and len(list((to / "records").iterdir())) == 4, err
    assert "openmoji" in (swept[0] / "published" / "NOTICE").read_text().lower()


def test_a_failed_run_is_exit_code_1(tmp_path):
    code, out, _ = prx("ablate", "prediction_target", "--preset", "smoke", "--seeds", 1, "--variants", "v", "--out", tmp_path, "--timeout", 1)
    assert code == 1 and "TIMEOUT" in out and "1 failed (v-s0)" in out
