"Warm processes: forks that are like fresh processes, and a batch that needs none of it."
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from toys import states, toy, wait_for

from prx_nb.core.files import read_json
from prx_nb.lab import batch, run, warm
from prx_nb.lab.plan import plan

FACTS = """
import json, os, pathlib, random, signal, sys, threading
(pathlib.Path(out) / "facts.json").write_text(json.dumps({
    "torch": "torch" in sys.modules, "OMP": os.environ["OMP_NUM_THREADS"], "device": os.environ.get("CUDA_VISIBLE_DEVICES"), "cwd": os.getcwd(),
    "random": random.random(), "sigint": str(signal.getsignal(signal.SIGINT)), "session": os.getsid(0) == os.getpid(), "parent": os.getppid(),
    "marked": os.environ.get("MARK"), "argv0": sys.path[0], "stdin": os.readlink("/proc/self/fd/0") if os.path.exists("/proc/self/fd/0") else None}))
(pathlib.Path(out) / "record.json").write_text(json.dumps({"status": "done", "metrics": {"KID[toy]": 0.1}}))
"""


def facts(job):
    return read_json(Path(job.out) / "facts.json")


def nurseries():
    mine = psutil.Process().children()
    return [p for p in mine if "prx_nb.lab.warm" in " ".join(p.cmdline())]


def test_a_fork_is_like_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", "of the driver")
    jobs = plan(toy(tmp_path, "a", "b", body=FACTS), seeds=2, out=tmp_path)
    with warm.ForkServer([job.notebook for job in jobs], 1) as fork_server:
        monkeypatch.setenv("MARK", "later")
        for job in jobs[:3]:
            assert run.supervise(job, 1, "7", fork_server=fork_server)["state"] == "done"
        [process] = nurseries()
        assert all(psutil.pid_exists(p) is False for p in [run.read_status(j.out)["pid"] for j in jobs[:3]])
    fresh = run.supervise(jobs[3], 1, "7")
    assert fresh["state"] == "done" and not process.is_running()
    told = [facts(job) for job in jobs]
    for name in ("OMP", "device", "sigint", "session", "marked", "stdin", "torch"):
        assert len({f[name] for f in told}) == 1, (name, told)
    assert told[0] | {"random": 0, "cwd": 0, "parent": 0} == told[3] | {"random": 0, "cwd": 0, "parent": 0}
    assert len({f["random"] for f in told}) == 4 and told[0]["marked"] == "later" and not told[0]["torch"]
    assert [f["cwd"] for f in told] == [job.out for job in jobs] and all(f["session"] for f in told)


def test_a_nursery_loads_what_notebooks_import_and_nothing_else(tmp_path):
    body = "import wave\nfrom xml.dom import minidom\nimport no_such_module_anywhere\nfrom prx_nb.core import show"
    notebook = toy(tmp_path, "a", body=body).notebook
    script = f"import sys; from prx_nb.lab import warm; warm.load([{notebook!r}]); " \
             "print([n in sys.modules for n in ('wave', 'xml.dom.minidom', 'prx_nb.core.show', 'ipykernel.kernelapp', 'torch._dynamo', 'sndhdr', 'diffusers')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == "[True, True, True, True, True, False, False]".split(), done.stderr     # show imports torch
    script = "import sys; from prx_nb.lab import warm; warm.load([]); print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


