"Watching and cleaning: what files say is checked against processes and locks, and a run at work is never touched."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from prx_nb.core.files import NotOurs
from prx_nb.lab import identity, plan, run, slurm, watch
from prx_nb.lab.ablations import AblationError

HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"


@pytest.fixture
def sleeper():
    "A process that can stand for a run's, or hold a lock."
    started = []

    def start(*lock):
        process = subprocess.Popen([sys.executable, "-c", HOLD if lock else "import time; print('up', flush=True); time.sleep(600)", *map(str, lock)],
                                   stdout=subprocess.PIPE, text=True)
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def put(folder, status=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"job": {}, "status": status, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def at_work(process, **more):
    return {"state": "running", "host": os.uname().nodename, "pid": process.pid, "born": psutil.Process(process.pid).create_time(),
            "started": datetime.now().astimezone().isoformat()} | more


def files(top):
    return {p.relative_to(top).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(top.rglob("*")) if p.is_file()}


def one(folder):
    [row] = watch.survey(folder, out=folder.parent)
    return row


def test_a_run_is_running_only_while_its_process_is(tmp_path, sleeper):
    process = sleeper()
    folder = put(tmp_path / "v-s0", at_work(process), progress={"step": 30, "steps": 120, "seconds": 60.0, "at": time.time()})
    row = one(folder)
    assert (row.state, row.step, row.steps, row.eta) == ("running", 30, 120, 180.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    row = one(folder)
    assert (row.state, row.stage, row.step, row.eta) == ("killed", "failed", 30, None) and "its process is gone" in row.cause
    other = sleeper()                                              # another process that came by the same number
    put(folder, at_work(other, born=1.0))
    assert one(folder).state == "killed"


def test_a_run_on_another_machine_is_believed_while_it_beats(tmp_path):
    folder = put(tmp_path / "v-s0", {"state": "running", "host": "elsewhere", "pid": 1, "born": 1.0, "device": "3"})
    assert one(folder).state == "running" and one(folder).where == "elsewhere GPU 3"
    old = time.time() - run.SILENCE - 5
    os.utime(folder / "status.json", (old, old))
    assert one(folder).state == "host gone" and "elsewhere has not been heard of" in one(folder).cause


def test_progress_of_an_earlier_attempt_does_not_count(tmp_path, sleeper):
    folder = put(tmp_path / "v-s0", progress={"step": 30, "steps": 120, "seconds": 60.0})
    os.utime(folder / "progress.json", (time.time() - 100,) * 2)
    put(folder, at_work(sleeper(), history=[{"state": "killed"}]))
    assert one(folder).step is None and one(folder).attempt == 2


def test_a_queued_run_without_a_driver_is_said_so(tmp_path, sleeper):
    folder = put(tmp_path / "toy" / "smoke" / "v-s0", {"state": "queued"})
    assert one(folder).cause == watch.NO_DRIVER and "1 queued with no driver at work" in watch.as_text([one(folder)])
    driver = sleeper(folder.parent / ".lock")
    assert one(folder).cause == "" and watch.driven(folder.parent)
    driver.kill()
    driver.wait()
    assert one(folder).cause == watch.NO_DRIVER, "the lock went with the process"
    before = files(tmp_path)
    watch.survey(tmp_path)
    assert files(tmp_path) == before, "looking changes nothing"


def test_slurm_is_asked_about_runs_that_were_given_to_it(tmp_path, monkeypatch):
    put(tmp_path / "a" / "b" / "v-s0", {"state": "queued", "slurm": "12_0"})
    put(tmp_path / "a" / "b" / "v-s1", {"state": "interrupted", "slurm": "12_1", "error": "preempted"})
    put(tmp_path / "a" / "b" / "v-s2", {"state": "queued", "slurm": "12_2"})
    queue = {str(tmp_path / "a" / "b" / f"v-s{n}"): "PENDING" for n in (0, 1)}
    monkeypatch.setattr(slurm, "queue_states", lambda: queue)
    rows = watch.survey(tmp_path)
    assert [r.state for r in rows] == ["queued"] * 3
    assert rows[0].cause == "slurm 12_0 pending" and "goes on from its checkpoint" in rows[1].cause and rows[2].cause == watch.NO_DRIVER

    def broken():
        raise slurm.SlurmError("no answer")
    monkeypatch.setattr(slurm, "queue_states", broken)
    assert "does not answer" in watch.survey(tmp_path)[0].cause
    monkeypatch.setattr(slurm, "queue_states", lambda: pytest.fail("asked for nothing"))
    put(tmp_path / "c" / "d" / "v-s0", {"state": "queued"})
    assert watch.survey(tmp_path / "c")[0].state == "queued"


def test_files_half_written_or_absurd_never_break_the_table(tmp_path):
    top = watch.pretend_runs(tmp_path / "out")
    rng, paths = random.Random(0), sorted(top.rglob("*.json"))
    for _ in range(150):
        path = rng.choice(paths)
        keep = path.read_bytes()
        path.write_bytes(rng.choice([keep[:rng.randrange(len(keep) + 1)], b"", b"\xff\xfe", b"[]", b"null", b'{"state": 3}', b'{"state": "running"}',
                                     b'{"state": "done", "seconds": "x"}', b'{"step": "a", "steps": null}', b'{"state": "running", "pid": "x", "host": 1}',
                                     b'{"history": 3, "state": "cell error", "error": null, "seconds": null, "cell": {}}']))
        rows = watch.survey(top)
        assert len(rows) == 6 and watch.as_text(rows) and watch.as_rich(rows)
        if rng.random() < 0.7:
            path.write_bytes(keep)


def test_plain_text_fits_80_columns_and_says_every_cause(tmp_path):
    long = "RuntimeError: " + "a long story about tensors " * 4 + "é 漢字"
    for n in range(30):
        put(tmp_path / "toy" / ("smoke@" + "optimizer.lr=0.002,caption_length=short" * (n % 3)) / f"a-rather-long-variant-s{n}",
            {"state": "cell error", "seconds": 3.0 * n, "cell": n, "error": long})
    text = watch.as_text(watch.survey(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    assert "".join(text.split()).count("".join(long.split())) == 30


def test_hundreds_of_runs_are_counted_and_only_what_matters_is_listed(tmp_path):
    done = watch.row(put(tmp_path / "h0" / "v-s0", {"state": "done", "seconds": 3}, record={"status": "done", "metrics": {}}), tmp_path)
    rows = [replace(done, group=f"h{n % 4}", run=f"v-s{n}", state="queued" if n % 2 else "done") for n in range(300)]
    rows[7] = replace(done, group="h3", state="timeout", cause="took too long", metric="")
    lines = watch.as_text(rows).splitlines()
    assert len(lines) == 4 + 1 + 2 and "h0: 75 done" in lines[0] and "took too long" in "\n".join(lines)
    assert lines[-1].startswith("300 runs: 150 done, 149 queued, 1 failed")
    assert len(watch.as_text(rows, everything=True).splitlines()) > 300


def test_a_link_that_leads_back_up_is_no_trap(tmp_path):
    put(tmp_path / "a" / "b" / "v-s0", {"state": "done"})
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(list(watch.run_folders(tmp_path))) == 1
    for name in ("published", ".replaced", "checkpoint"):
        put(tmp_path / "a" / name / "v-s0", {"state": "done"})
    assert len(list(watch.run_folders(tmp_path))) == 1


def test_places_are_folders_or_names(tmp_path):
    put(tmp_path / "toy" / "smoke" / "v-s0")
    assert watch.places([], tmp_path) == [tmp_path] and watch.places(["toy"], tmp_path) == [tmp_path / "toy"]
    assert watch.places([str(tmp_path / "toy" / "smoke")], "x") == [tmp_path / "toy" / "smoke"]
    with pytest.raises(AblationError, match="no folder toys and none in"):
        watch.places(["toys"], tmp_path)


# --- repeat


def test_runs_are_planned_anew_as_they_were(tmp_path, monkeypatch):
    jobs = [job for label in ("", "optimizer.lr=0.002", "a@b") for job in
            plan.plan("prediction_target", "smoke", [0, 5], ["x", "eps"], {"optimizer.lr": 0.002}, tmp_path / "out", label, timeout=9, cell_timeout=4)]
    for job in jobs:
        put(Path(job.out), {"state": "timeout"}, job=asdict(job))
    some = random.Random(0).sample(jobs, 7)
    assert {j.out: j for j in watch.replan(j.out for j in some)} == {j.out: j for j in some}
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = watch.replan(watch.run_folders(tmp_path / "moved"))
    assert {Path(j.out).relative_to(tmp_path / "moved") for j in moved} == {Path(j.out).relative_to(tmp_path / "out") for j in jobs}
    assert {j.key for j in moved} == {j.key for j in jobs}
    monkeypatch.setattr(identity, "libraries", lambda: {"torch": "newer"})
    assert not {j.key for j in watch.replan(watch.run_folders(tmp_path / "moved"))} & {j.key for j in jobs}
    broken = tmp_path / "moved" / "prediction_target" / "smoke" / "x-s0"
    (broken / "job.json").write_text("{")
    with pytest.raises(AblationError, match="x-s0/job.json is no job"):
        watch.replan([broken])


def test_which_runs_are_repeated(tmp_path):
    rows = watch.survey(watch.pretend_runs(tmp_path))
    assert {r.state for r in watch.chosen(rows)} == {"non-finite loss", "killed", "disk full"}
    assert [r.state for r in watch.chosen(rows, ["queued", "disk full"])] == ["queued", "disk full"]
    for wrong in ("running", "broken", "time out"):
        with pytest.raises(AblationError, match="no state"):
            watch.chosen(rows, [wrong])


# --- clean


def put_everything(home, name, status):
    "A run with one of everything that could go."
    folder = put(home / name, status, record={"status": "done", "metrics": {}} if status["state"] == "done" else None)
    (folder / "checkpoint").mkdir()
    for step in (1, 2, 10):
        (folder / "checkpoint" / f"step-{step:06}.safetensors").write_bytes(bytes(1000 * step))
    for path in (".curves.parquet.9.part", "checkpoint/.step-000012.safetensors.9.part", ".reserve", ".clock-xyz", "curves.parquet", "log.txt"):
        (folder / path).write_bytes(bytes(10))
    return folder


def test_clean_never_touches_a_run_at_work(tmp_path, sleeper):
    home = tmp_path / "toy" / "smoke"
    alive = put_everything(home, "alive-s0", at_work(sleeper()))
    beats = put_everything(home, "beats-s0", {"state": "running", "host": "elsewhere", "pid": 1, "born": 1.0})
    starts = put_everything(home, "starts-s0", {"state": "cell error", "seconds": 1, "error": "earlier"})   # its next attempt holds the lock, and has not written yet
    sleeper(starts / ".lock")
    aside = put(home / ".replaced" / "gone-s0", {"state": "running", "host": "elsewhere", "pid": 1, "born": 1.0})
    queued = put_everything(home, "queued-s0", {"state": "queued"})
    before = {folder: files(folder) for folder in (alive, beats, starts, aside)}
    for options in ({}, {"failed": True}, {"checkpoints": True}, {"failed": True, "checkpoints": True}):
        gone, kept = watch.clean(tmp_path, **options)
        assert {folder: {k: v for k, v in files(folder).items() if k != ".lock"} for folder in before} == \
            {folder: {k: v for k, v in found.items() if k != ".lock"} for folder, found in before.items()}
        assert all(not i.path.is_relative_to(f) for i in gone for f in before)
    assert len(kept) == 3
    assert (queued / "checkpoint" / "step-000001.safetensors").exists() and not list(queued.glob(".*.part"))


def test_clean_stays_within_the_folder_of_runs(tmp_path):
    "Other folders of runs, further down, are not looked into; nor is a lock left there. The whole disk is refused."
    failed = {"state": "cell error", "seconds": 1, "error": "x"}
    near, far = (put_everything(tmp_path / "out" / home / "toy" / "smoke", "v-s0", failed) for home in (".", "colleague/old"))
    put(far.parent / ".replaced" / "w-s0", failed)
    before = files(tmp_path / "out" / "colleague")
    gone, _ = watch.clean(tmp_path / "out", failed=True, checkpoints=True)
    assert [i.path for i in gone] == [near] and not near.exists() and files(tmp_path / "out" / "colleague") == before
    (tmp_path / "disk").symlink_to(os.sep)
    for whole in (os.sep, "//", "/..", tmp_path / "disk"):
        with pytest.raises(NotOurs, match="whole disk"):
            watch.clean(tmp_path, whole, dry_run=True)


def test_what_goes_and_what_stays(tmp_path):
    home = tmp_path / "toy" / "smoke"
    states = ["done", "cell error", "non-finite loss", "timeout", "disk full", "out of memory", "no record", "interrupted", "killed", "host gone", "queued"]
    runs = {state: put_everything(home, state.replace(" ", "-") + "-s0", {"state": state, "seconds": 1}) for state in states}
    put(home / ".replaced" / "old-s0", {"state": "done"})
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "photograph").write_text("x")
    (runs["timeout"] / "link").symlink_to(outside)
    before = files(tmp_path)
    listed, _ = watch.clean(tmp_path, failed=True, checkpoints=True, dry_run=True)
    assert files(tmp_path) == before
    size = sum(p.lstat().st_size for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink())
    gone, kept = watch.clean(tmp_path, failed=True, checkpoints=True)
    assert [asdict(i) for i in gone] == [asdict(i) for i in listed] and kept == []
    freed = size - sum(p.lstat().st_size for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink())
    assert freed == sum(i.bytes for i in gone) and watch.size(freed) in watch.freed(gone)
    assert {state for state, folder in runs.items() if folder.exists()} == {"done", "interrupted", "killed", "host gone", "queued"}
    left = lambda state: sorted(p.name for p in (runs[state] / "checkpoint").iterdir())
    assert left("done") == ["step-000010.safetensors"] and len(left("interrupted")) == len(left("queued")) == 3
    assert {p.name for p in runs["done"].iterdir()} >= {"curves.parquet", "log.txt", "record.json", "status.json", "job.json"}
    assert (outside / "photograph").exists(), "links are not followed"
    assert not list(tmp_path.rglob("*.part")) and not (home / ".removed").exists() and list((home / ".replaced").iterdir()) == []
    assert watch.clean(tmp_path, failed=True, checkpoints=True) == ([], [])


def test_without_options_only_what_nobody_needs_goes(tmp_path):
    home = tmp_path / "toy" / "smoke"
    failed = put_everything(home, "x-s0", {"state": "cell error"})
    (home / ".fresh.csv.1.part").write_text("somebody is writing")
    (home / ".old.csv.1.part").write_text("x")
    os.utime(home / ".old.csv.1.part", (time.time() - 7200,) * 2)
    gone, _ = watch.clean(tmp_path)
    assert {i.kind for i in gone} == {"unfinished files"} and failed.exists() and len(list((failed / "checkpoint").iterdir())) == 3
    assert (home / ".fresh.csv.1.part").exists() and not (home / ".old.csv.1.part").exists()


def test_failed_runs_stay_while_a_driver_is_at_work_in_their_home(tmp_path, sleeper):
    busy = put_everything(tmp_path / "toy" / "smoke", "x-s0", {"state": "cell error"})
    idle = put_everything(tmp_path / "toy" / "cpu", "x-s0", {"state": "cell error"})
    sleeper(busy.parent / ".lock")
    gone, kept = watch.clean(tmp_path, failed=True)
    assert busy.exists() and not idle.exists() and any("a driver is at work" in line for line in kept)


def test_a_run_that_begins_while_its_folder_is_cleaned_waits(tmp_path, monkeypatch):
    "The run's lock is held while files go: a process that wants to start the run comes after."
    folder = put_everything(tmp_path / "toy" / "smoke", "x-s0", {"state": "done"})
    order, wanted = [], threading.Event()

    def begin():
        with open(folder / ".lock", "w") as lock:
            import fcntl
            wanted.set()
            fcntl.flock(lock, fcntl.LOCK_EX)
            order.append("begins")

    real = watch._remove

    def slow(item, within):
        if not order:
            threading.Thread(target=begin).start()
            wanted.wait(10)
            time.sleep(0.2)
        order.append("removes")
        real(item, within)

    monkeypatch.setattr(watch, "_remove", slow)
    watch.clean(tmp_path, checkpoints=True)
    for _ in range(100):
        if "begins" in order:
            break
        time.sleep(0.05)
    assert order == ["removes"] * 6 + ["begins"]
