"The prx-nb command as a user meets it: real processes, exit codes, one line an error."
import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from PIL import Image
from slurm import slurm  # noqa: F401  (a fixture)

from prx_nb.lab import cli, watch

PRX = str(Path(sys.executable).parent / "prx-nb")
ROOT = Path(__file__).parents[1]
SMALL = ["--set", "train.steps=4", "--set", "train.validate_every=4", "--set", "train.checkpoint_every=2"]


def prx(*arguments, timeout=300):
    done = subprocess.run([PRX, *(a if isinstance(a, bytes) else str(a) for a in arguments)], capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


COMMANDS = [[], ["data"], ["data", "pack"], ["ablate"], ["status"], ["retry"], ["clean"], ["report"], ["sample"], ["export"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches(command):
    code, out, _ = prx(*command, "--help")
    assert code == 0 and ("prx-nb" in out or "ablate" in out) and out.count("\n") > 8
    assert max(map(len, out.splitlines())) <= 80


def test_every_example_in_the_help_is_a_command_that_exists():
    import typer.main

    from prx_nb.lab.cli import app
    top = typer.main.get_command(app)
    seen = 0
    for name in COMMANDS:
        text = prx(*name, "--help")[1].replace("\\\n", " ")
        for line in re.findall(r"^ +prx-nb (.*?)(?:   .*)?$", text, re.M):
            words = shlex.split(line)
            command = top.commands[words[0]]
            if words[1:] and words[1] in getattr(command, "commands", {}):
                command, words = command.commands[words[1]], words[1:]
            options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            assert {w for w in words if w.startswith("--")} <= options, line
            seen += 1
    assert seen > 20


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
    "expected how many, e.g. 3": ["ablate", "prediction_target", "--seeds", "some"],
    "--executor cloud: expected local or slurm": ["ablate", "prediction_target", "--executor", "cloud"],
    "nowhere.yaml: No such file": ["ablate", "nowhere.yaml"],
    "--seeds: a sweep file says that itself": ["ablate", "sweeps/weekend.yaml", "--seeds", "3"],
    "no ablation 'prediction_targets'": ["ablate", "caption_length", "prediction_targets"],
    "timeout = -1": ["ablate", "prediction_target", "--timeout", "-1"],
    "no folder nowhere": ["status", "nowhere"],
    "no state 'time out' to repeat": ["retry", "sweeps", "--only", "time out"],
    "no folder nothing and none in outputs": ["clean", "nothing"],
    "--out '': expected the name of a folder": ["ablate", "prediction_target", "--preset", "smoke", "--dry-run", "--out", ""],
    "--out /: that is the whole disk": ["ablate", "prediction_target", "--preset", "smoke", "--dry-run", "--out", "/"],
    "--out //: that is the whole disk": ["status", "--out", "//"],
    "the folder /: that is the whole disk": ["clean", "/", "--dry-run"],
    "--out /..: that is the whole disk": ["clean", "--dry-run", "--out", "/.."],
    "'a caf\\\\xe9', the 1. one: sign 6 is not UTF-8": ["sample", "nowhere", "--prompt", b"a caf\xe9"],
    "no preset 'huge'": ["ablate", "prediction_target", "--preset", "huge"],
    "did you mean 'train.steps'": ["ablate", "prediction_target", "--set", "train.step=3"],
    "'train.steps' = 'many'": ["ablate", "prediction_target", "--set", "train.steps=many"],
    "expected path=value": ["ablate", "prediction_target", "--set", "train.steps"],
    "is what the ablation 'prediction_target' sets itself": ["ablate", "prediction_target", "--set", "flow.prediction=x"],
    "seeds = 0": ["ablate", "prediction_target", "--seeds", "0"],
    "Invalid value for '--jobs'": ["ablate", "prediction_target", "--preset", "smoke", "--jobs", "0"],
    "nosuchcommand": ["nosuchcommand"],
    "no finished run in": ["report", "prediction_target", "--out", "nowhere"],
    "nowhere": ["sample", "nowhere", "--prompt", "a cat"],
    "recipe.json": ["export", "nowhere", "model"],
    "did you mean 'data.size'": ["data", "--set", "data.sise=64"],
}.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_one_line_and_code_2(words, arguments, tmp_path):
    code, out, err = prx(*arguments)
    assert code == 2 and words in err, out + err
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
    assert code == 1 and "TIMEOUT" in out and "1 failed (v-s0 timeout)" in out


# --- many runs: a toy ablation whose notebook trains nothing, by real processes and kernels

TOY = """
import json, os, pathlib, time
folder = pathlib.Path(out)
if variant == "raises" and not (folder.parents[2] / "mended").exists(): raise RuntimeError("on purpose")
if variant == "slow":
    for step in range(1, 1000):
        (folder / ".progress").write_text(json.dumps({"step": step, "steps": 1000, "seconds": 0.1 * step, "at": time.time()}))
        (folder / ".progress").rename(folder / "progress.json")
        time.sleep(0.1)
        if (folder.parents[2] / "go").exists(): break
(folder / "record.json").write_text(json.dumps({"status": "done", "metrics": {"KID[toy]": 0.5}}))
"""

PROGRAM = """
import functools, sys
from prx_nb.lab import cli
if sys.argv[2] in ("ablate", "retry"):
    from prx_nb.lab import ablations, batch, plan, slurm
    toy = plan.pretend_ablation(sys.argv[1], "ok", "slow", "raises", body=open(sys.argv[1] + "/body.py").read())
    real, ablations.names = ablations.names, lambda: [*real(), "toy"]
    find = ablations.find
    ablations.find = lambda name: toy if name == "toy" else find(name)
    batch.run, slurm.submit = functools.partial(batch.run, prepare=None), functools.partial(slurm.submit, prepare=None)
cli.main(sys.argv[2:])
"""


@pytest.fixture
def toy(tmp_path):
    "prx-nb, in a process, with one more ablation; its output goes to `tmp_path`/out."
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "body.py").write_text(TOY)
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "lib"), *map(str, arguments), "--out", str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        started.append(process)
        return process

    def call(*arguments, timeout=180):
        process = start(*arguments)
        out, err = process.communicate(timeout=timeout)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    call.start = start
    yield call
    for row in watch.survey(tmp_path / "out"):
        with contextlib.suppress(OSError, psutil.Error, ValueError, KeyError):
            said = json.loads((Path(row.folder) / "status.json").read_text())
            if row.state == "running":
                os.kill(said["pid"], signal.SIGTERM)
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
    return found


