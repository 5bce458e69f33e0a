"Runs on a real Slurm of one machine: arrays, preemption, requeue, cancelling, time limits, and what is refused."
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import slurm as private
from safetensors.torch import load_file
from slurm import slurm  # noqa: F401  (a fixture)
from toys import BODY, gone, kernel, states, toy, wait_for

from prx_nb.lab import run as runs
from prx_nb.lab import slurm as executor
from prx_nb.lab.ablations import AblationError
from prx_nb.lab.plan import plan

# a run that gets one checkpoint further each time it is started, and needs three starts
SLICES = BODY.replace('if variant == "hangs"', """
if variant == "slices":
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / f"step-{int(tries.read_text()):07}.safetensors").touch()
    if int(tries.read_text()) < 3: time.sleep(1000)
if variant == "hangs\"""")
quiet = lambda line: None


def hand_in(jobs, **settings):
    return executor.submit(jobs, prepare=None, say=quiet, **settings)


def started(job, times=1):
    "Wait until a toy's notebook has been started so often."
    tries = Path(job.out) / "tries"
    wait_for(lambda: tries.exists() and tries.read_text() == str(times), 240)
    return kernel(job.out)


@pytest.fixture(autouse=True)
def nothing_goes_on(request):
    "What a test that failed left in the queue is cancelled, or it would take the cores of those after it."
    yield
    if "slurm" not in request.fixturenames:
        return
    longer = {job.out for job in request.getfixturevalue("limited")}
    if left := [task.id for folder, task in executor.in_queue().items() if folder not in longer]:
        request.getfixturevalue("slurm").call("scancel", *left)


@pytest.fixture(scope="module")
def limited(slurm, tmp_path_factory):  # noqa: F811
    "Two runs with a minute of time, handed in first and looked at last: one gets nowhere, one gets further each time."
    folder = tmp_path_factory.mktemp("limited")
    jobs = plan(toy(folder, "hangs", "slices", body=SLICES), out=folder)
    hand_in(jobs, partition="steady", time_minutes=1)
    return jobs


def test_an_array_of_runs_leaves_what_local_runs_leave(slurm, limited, tmp_path):  # noqa: F811
    jobs = plan(toy(tmp_path, "slow", "diesonce", "raises", "ok"), out=tmp_path)
    ids = hand_in(jobs, cpus=2, at_once=2)
    assert [i.split("_")[1] for i in ids] == ["0", "1", "2", "3"] and len({i.split("_")[0] for i in ids}) == 1
    assert set(states(jobs).values()) <= {"queued", "running"} and runs.read_status(jobs[3].out)["slurm"] == ids[3]
    assert executor.queue_states().keys() == {job.out for job in jobs + limited}
    lines = []
    said = executor.wait(jobs, 0.5, lines.append)
    assert states(jobs) == {"slow-s0": "done", "diesonce-s0": "done", "raises-s0": "cell error", "ok-s0": "done"}
    assert [s["attempt"] for s in said] == [1, 2, 1, 1] and said[1]["history"][0]["state"] == "dead kernel"
    assert said == [runs.read_status(job.out) for job in jobs] and [s["slurm"] for s in said] == ids
    done = [runs.record(job.out) for job in jobs if job.variant != "raises"]
    assert all(r["threads"] == "2" for r in done), "OMP_NUM_THREADS is the task's cores"
    assert max(sum(r["begin"] <= t["begin"] < r["end"] for r in done) for t in done) <= 2, "two at a time"
    assert any("RuntimeError: on purpose" in line for line in lines) and any("KID[toy] 0.5" in line for line in lines)
    assert slurm.job(ids[2])["JobState"] == "FAILED" and slurm.job(ids[3])["JobState"] == "COMPLETED"
    assert (jobs[0].group / ".slurm" / f"{ids[0]}_0_log.out").read_text().count("slow-s0") == 2
    [local] = plan(toy(tmp_path, "ok"), out=tmp_path / "local")
    here = runs.supervise(local)
    assert {p.name for p in Path(local.out).iterdir()} == {p.name for p in Path(jobs[3].out).iterdir()}
    assert here.keys() | {"slurm"} == said[3].keys()


