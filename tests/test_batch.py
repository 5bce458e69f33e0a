"The driver with real processes and kernels: sweeps that are cut off, killed, adopted and done again."
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toys import BODY, gone, kernel, left_over, states, toy, wait_for

from prx_nb.core.files import write_json
from prx_nb.lab import batch
from prx_nb.lab import run as runs
from prx_nb.lab.ablations import AblationError
from prx_nb.lab.plan import plan


def test_a_sweep_over_several_homes(tmp_path):
    jobs = plan(toy(tmp_path, "ok", "raises"), out=tmp_path, timeout=200)
    jobs += plan(toy(tmp_path, "diesonce", name="other"), out=tmp_path, timeout=200)
    lines = []
    said = batch.run(jobs, at_once=2, prepare=None, say=lines.append)
    assert [s["state"] for s in said] == ["done", "cell error", "done"]
    text = "\n".join(lines)
    assert "toy/smoke/ok-s0 done" in text and "KID[toy] 0.5" in text and "CELL ERROR" in text and "once more" in text
    assert "3 runs: 2 done, 1 failed (toy/smoke/raises-s0 cell error)" in lines[-1]


@pytest.mark.parametrize("at_once", [1, 2])
def test_runs_share_the_cores(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(batch, "cores", lambda: 6)
    jobs = plan(toy(tmp_path, "slow"), seeds=3, out=tmp_path)
    batch.run(jobs, at_once=at_once, prepare=None, say=lambda line: None)
    records = [runs.record(j.out) for j in jobs]
    overlap = max(sum(r["begin"] <= t["begin"] < r["end"] for r in records) for t in records)
    assert overlap <= at_once and all(r["threads"] == str(6 // at_once) for r in records)
    assert at_once == 1 or overlap == 2


def test_runs_are_placed_on_free_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "devices", lambda: ["2", "5"])
    jobs = plan(toy(tmp_path, "slow"), seeds=4, out=tmp_path)
    lines = []
    batch.run(jobs, prepare=None, say=lines.append)
    assert "2 at a time" in lines[0] and "on 2 GPUs" in lines[0]
    records = [runs.record(j.out) for j in jobs]
    assert {r["gpu"] for r in records} == {"2", "5"}
    for r in records:
        others = [o for o in records if o is not r and o["begin"] < r["end"] and r["begin"] < o["end"]]
        assert all(o["gpu"] != r["gpu"] for o in others), "no GPU has two runs"


def test_more_jobs_than_gpus_share_them_and_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "devices", lambda: ["7"])
    monkeypatch.setattr(batch, "cores", lambda: 8)
    jobs = plan(toy(tmp_path, "slow"), seeds=2, out=tmp_path)
    lines = []
    batch.run(jobs, at_once=4, prepare=None, say=lines.append)
    assert "2 at a time (not 4) with 4 threads on 1 GPU, 2 on each" in lines[0]
    a, b = (runs.record(j.out) for j in jobs)
    assert a["gpu"] == b["gpu"] == "7" and a["threads"] == b["threads"] == "4"
    assert a["begin"] < b["end"] and b["begin"] < a["end"], "side by side"
    again = []
    batch.run(plan(toy(tmp_path, "ok"), seeds=3, out=tmp_path / "two"), at_once=3, per_device=2, prepare=None, say=again.append)
    assert "2 at a time (not 3) with 4 threads on 1 GPU, 2 on each" in again[0]


def test_places_by_brute_force(tmp_path):
    places, held, most = batch.Places(["0", "1", "2"], 6, per_device=2), [], []
    jobs = plan(toy(tmp_path, "ok"), out=tmp_path) + plan(toy(tmp_path, "ok"), out=tmp_path, overrides={"train.processes": 2})

    def take(job, wanted):
        for _ in range(30):
            with places.take(job) as device:
                mine = device.split(",")
                assert len(set(mine)) == len(mine) == wanted
                held.extend(mine)
                most.append(max(held.count(g) for g in "012"))
                time.sleep(0.001)
                for g in mine:
                    held.remove(g)
    threads = [threading.Thread(target=take, args=(jobs[k % 2], 1 + k % 2)) for k in range(6)]
    [t.start() for t in threads], [t.join(20) for t in threads]
    assert not held and max(most) == 2 and sorted(places.free) == sorted("001122")
    with pytest.raises(AblationError, match="wants train.processes = 2, but there is 1 GPU"):
        batch.Places(["0"], None).check(jobs[1])


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from toys import toy
from prx_nb.lab import batch, plan
folder = Path(sys.argv[1])
try: batch.run(plan.plan(toy(folder, *sys.argv[2:]), out=folder, timeout=100), at_once=2, prepare=None, say=lambda s: print(s, flush=True))
except KeyboardInterrupt: sys.exit(130)
"""


def driver(folder, *variants):
    script = DRIVER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", script, str(folder), *variants], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_driver_stops_its_runs_and_the_next_does_the_rest(tmp_path, sign):
    jobs = plan(toy(tmp_path, "ok", "hangs"), out=tmp_path, timeout=100)
    first = driver(tmp_path, "ok", "hangs")
    wait_for(lambda: states(jobs)["ok-s0"] == "done")
    pid, runner = kernel(jobs[1].out), runs.read_status(jobs[1].out)["pid"]
    first.send_signal(sign)
    output = first.communicate(timeout=30)[0]
    assert first.returncode == 130 and "1 of 2 are done. The same command again does the rest." in output
    wait_for(lambda: gone(pid) and gone(runner), 15)
    assert states(jobs) == {"ok-s0": "done", "hangs-s0": "interrupted"}
    before, lines = (Path(jobs[0].out) / "notebook.ipynb").stat().st_mtime_ns, []
    batch.run(plan(toy(tmp_path, "ok", "hangs"), out=tmp_path, timeout=2), prepare=None, say=lines.append)
    assert "2 runs, 1 of them done already" in lines[0] and "[2/2] hangs-s0 started" in lines[1]
    assert (Path(jobs[0].out) / "notebook.ipynb").stat().st_mtime_ns == before


def test_a_run_that_does_not_stop_is_killed_and_that_is_said(tmp_path, monkeypatch):
    [job] = plan(toy(tmp_path, "hangs"), out=tmp_path)
    monkeypatch.setattr(runs.stop_process, "__defaults__", (1,))
    stop, said = threading.Event(), []
    watcher = threading.Thread(target=lambda: said.append(runs.supervise(job, stop=stop)))
    watcher.start()
    pid, runner = kernel(job.out), runs.read_status(job.out)["pid"]
    os.kill(runner, signal.SIGSTOP)                       # it hears no SIGTERM
    stop.set()
    watcher.join(30)
    assert [(s["state"], s["error"]) for s in said] == [("interrupted", "the run's process ended with SIGKILL; see log.txt")]
    assert gone(pid) and gone(runner) and not Path(said[0]["scratch"]).exists()


def test_a_killed_driver_leaves_its_runs_at_work_and_the_next_adopts_them(tmp_path):
    jobs = plan(toy(tmp_path, "lasts", "ok", "slow"), out=tmp_path, timeout=100)
    first = driver(tmp_path, "lasts", "ok", "slow")
    pid = kernel(jobs[0].out)
    wait_for(lambda: states(jobs)["ok-s0"] in ("running", "done"))
    first.kill()
    first.communicate(timeout=30)
    assert not gone(pid) and states(jobs)["lasts-s0"] == "running" and states(jobs)["slow-s0"] == "queued"
    runner, lines = runs.read_status(jobs[0].out)["pid"], []
    said = batch.run(jobs, at_once=2, prepare=None, say=lines.append)
    assert [s["state"] for s in said] == ["done"] * 3
    assert said[0]["pid"] == runner and all((Path(j.out) / "tries").read_text() == "1" for j in jobs), "nothing was done twice"
    assert any("lasts-s0 is at work already, adopted" in line for line in lines)
    assert not left_over(str(tmp_path))


def test_a_run_that_ends_while_the_driver_looks_is_not_done_again(tmp_path, monkeypatch):
    jobs = plan(toy(tmp_path, "ok"), out=tmp_path)
    batch.run(jobs, prepare=None, say=lambda line: None)
    monkeypatch.setattr(batch, "_sort_out", lambda jobs, again, say: jobs)          # it saw them at work still
    [status] = batch.run(jobs, prepare=None, say=lambda line: None)
    assert status["state"] == "done" and (Path(jobs[0].out) / "tries").read_text() == "1"


def test_what_failed_is_left_alone_until_it_changes_or_is_asked_for(tmp_path):
    jobs = plan(toy(tmp_path, "raises", "dies"), out=tmp_path)
    batch.run(jobs, at_once=2, prepare=None, say=lambda s: None)
    tries = lambda: [int((Path(j.out) / "tries").read_text()) for j in jobs]
    assert tries() == [1, 2]
    lines = []
    batch.run(jobs, at_once=2, prepare=None, say=lines.append)
    assert tries() == [1, 4] and any("raises-s0 failed before and nothing has changed" in line for line in lines)
    assert any("prx-nb retry" in line for line in lines)
    batch.run(jobs[:1], prepare=None, say=lines.append, again=True)
    assert tries() == [2, 4] and [s["state"] for s in runs.read_status(jobs[0].out)["history"]] == ["cell error"]
    [new] = plan(toy(tmp_path, "raises", body="import pathlib, json\n(pathlib.Path(out) / 'record.json').write_text(json.dumps({'status': 'done'}))"), out=tmp_path)
    assert batch.run([new], prepare=None, say=lines.append)[0]["state"] == "done"


def test_what_an_older_version_left_is_stopped_and_set_aside_and_an_interrupted_run_is_kept(tmp_path):
    [job] = plan(toy(tmp_path, "hangs"), out=tmp_path)
    folder = Path(job.out)
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_text("old")
    write_json(folder / "status.json", {"state": "interrupted", "key": job.key})
    assert batch.set_aside(job) is None and (folder / "checkpoint").exists(), "to be resumed"
    child = runs._start(job, 1, None)
    pid = kernel(folder)
    [new] = plan(toy(tmp_path, "hangs", body=BODY + "\nprint('new')"), out=tmp_path)
    assert not runs.finished(new) and batch.set_aside(new) == folder.parent / ".replaced" / "hangs-s0"
    child.started.wait(20)
    assert gone(pid) and not folder.exists() and (folder.parent / ".replaced" / "hangs-s0" / "checkpoint").read_text() == "old"


def test_the_queue_can_be_seen_and_does_not_touch_a_run_at_work(tmp_path):
    jobs = plan(toy(tmp_path, "hangs", "ok"), out=tmp_path)
    child = runs._start(jobs[0], 1, None)
    kernel(jobs[0].out)
    batch.queue(jobs)
    assert states(jobs) == {"hangs-s0": "running", "ok-s0": "queued"}
    runs.stop_process(child, Path(jobs[0].out))
    assert states(jobs)["hangs-s0"] == "interrupted"


def test_a_failing_preparation_starts_no_run(tmp_path):
    jobs = plan(toy(tmp_path, "ok"), out=tmp_path)
    def prepare(recipes, say):
        raise ValueError("no such text encoder")
    with pytest.raises(ValueError, match="no such text encoder"):
        batch.run(jobs, prepare=prepare, say=lambda s: None)
    assert not Path(jobs[0].out).exists()


def test_two_drivers_do_not_share_a_folder(tmp_path):
    jobs = plan(toy(tmp_path, "ok"), out=tmp_path)
    def prepare(recipes, say):
        batch.run(jobs, prepare=None, say=lambda s: None)
    with pytest.raises(AblationError, match="another prx-nb is at work in"):
        batch.run(jobs, prepare=prepare, say=lambda s: None)


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    jobs = plan(toy(tmp_path, "ok"), out=tmp_path / "out")
    for message, call in {"jobs = 0": lambda: batch.run(jobs, at_once=0), "per-device = 0": lambda: batch.run(jobs, per_device=0),
                          "the plan is empty": lambda: batch.run([])}.items():
        with pytest.raises(AblationError, match=message):
            call()
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the folder"):
        batch.run(plan(toy(tmp_path, "ok"), out=tmp_path / "file"), prepare=None)


def test_gpus_are_named_as_the_environment_names_them(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert batch.devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    assert batch.devices() == ["3", "GPU-ab"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert batch.devices() == [] and os.environ["CUDA_VISIBLE_DEVICES"] == "3, GPU-ab"