def files(top):
    return {p.relative_to(top).as_posix(): p.stat().st_mtime_ns for p in sorted(Path(top).rglob("*"))}


@pytest.mark.parametrize("what", [["prediction_target", "caption_length", "--preset", "smoke"], ["sweep.yaml"], ["sweep.toml", "--jobs", "3"]], ids=lambda w: w[0])
def test_a_dry_run_says_all_and_writes_nothing(tmp_path, what):
    (tmp_path / "sweep.yaml").write_text("runs: [{ablation: prediction_target, preset: cpu, grid: {optimizer.lr: [1e-3, 2e-3]}}]")
    (tmp_path / "sweep.toml").write_text('[[runs]]\nablation = "null_check"\npreset = "smoke"\nseeds = [4, 5]\n')
    before = files(tmp_path)
    done = subprocess.run([PRX, "ablate", *what, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and files(tmp_path) == before, done.stderr
    assert "0 done already" in done.stdout and "time: " in done.stdout and "started" not in done.stdout
    if what == ["sweep.yaml"]:
        assert "prediction_target/cpu@optimizer.lr=0.001: 6 runs, 0 done\n    v, x, eps with seeds 0, 1" in done.stdout
        assert "12 runs in outputs: 0 done already, 12 to be run" in done.stdout and "judged by published runs" in done.stdout


def test_every_fault_of_a_sweep_file_is_a_line_and_nothing_is_run(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("sedes: 3\nruns: [{ablation: predict}, {ablation: null_check, seeds: 0, variants: [c]}]")
    code, out, err = prx("ablate", path, "--out", tmp_path / "out")
    assert code == 2 and out == "" and len(err.splitlines()) == 4 and all(line.startswith(f"prx-nb: {path}: ") for line in err.splitlines())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_is_watched_cleaned_around_and_repeated(toy, tmp_path):
    """Status while it runs; clean leaves what runs alone; what failed is repeated; and nothing that is done is done again."""
    home = tmp_path / "out" / "toy" / "smoke"
    command = ["ablate", "toy", "--preset", "smoke", "--seeds", "1", "--jobs", "2", "--no-report"]
    sweep = toy.start(*command)
    state = lambda name: (json.loads(p.read_text())["state"] if (p := home / name / "status.json").exists() else None)
    wait_for(lambda: state("ok-s0") == "done" and state("raises-s0") == "cell error" and (home / "slow-s0" / "progress.json").exists())

    rows = {row["run"]: row for row in json.loads(toy("status", "--json")[1])}
    assert (rows["ok-s0"]["stage"], rows["raises-s0"]["stage"], rows["slow-s0"]["state"]) == ("done", "failed", "running")
    assert rows["slow-s0"]["steps"] == 1000 and rows["slow-s0"]["step"] >= 1 and rows["slow-s0"]["eta"] > 10
    code, out, _ = toy("status", "toy")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "KID[toy] 0.5" in out and "RuntimeError: on purpose" in out
    assert re.search(r"slow-s0 +running +\d+/1000 +.* left", out) and "3 runs: 1 done, 1 running, 1 failed" in out

    (home / "slow-s0" / ".half.1.part").write_text("being written")
    (home / "ok-s0" / ".half.1.part").write_text("nobody's")
    code, out, _ = toy("clean", "--failed", "--checkpoints")
    assert code == 0 and "freed" in out and "slow-s0: at work" in out and "its failed runs stay" in out
    assert (home / "slow-s0" / ".half.1.part").exists() and not (home / "ok-s0" / ".half.1.part").exists() and (home / "raises-s0").exists()
    code, _, err = toy("retry")
    assert code == 2 and "another prx-nb is at work" in err

    (tmp_path / "out" / "go").touch()
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 1 and "2 done, 1 failed (raises-s0 cell error)" in out, out + err
    done = (home / "ok-s0" / "notebook.ipynb").stat().st_mtime_ns

    code, out, _ = toy(*command)
    assert code == 1 and "failed before and nothing has changed" in out and "prx-nb retry" in out, "the same again is not tried"
    code, out, _ = toy("retry", "--dry-run")
    assert code == 0 and "toy/smoke/raises-s0: cell error" in out and "toy/smoke: 1 runs, 0 done" in out
    assert toy("retry", "--only", "timeout")[1].startswith("nothing to repeat")
    assert toy("retry", "--no-report")[0] == 1, "still broken"
    (tmp_path / "out" / "mended").touch()
    code, out, _ = toy("retry", "--no-report")
    assert code == 0 and "1 runs: 1 done" in out, out + str(sorted(p.name for p in home.iterdir()))
    [row] = [row for row in json.loads(toy("status", "--json")[1]) if row["run"] == "raises-s0"]
    assert (row["state"], row["attempt"]) == ("done", 3)
    assert toy("retry")[1].startswith("nothing to repeat: no run has failed")
    assert (home / "ok-s0" / "notebook.ipynb").stat().st_mtime_ns == done


@pytest.mark.slow
def test_the_driver_is_killed_and_the_next_one_goes_on(toy, tmp_path):
    command = ["ablate", "toy", "--preset", "smoke", "--seeds", "2", "--variants", "slow", "--jobs", "1", "--no-report"]
    first = toy.start(*command)
    home = tmp_path / "out" / "toy" / "smoke"
    wait_for(lambda: (home / "slow-s0" / "progress.json").exists())
    first.kill()
    first.wait()
    rows = {row["run"]: row for row in json.loads(toy("status", "--json")[1])}
    assert rows["slow-s0"]["state"] == "running", "a run outlives its driver"
    assert rows["slow-s1"]["state"] == "queued" and "no driver is at work" in rows["slow-s1"]["cause"]
    before = {p: v for p, v in files(home / "slow-s0").items() if not p.startswith(("progress", "status", "log"))}
    assert "at work" in toy("clean", "--failed", "--checkpoints")[1]
    assert {p: v for p, v in files(home / "slow-s0").items() if p in before} == before
    second = toy.start(*command)
    for line in second.stdout:
        if "adopted" in line:
            break
    (tmp_path / "out" / "go").touch()
    second.communicate(timeout=90)
    assert second.returncode == 0
    assert [row["attempt"] for row in json.loads(toy("status", "--json")[1])] == [1, 1]


@pytest.mark.slow
def test_an_interrupted_sweep_exits_130(toy, tmp_path):
    sweep = toy.start("ablate", "toy", "--preset", "smoke", "--seeds", "1", "--variants", "slow", "--no-report")
    wait_for(lambda: (tmp_path / "out" / "toy" / "smoke" / "slow-s0" / "progress.json").exists())
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130 and "The same command again does the rest" in out and "Traceback" not in err
    assert "interrupted" in toy("status")[1]


@pytest.mark.slow
def test_runs_are_handed_in_to_slurm_watched_and_waited_for(slurm, toy, tmp_path):  # noqa: F811
    command = ["ablate", "toy", "--preset", "smoke", "--seeds", "1", "--executor", "slurm", "--partition", "steady", "--time", "5", "--no-report"]
    code, out, err = toy(*command, "--jobs", "1")
    assert code == 0 and "3 runs handed in to partition 'steady'" in out and "prx-nb status --watch" in out, out + err
    wait_for(lambda: (tmp_path / "out" / "toy" / "smoke" / "slow-s0" / "progress.json").exists())
    rows = {row["run"]: row for row in json.loads(toy("status", "--json")[1])}
    assert rows["slow-s0"]["state"] == "running" and re.fullmatch(r"slurm \d+_\d pending", rows["raises-s0"]["cause"]), rows
    assert "at work" in toy("clean", "--failed")[1]
    (tmp_path / "out" / "go").touch()
    code, out, err = toy(*command, "--wait")
    assert code == 1 and "raises-s0 CELL ERROR" in out, out + err
    (tmp_path / "out" / "mended").touch()
    code, out, err = toy("retry", "--executor", "slurm", "--partition", "steady", "--time", "5", "--wait", "--no-report")
    assert code == 0 and "1 runs handed in" in out, out + err
    assert [row["state"] for row in json.loads(toy("status", "--json")[1])] == ["done"] * 3
    code, out, _ = toy("ablate", "toy", "--preset", "smoke", "--seeds", "1", "--executor", "slurm", "--partition", "nowhere")
    assert code == 2


def test_status_on_a_terminal_has_colours_and_watches_to_the_end(tmp_path):
    top = watch.pretend_runs(tmp_path)                             # the one at work is this very process
    at_work = top / "prediction_target" / "cpu" / "v-s1" / "status.json"
    leader, follower = pty.openpty()
    process = subprocess.Popen([PRX, "status", "--watch", "--out", str(top)], stdout=follower, stderr=follower, stdin=follower,
                               env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}, cwd=ROOT)
    os.close(follower)
    said = b""
    while b"left" not in said:
        said += os.read(leader, 65536)
    at_work.write_text(json.dumps({"state": "done", "seconds": 5}))
    (at_work.parent / "record.json").write_text(json.dumps({"status": "done", "metrics": {"KID[late]": 0.25}}))
    with contextlib.suppress(OSError):                             # the end of a terminal is an error on Linux
        while more := os.read(leader, 65536):
            said += more
    os.close(leader)
    assert process.wait(30) == 0, "it ends by itself: the queued run has no driver"
    assert b"\x1b[36m" in said and b"\x1b[31m" in said and b"KID[late] 0.25" in said


def test_status_of_nothing():
    code, out, _ = prx("status", "sweeps")
    assert code == 0 and out.startswith("no runs in")


def test_runs_land_in_the_checkouts_outputs_from_any_of_its_folders(tmp_path, monkeypatch, capsys):
    home = tmp_path / "checkout"
    (home / "nbs" / "core").mkdir(parents=True)
    (home / "settings.ini").touch()
    monkeypatch.chdir(home / "nbs" / "core")
    monkeypatch.delenv("PRX_NB_OUT", raising=False)
    pretend = watch.pretend_runs(home / "outputs")

    def said(*words):
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        return end.value.code, *capsys.readouterr()

    (home / "sweep.yaml").write_text("runs: [{ablation: prediction_target, preset: smoke, seeds: 1}]")
    for words in (["prediction_target", "--preset", "smoke", "--seeds", "1"], ["../../sweep.yaml"]):
        code, out, err = said("ablate", *words, "--dry-run")
        assert code == 0 and f"3 runs in {home / 'outputs'}: " in out, out + err
    folders = lambda *words: [row["folder"] for row in json.loads(said("status", "--json", *words)[1])]
    every = folders("--out", pretend)
    for words in ([], ["prediction_target"], ["outputs/prediction_target"]):
        assert folders(*words) == every != []
    assert not (home / "nbs" / "core" / "outputs").exists()
    monkeypatch.setenv("PRX_NB_OUT", str(tmp_path / "none"))
    assert f"3 runs in {tmp_path / 'none'}: " in said("ablate", "prediction_target", "--preset", "smoke", "--seeds", "1", "--dry-run")[1]