def test_what_is_done_or_queued_is_not_handed_in_again(slurm, tmp_path):  # noqa: F811
    jobs = plan(toy(tmp_path, "ok", "hangs", "raises"), out=tmp_path)
    [first] = hand_in(jobs[:1])
    assert "_" not in first, "one run needs no array"
    executor.wait(jobs[:1], 0.5, quiet)
    each = hand_in(jobs[1:], array=False)
    assert len(set(each)) == 2 and not any("_" in i for i in each)
    executor.wait(jobs[2:], 0.5, quiet)
    lines = []
    assert executor.submit(jobs, prepare=None, say=lines.append) == []
    text = "\n".join(lines)
    assert f"hangs-s0 is in the queue already as {each[0]}" in text and "raises-s0 failed before" in text and "1 of 3 runs are done" in text
    other = plan(toy(tmp_path, "ok", "hangs", "raises"), out=tmp_path, overrides={"train.steps": 7})
    with pytest.raises(AblationError, match=f"in Slurm's queue with other settings.*scancel {each[0]}"):
        hand_in(other)
    assert runs.finished(jobs[0]), "nothing was set aside"
    assert executor.cancel(jobs) == [each[0]]
    assert executor.wait(jobs, 0.5, quiet)[1]["state"] == "interrupted"
    assert len(hand_in(jobs[2:], again=True)) == 1
    executor.wait(jobs[2:], 0.5, quiet)
    assert len(runs.read_status(jobs[2].out)["history"]) == 1


def test_a_cancelled_task_stops_in_order_and_alone(slurm, tmp_path):  # noqa: F811
    jobs = plan(toy(tmp_path, "hangs", "lasts", "ok"), out=tmp_path)
    ids = hand_in(jobs, at_once=2)
    pid, other = started(jobs[0]), started(jobs[1])
    slurm.call("scancel", ids[0])
    said = executor.wait(jobs, 0.5, quiet)
    assert states(jobs) == {"hangs-s0": "interrupted", "lasts-s0": "done", "ok-s0": "done"}
    assert [s["attempt"] for s in said] == [1, 1, 1] and said[0]["error"] == "stopped by a signal"
    assert gone(pid) and gone(other) and not Path(said[0]["scratch"]).exists()
    more = plan(toy(tmp_path, "hangs", "ok"), out=tmp_path / "waiting")
    hand_in(more, at_once=1)
    started(more[0])
    assert len(executor.cancel(more)) == 2
    assert [s["state"] for s in executor.wait(more, 0.5, quiet)] == ["interrupted", "interrupted"], "the second was never started"
    assert "CANCELLED" in runs.read_status(more[1].out)["error"]


