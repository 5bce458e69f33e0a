"The batch runner with real processes and kernels: how runs end, what an interrupted sweep leaves, what is run again."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from prx_nb.lab import batch
from prx_nb.lab.ablations import Ablation, AblationError

SOURCE_HASH = batch.source_hash
BODY = """
import json, os, pathlib, sys, time
folder = pathlib.Path(out)
begin = time.time()
print("hello from", variant, seed, flush=True)
(folder / "pid").write_text(str(os.getpid()))
if variant == "raises": raise RuntimeError("on purpose")
if variant == "dies": os._exit(9)
if variant == "hangs": time.sleep(1000)
if variant == "slow": time.sleep(1.5)
if variant != "silent":
    (folder / "record.json").write_text(json.dumps({"status": "done", "metrics": {"FD[toy]": 2.0, "KID[toy]": 0.5},
        "begin": begin, "end": time.time(), "threads": os.environ["OMP_NUM_THREADS"], "overrides": overrides}))
"""


def write_toy(folder, body=BODY, tags=("parameters",),
              parameters="variant, seed, preset, overrides, out = 'ok', 0, 'smoke', {}, None", twice=False):
    "A notebook in `folder`; each parameter on a line of its own, as papermill's inspection wants it."
    names, values = (side.split(",") for side in parameters.split("="))
    text = "\n".join(f"{n.strip()} = {v.strip()}" for n, v in zip(names, values))
    new = nbformat.v4
    first = [new.new_code_cell(text, metadata={"tags": list(tags)}) for _ in range(1 + twice)]
    nb = new.new_notebook(cells=[*first, new.new_code_cell(body)],
                          metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, str(folder / "toy.ipynb"))


def toy(folder, *variants):
    return Ablation("toy", str(folder / "toy.ipynb"), "?", variants[0],
                    {v: {"flow.clamp": 0.05 + i / 100} for i, v in enumerate(variants)})


@pytest.fixture(autouse=True)
def steady_source(monkeypatch):
    "The package's source is not the subject here, and may be edited while the tests run."
    monkeypatch.setattr(batch, "source_hash", lambda: "source")


def states(jobs):
    return {j.name: batch.status(j.out).get("state") for j in jobs}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_every_way_to_end_is_told_apart(tmp_path):
    write_toy(tmp_path)
    jobs = batch.plan(toy(tmp_path, "hangs", "ok", "raises", "dies", "silent"), overrides={"train.steps": 7}, out=tmp_path)
    lines = []
    batch.run(jobs[:1], timeout=8, prepare=None, say=lines.append)
    batch.run(jobs[1:], at_once=2, timeout=200, prepare=None, say=lines.append)
    said = [batch.status(job.out) for job in jobs]
    assert states(jobs) == {"ok-s0": "done", "raises-s0": "error", "dies-s0": "dead kernel", "hangs-s0": "timeout", "silent-s0": "error"}
    assert said[2]["error"] == "RuntimeError: on purpose" and said[2]["cell"] == 2
    assert "no finished record.json" in said[4]["error"]
    assert batch.record(jobs[1].out)["overrides"] == {"train.steps": 7}
    for job in jobs:
        folder = Path(job.out)
        said_hello = f"hello from {job.variant} 0" in (folder / "log.txt").read_text()
        assert said_hello or job.variant in ("dies", "hangs"), "a kernel that exits may take its last words with it"
        assert not (folder / "pid").exists() or gone(int((folder / "pid").read_text())), "no kernel is left"
        assert not Path(batch.status(folder)["scratch"]).exists(), "no socket folder is left"
        tags = [tag for cell in nbformat.read(folder / "notebook.ipynb", 4).cells for tag in cell.metadata.get("tags", [])]
        assert "injected-parameters" in tags
    text = "\n".join(lines)
    assert "KID[toy] 0.5" in text and "TIMEOUT" in text and "DEAD KERNEL" in text
    assert "4 runs: 1 done, 3 failed" in lines[-1]