def test_exit_codes_come_back_whoever_else_is_at_work(tmp_path):
    body = "import os, signal, time\nif variant == 'killed': os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    jobs = plan(toy(tmp_path, "a", "killed", "b", body=body), out=tmp_path)
    with warm.ForkServer([jobs[0].notebook], 1) as fork_server:
        stop, others = threading.Event(), []
        for job in (jobs[0], jobs[2]):
            others.append(threading.Thread(target=run.supervise, args=(job,), kwargs={"fork_server": fork_server, "stop": stop}))
            others[-1].start()
        wait_for(lambda: [run.read_status(job.out).get("state") for job in (jobs[0], jobs[2])] == ["running"] * 2)
        said = run.supervise(jobs[1], retries=0, fork_server=fork_server)
        stop.set()
        [other.join() for other in others]
    assert said["state"] == "killed" and "ended with SIGKILL" in said["error"], said
    assert {run.read_status(job.out)["state"] for job in (jobs[0], jobs[2])} == {"interrupted"}


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_batch_whose_nursery_is_killed_goes_on(when, tmp_path):
    jobs, told, begun = plan(toy(tmp_path, "slow", "ok"), seeds=2, out=tmp_path), [], threading.Event()

    def strike():
        begun.wait(60)
        wait_for(nurseries)
        if when == "during":
            wait_for(lambda: "running" in states(jobs).values())
        for process in nurseries():
            process.kill()
    striker = threading.Thread(target=strike)
    striker.start()
    batch.run(jobs, 1, prepare=None, say=lambda line: (told.append(line), begun.set()))
    striker.join()
    assert set(states(jobs).values()) == {"done"} and not nurseries(), told
    assert all((Path(job.out) / "tries").read_text() == "1" for job in jobs), "nothing was done twice"


def test_runs_outlive_a_driver_that_is_killed_and_the_nursery_does_not(tmp_path):
    ablation = toy(tmp_path, "lasts")
    job = plan(ablation, out=tmp_path)[0]
    script = "import sys; from prx_nb.lab import batch; from prx_nb.lab.plan import read_job; batch.run([read_job(sys.argv[1])], 1, prepare=None)"
    (tmp_path / "j.json").write_text(json.dumps({k: v for k, v in job.__dict__.items()}, default=dict))
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "j.json")], stdout=subprocess.DEVNULL)
    wait_for(lambda: (Path(job.out) / "pid").exists())
    [fork_server] = [p for p in psutil.Process(driver.pid).children() if "prx_nb.lab.warm" in " ".join(p.cmdline())]
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not fork_server.is_running() or fork_server.status() == psutil.STATUS_ZOMBIE, 10)
    said, lines = run.read_status(job.out), []
    assert said["state"] == "running" and psutil.pid_exists(said["pid"])
    batch.run([job], 1, prepare=None, say=lines.append)
    assert any("adopted" in line for line in lines) and states([job]) == {job.name: "done"}


def test_a_nursery_that_cannot_start_is_done_without(tmp_path, monkeypatch):
    job = plan(toy(tmp_path, "ok"), out=tmp_path)[0]
    monkeypatch.setattr(warm.sys, "executable", "/no/such/python")
    with warm.ForkServer([job.notebook]) as fork_server:
        monkeypatch.undo()
        assert not fork_server.alive and run.supervise(job, fork_server=fork_server)["state"] == "done"


def test_notebooks_whose_imports_start_threads_are_not_forked(tmp_path):
    (tmp_path / "starts_threads.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n")
    notebook = toy(tmp_path, "a", body="import starts_threads", name="threads").notebook
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "prx_nb.lab.warm", notebook], env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"ready" not in done.stdout


@pytest.mark.slow
def test_a_real_run_is_the_same_forked_and_fresh_and_keeps_its_figures(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    jobs = [plan("prediction_target", "smoke", variants=["v"], out=tmp_path / way)[0] for way in ("forked", "fresh")]
    batch.run(jobs[:1], 1, say=lambda line: None)
    assert run.supervise(jobs[1], batch.cores())["state"] == "done"
    (a, b), (c, d) = ((Path(job.out), pd.read_parquet(Path(job.out) / "curves.parquet").query("name != 'seconds'")) for job in jobs)
    assert b.equals(d) and read_json(a / "record.json")["metrics"] == read_json(c / "record.json")["metrics"]
    assert (a / "samples.png").read_bytes() == (c / "samples.png").read_bytes()
    pictures = [sum("image/png" in o.get("data", {}) for cell in nbformat.read(f / "notebook.ipynb", 4).cells for o in cell.get("outputs", [])) for f in (a, c)]
    assert pictures[0] == pictures[1] > 2


def test_a_waiting_kernel_goes_with_its_parent(tmp_path):
    script = "import os, sys, time; from prx_nb.lab import warm; print(warm.Waiting().pid, flush=True); time.sleep(100)"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    kernel = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 10)