def test_preempted_training_goes_on_and_ends_the_same(slurm, limited, tmp_path):  # noqa: F811
    steps = {"train.steps": 1500, "train.checkpoint_every": 50, "train.validate_every": 500}
    choose = lambda place: plan("prediction_target", "smoke", variants=["x"], overrides=steps, out=tmp_path / place)
    [job], [undisturbed] = choose("slurm"), choose("local")
    patient = plan(toy(tmp_path, "slices", body=SLICES), out=tmp_path)
    alone = threading.Thread(target=runs.supervise, args=(undisturbed, 1))
    later = hand_in(patient, partition="graceful", extra={"gres": "seat:1"})
    pid = started(patient[0])                                           # first: it waits for as long as the other takes
    ids = hand_in([job], extra={"gres": "seat:1"}) + later
    checkpoints = Path(job.out) / "checkpoint"
    log = Path(job.out) / "log.txt"
    wait_for(lambda: log.exists() and "step  150/1500" in log.read_text(), 90)
    urgent = slurm.call("sbatch", "--parsable", "--partition=high", "--gres=seat:2", "--output=/dev/null", "--wrap=sleep 1").strip()
    wait_for(lambda: runs.read_status(job.out).get("state") == "interrupted" and runs.read_status(patient[0].out).get("state") == "interrupted")
    wait_for(lambda: gone(pid))
    before = max(p.name for p in checkpoints.iterdir())
    assert before < "step-0001500", "it was not through"
    alone.start()
    wait_for(lambda: slurm.job(urgent)["JobState"] == "COMPLETED")
    started(patient[0], 2)
    slurm.call("scancel", "--signal=USR2", ids[1])                      # as Slurm does before the time limit
    said = executor.wait([job, *patient], 0.5, quiet)
    alone.join()
    assert [s["state"] for s in said] == ["done", "done"] and runs.finished(undisturbed)
    assert [[h["state"] for h in s["history"]] for s in said] == [["interrupted"], ["interrupted", "interrupted"]]
    assert all(h["error"] == "stopped by a signal" for s in said for h in s["history"]), "in order, not by a signal that Slurm sends to all"
    assert [int(slurm.job(i)["Restarts"]) for i in ids] == [1, 2], "requeued under the same number"
    first, second = (Path(job.out) / "log.txt").read_text().split("--- once more")
    assert "step  150/1500" in first and "step  150/1500" not in second and "step 1500/1500" in second, "it went on in the middle"
    one, other = runs.record(job.out), runs.record(undisturbed.out)
    assert one["metrics"] == other["metrics"] and one["recipe_key"] == other["recipe_key"]
    curves = [pd.read_parquet(f"{j.out}/curves.parquet").query("name != 'seconds'").reset_index(drop=True) for j in (job, undisturbed)]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    weights = [load_file(f"{j.out}/checkpoint/step-0001500.safetensors") for j in (job, undisturbed)]
    assert weights[0].keys() == weights[1].keys() and all(weights[0][k].equal(weights[1][k]) for k in weights[0])
    assert (Path(job.out) / "samples.png").read_bytes() == (Path(undisturbed.out) / "samples.png").read_bytes()