@pytest.mark.parametrize("at_once", [1, 2])
def test_jobs_run_side_by_side_and_share_the_cores(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(batch, "cores", lambda: 6)
    write_toy(tmp_path)
    jobs = batch.plan(toy(tmp_path, "slow"), seeds=2, out=tmp_path)
    batch.run(jobs, at_once=at_once, timeout=200, prepare=None, say=lambda line: None)
    records = [batch.record(j.out) for j in jobs]
    overlap = max(sum(r["begin"] <= t["begin"] < r["end"] for r in records) for t in records)
    assert overlap <= at_once and all(r["threads"] == str(6 // at_once) for r in records)
    assert at_once == 1 or overlap == 2


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_batch import batch, toy
batch.source_hash = lambda: "source"
folder = Path(sys.argv[1])
try: batch.run(batch.plan(toy(folder, *sys.argv[2:]), out=folder), at_once=2, timeout=100, prepare=None, say=lambda s: print(s, flush=True))
except KeyboardInterrupt: sys.exit(130)
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_driver_leaves_no_strays_and_the_next_does_the_rest(tmp_path, sign):
    write_toy(tmp_path)
    jobs = batch.plan(toy(tmp_path, "ok", "hangs", "raises"), out=tmp_path)
    script = DRIVER.format(tests=str(Path(__file__).parent))
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "ok", "hangs"], stdout=subprocess.PIPE, text=True)
    hang = Path(jobs[1].out)
    wait_for(lambda: states(jobs)["ok-s0"] == "done" and (hang / "pid").exists() and (hang / "pid").read_text())
    kernel, runner = int((hang / "pid").read_text()), batch.status(hang)["pid"]
    driver.send_signal(sign)
    output = driver.communicate(timeout=30)[0]
    assert driver.returncode == (-signal.SIGKILL if sign == signal.SIGKILL else 130)
    wait_for(lambda: gone(kernel) and gone(runner), 15)
    assert states(jobs)["hangs-s0"] == "interrupted"
    if sign != signal.SIGKILL:
        assert "1 of 2 are done. The same command again does the rest." in output
    write_toy(tmp_path)                                            # the same source: the finished run stays
    before = (Path(jobs[0].out) / "notebook.ipynb").stat().st_mtime_ns
    lines = []
    batch.run(jobs[:2], timeout=2, prepare=None, say=lines.append)
    assert "2 runs, 1 of them done already" in lines[0] and "[2/2] hangs-s0 started" in lines[1]
    assert (Path(jobs[0].out) / "notebook.ipynb").stat().st_mtime_ns == before


def test_a_run_whose_process_is_killed_is_said_to_be_killed(tmp_path):
    write_toy(tmp_path)
    [job] = batch.plan(toy(tmp_path, "hangs"), out=tmp_path)
    lines, pids = [], {}

    def prepare(recipes, say):
        import threading
        def kill():
            pid = Path(job.out) / "pid"
            wait_for(lambda: pid.exists() and pid.read_text())
            pids["kernel"] = int(pid.read_text())
            os.kill(batch.status(job.out)["pid"], signal.SIGKILL)
        threading.Thread(target=kill, daemon=True).start()

    [said] = batch.run([job], timeout=200, prepare=prepare, say=lines.append)
    assert said["state"] == "killed" and "SIGKILL" in said["error"]
    wait_for(lambda: gone(pids["kernel"]), 20)


def test_what_decides_the_result_decides_the_key(tmp_path):
    write_toy(tmp_path)
    plan = lambda **kw: batch.plan(toy(tmp_path, "ok"), out=kw.pop("out", tmp_path), **kw)[0].key
    same = plan()
    assert plan(out=tmp_path / "elsewhere") == same
    nb = nbformat.read(tmp_path / "toy.ipynb", 4)
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(nb, str(tmp_path / "toy.ipynb"))
    assert plan() == same, "outputs do not decide"
    assert plan(overrides={"train.steps": 3}) != same and plan(preset="cpu") != same
    write_toy(tmp_path, BODY + "\n# changed")
    assert plan() != same
    source = tmp_path / "package"
    (source / "lab").mkdir(parents=True)
    (source / "a.py").write_text("1")
    (source / "lab" / "report.py").write_text("2")
    first = SOURCE_HASH(source)
    (source / "lab" / "report.py").write_text("3")
    assert SOURCE_HASH(source) == first, "the report is not part of a run"
    (source / "a.py").write_text("4")
    assert SOURCE_HASH(source) != first


def test_what_an_older_version_left_is_set_aside_and_an_interrupted_run_is_kept(tmp_path):
    write_toy(tmp_path)
    [job] = batch.plan(toy(tmp_path, "ok"), out=tmp_path)
    folder = Path(job.out)
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_text("old")
    (folder / "status.json").write_text(json.dumps({"state": "interrupted", "key": job.key}))
    assert batch.set_aside(job) is None and (folder / "checkpoint").exists(), "to be resumed"
    write_toy(tmp_path, BODY + "\nprint('new')")
    [new] = batch.plan(toy(tmp_path, "ok"), out=tmp_path)
    assert not batch.finished(new) and batch.set_aside(new) == folder.parent / ".replaced" / "ok-s0"
    assert not folder.exists() and (folder.parent / ".replaced" / "ok-s0" / "checkpoint").read_text() == "old"


@pytest.mark.parametrize("file, text", [("status.json", '{"state": "do'), ("record.json", '{"status": "done"'),
                                        ("record.json", '{"status": "running"}'), ("record.json", "[]")])
def test_half_written_files_never_count(tmp_path, file, text):
    write_toy(tmp_path)
    [job] = batch.plan(toy(tmp_path, "ok"), out=tmp_path)
    folder = Path(job.out)
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "done", "key": job.key}))
    (folder / "record.json").write_text(json.dumps({"status": "done"}))
    assert batch.finished(job)
    changed = batch.plan(toy(tmp_path, "ok"), overrides={"train.steps": 3}, out=tmp_path)[0]
    assert changed.out == job.out and not batch.finished(changed), "done, but not this run"
    (folder / file).write_text(text)
    assert not batch.finished(job)


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    write_toy(tmp_path)
    a, out = toy(tmp_path, "ok"), tmp_path / "out"
    for message, call in {
        "no ablation 'predict'": lambda: batch.plan("predict", out=out),
        "no variant 'okay'; there is ok": lambda: batch.plan(a, variants=["okay"], out=out),
        "no variants chosen": lambda: batch.plan(a, variants=[], out=out),
        "no preset 'tpu'": lambda: batch.plan(a, preset="tpu", out=out),
        "no field 'train.step'; did you mean 'train.steps'": lambda: batch.plan(a, overrides={"train.step": 3}, out=out),
        "train.steps' = -1": lambda: batch.plan(a, overrides={"train.steps": -1}, out=out),
        "is what the ablation 'toy' sets itself": lambda: batch.plan(a, overrides={"flow.clamp": 0.1}, out=out),
        "seeds = 0": lambda: batch.plan(a, seeds=0, out=out),
        "jobs = 0": lambda: batch.run(batch.plan(a, out=out), at_once=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for message, wrong in {"0 cells tagged": dict(tags=()), "2 cells tagged": dict(twice=True),
                           "does not know 'out'": dict(parameters="variant, seed, preset, overrides = 'v', 0, 'smoke', {}")}.items():
        write_toy(tmp_path, **wrong)
        with pytest.raises(AblationError, match=message):
            batch.plan(a, out=out)
    (tmp_path / "toy.ipynb").write_text("not a notebook")
    with pytest.raises(AblationError, match="not a notebook"):
        batch.plan(a, out=out)
    assert not out.exists()


def test_a_folder_that_takes_no_files_is_an_error(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "file").write_text("in the way")
    jobs = batch.plan(toy(tmp_path, "ok"), out=tmp_path / "file")
    with pytest.raises(OSError, match="cannot write to the folder"):
        batch.run(jobs, prepare=None)


def test_a_failing_preparation_starts_no_run(tmp_path):
    write_toy(tmp_path)
    jobs = batch.plan(toy(tmp_path, "ok"), out=tmp_path)
    def prepare(recipes, say):
        raise ValueError("no such text encoder")
    with pytest.raises(ValueError, match="no such text encoder"):
        batch.run(jobs, prepare=prepare, say=lambda s: None)
    assert not Path(jobs[0].out).exists()


def test_two_drivers_do_not_share_a_folder(tmp_path):
    write_toy(tmp_path)
    jobs = batch.plan(toy(tmp_path, "ok"), out=tmp_path)
    def prepare(recipes, say):
        batch.run(jobs, prepare=None, say=lambda s: None)
    with pytest.raises(AblationError, match="another prx-nb ablate is at work"):
        batch.run(jobs, prepare=prepare, say=lambda s: None)