def test_bad_input_is_refused_before_anything_is_handed_in(slurm, tmp_path, monkeypatch):  # noqa: F811
    jobs, out = plan(toy(tmp_path, "ok"), out=tmp_path / "out"), tmp_path / "out"
    queue = slurm.call("squeue", "-h", "-o", "%i")
    for message, settings in {
        "no partition 'gpu'; there are: low, graceful, steady, high": dict(partition="gpu"),
        "time limit = 500 minutes, but partition 'low' allows 120": dict(time_minutes=500),
        "time limit = 0 minutes": dict(time_minutes=0),
        "cpus = 0": dict(cpus=0),
        "at once = 0": dict(at_once=0),
        "'time' is one that is set already": dict(extra={"time": 3}),
        "sbatch refuses: .*unrecognized option.*colour": dict(extra={"colour": "red"}),
        "sbatch refuses: .*generic resource": dict(extra={"gres": "moon:1"}),
        "no machine of partition 'low' holds a task of 99 cpus, 0 GB, 0 gpus; there are machines with 8 cpus, 2 GB, 0 gpus": dict(cpus=99),
        "holds a task of 1 cpus, 0 GB, 1 gpus": dict(gpus=1),
        "holds a task of 1 cpus, 3 GB, 0 gpus": dict(memory_gb=3),
        "leave one of the two out": dict(array=False, at_once=2),
    }.items():
        with pytest.raises(executor.SlurmError, match=message):
            hand_in(jobs, **settings)
    with pytest.raises(AblationError, match="plan is empty"):
        hand_in([])
    many = [replace(jobs[0], seed=i, out=f"{jobs[0].group}/ok-s{i}") for i in range(1100)]
    with pytest.raises(executor.SlurmError, match="1100 runs, but an array may have 1001"):
        hand_in(many)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write"):
        hand_in(plan(toy(tmp_path, "ok"), out=tmp_path / "file"))
    assert slurm.call("squeue", "-h", "-o", "%i") == queue and not list(out.rglob("status.json"))
    (tmp_path / "empty.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "empty.conf"))
    with pytest.raises(executor.SlurmError, match="says: .*ClusterName"):
        hand_in(jobs)


def test_what_cannot_be_let_go_is_taken_back(slurm, tmp_path, monkeypatch):  # noqa: F811
    jobs, really = plan(toy(tmp_path, "ok", "slow"), out=tmp_path), executor.ask
    def ask(*command):
        if command[:2] == ("scontrol", "release"):
            assert {t.state for t in executor.in_queue().values() if t.reason == "JobHeldUser"} == {"PENDING"}, "held until all is written down"
            assert set(states(jobs).values()) == {"queued"}
            raise KeyboardInterrupt
        return really(*command)
    monkeypatch.setattr(executor, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        hand_in(jobs)
    wait_for(lambda: not executor.queue_states().keys() & {job.out for job in jobs})
    assert set(states(jobs).values()) == {"interrupted"} and not list(tmp_path.rglob("log.txt")), "none was started"


def test_the_time_limit_ends_a_run_that_gets_nowhere_only(slurm, limited):  # noqa: F811
    said = executor.wait(limited, 0.5, quiet)
    assert [s["state"] for s in said] == ["timeout", "done"]
    assert "no new checkpoint within the task's 1 min" in said[0]["error"] and said[0]["attempt"] == 1
    assert [h["state"] for h in said[1]["history"]] == ["interrupted", "interrupted"]


def test_a_lost_machine_is_named_and_a_requeued_run_survives_it(slurm, limited, tmp_path):  # noqa: F811
    executor.wait(limited, 0.5, quiet)                                  # the machine goes down for all
    jobs = plan(toy(tmp_path, "hangs", "slices", body=SLICES), out=tmp_path)
    ids = hand_in(jobs)
    pids = [started(job) for job in jobs]
    slurm.call("scontrol", "update", f"JobId={ids[0]}", "Requeue=0")
    node = slurm.job(ids[0])["NodeList"]
    slurm.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    wait_for(lambda: all(gone(pid) for pid in pids) and slurm.job(ids[0])["JobState"] == "NODE_FAIL")
    wait_for(lambda: executor.reconcile(jobs)[0]["state"] == "host gone")          # whether or not it could still write a last word
    assert "Slurm says NODE_FAIL" in runs.read_status(jobs[0].out)["error"] and set(executor.queue_states()) == {jobs[1].out}
    wait_for(lambda: not private.steps(slurm))                          # slurmd launches no second copy of a job while a step of the first is left,
    def back():                                                         # and a launch that it refuses is not tried again: the task would wait for ever
        if "DOWN" in slurm.call("scontrol", "--oneliner", "show", "node", node):
            slurm.call("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        return (Path(jobs[1].out) / "tries").read_text() == "2"
    wait_for(back, 240)
    kernel(jobs[1].out)
    executor.cancel(jobs)
    assert [s["state"] for s in executor.wait(jobs, 0.5, quiet)] == ["host gone", "interrupted"]


LEAVES = """
import os, sys
sys.path.insert(0, {tests!r})
import slurm
try:
    with slurm.private_slurm() as s:
        s.call("sbatch", "--output=/dev/null", "--wrap=srun sh -c 'trap : TERM; while :; do sleep 321; done'")
        import time; time.sleep(3)
        print(s.folder, s.job("1")["JobState"])
        raise KeyboardInterrupt
except KeyboardInterrupt: print("SLURM_CONF" in os.environ)
"""


def test_nothing_is_left_of_a_private_slurm():
    if why := private.missing():
        pytest.skip(why)
    before = {p.pid for p in psutil.process_iter()}
    script = LEAVES.format(tests=str(Path(__file__).parent))
    folder, state, env = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True,
                                        env={k: v for k, v in os.environ.items() if k != "SLURM_CONF"}).stdout.split()
    assert state == "RUNNING" and env == "False" and not os.path.exists(folder)
    new = [p for p in psutil.process_iter(["pid", "name", "cmdline", "status"]) if p.pid not in before and p.info["status"] != "zombie"]
    assert not [p.info for p in new if p.info["name"] in ("munged", "slurmctld", "slurmd", "slurmstepd") or "321" in (p.info["cmdline"] or [])]
