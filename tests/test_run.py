"One run with a real process and kernel: how it ends, what it leaves, who adopts it."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from toys import gone, kernel, toy, wait_for

from prx_nb.core.files import write_json
from prx_nb.lab import run as runs
from prx_nb.lab.plan import plan


ENDS = {"ok": "done", "raises": "cell error", "nan": "non-finite loss", "silent": "no record", "greedy": "out of memory",
        "dies": "dead kernel", "diesonce": "done"}


def test_every_way_to_end_is_told_apart(tmp_path):
    for job in plan(toy(tmp_path, *ENDS), overrides={"train.steps": 7}, out=tmp_path, timeout=200):
        lines = []
        said, folder = runs.supervise(job, threads=1, say=lines.append), Path(job.out)
        assert said["state"] == ENDS[job.variant], (job.variant, said) and said == runs.read_status(folder)
        assert said["attempt"] == (2 if job.variant in ("greedy", "dies", "diesonce") else 1) == len(said["history"]) + 1
        assert bool(lines) == (said["attempt"] == 2) and all("once more" in line for line in lines)
        assert f"hello from {job.variant} 0" in (folder / "log.txt").read_text() or job.variant.startswith("dies"), "a kernel that exits may take its words with it"
        assert gone(kernel(folder)) and gone(said["pid"]), "nothing is left running"
        assert not Path(said["scratch"]).exists() and not (folder / ".reserve").exists(), "nor lying about"
        tags = [tag for cell in nbformat.read(folder / "notebook.ipynb", 4).cells for tag in cell.metadata.get("tags", [])]
        assert "injected-parameters" in tags
        assert (folder / "notebook.attempt-1.ipynb").exists() == (said["attempt"] == 2)
        if job.variant == "raises":
            assert said["error"] == "RuntimeError: on purpose" and said["cell"] == 3 and not runs.finished(job)
        if job.variant == "ok":
            assert runs.record(folder)["overrides"] == {"train.steps": 7} and runs.finished(job)
            assert runs.end_in_words(job, said).endswith("s, KID[toy] 0.5")


def test_limits_of_time(tmp_path):
    [job] = plan(toy(tmp_path, "hangs"), out=tmp_path, timeout=6)
    said = runs.supervise(job)
    assert said["state"] == "timeout" and "6 s" in said["error"] and 6 <= said["seconds"] < 20 and said["attempt"] == 1
    [job] = plan(toy(tmp_path, "hangs"), out=tmp_path / "cell", timeout=100, cell_timeout=3)
    said = runs.supervise(job)
    assert said["state"] == "cell timeout" and said["seconds"] < 60
    assert gone(kernel(job.out))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_and_its_kernel(tmp_path, sign):
    [job] = plan(toy(tmp_path, "hangs"), out=tmp_path)
    child = runs._start(job, 1, None)
    pid = kernel(job.out)
    os.kill(runs.read_status(job.out)["pid"], sign)
    assert child.started.wait(20) == 1 and runs.read_status(job.out)["state"] == "interrupted"
    wait_for(lambda: gone(pid), 10)
    assert not Path(runs.read_status(job.out)["scratch"]).exists()


def test_one_who_attends_can_stop_it(tmp_path):
    [job] = plan(toy(tmp_path, "hangs"), out=tmp_path)
    stop = threading.Event()
    threading.Thread(target=lambda: (kernel(job.out), stop.set()), daemon=True).start()
    assert runs.supervise(job, stop=stop)["state"] == "interrupted"
    assert gone(kernel(job.out))


def test_a_killed_process_is_tried_once_more_and_then_said_to_be_killed(tmp_path):
    [job] = plan(toy(tmp_path, "hangs"), out=tmp_path)
    killed = []

    def kill():
        for _ in range(2):
            wait_for(lambda: runs.read_status(job.out).get("state") == "running" and runs.read_status(job.out)["pid"] not in killed)
            wait_for(lambda: (Path(job.out) / "tries").exists() and (Path(job.out) / "tries").read_text() == str(len(killed) + 1))
            killed.append(runs.read_status(job.out)["pid"])
            os.kill(killed[-1], signal.SIGKILL)
    threading.Thread(target=kill, daemon=True).start()
    said = runs.supervise(job)
    assert said["state"] == "killed" and "SIGKILL" in said["error"] and said["attempt"] == 2 and len(killed) == 2
    wait_for(lambda: gone(kernel(job.out)), 20)


def test_a_run_at_work_is_adopted_not_started_again(tmp_path):
    [job] = plan(toy(tmp_path, "lasts"), out=tmp_path)
    script = "import sys; from prx_nb.lab import run; run._start(run.read_job(sys.argv[1]), 1, None)"
    write_json(tmp_path / "job.json", __import__("dataclasses").asdict(job))
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "job.json")], check=True, timeout=60)
    wait_for(lambda: runs.read_status(job.out).get("state") == "running")
    pid, lines = runs.read_status(job.out)["pid"], []
    said = runs.supervise(job, say=lines.append)
    assert lines == ["lasts-s0 is at work already, adopted"]
    assert said["state"] == "done" and said["pid"] == pid and (Path(job.out) / "tries").read_text() == "1"


def test_an_adopted_run_that_is_killed_is_done_again(tmp_path):
    [job] = plan(toy(tmp_path, "slow"), out=tmp_path)
    child = runs._start(job, 1, None)
    kernel(job.out)
    child.started.kill()
    child.started.wait()
    assert runs.read_status(job.out)["state"] == "running" and not runs.alive(runs.read_status(job.out), job.out)
    assert runs.supervise(job)["state"] == "done"


def test_a_run_on_another_machine_is_believed_as_long_as_it_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SILENCE", 3)
    [job] = plan(toy(tmp_path, "ok"), out=tmp_path)
    far = {"state": "running", "key": job.key, "pid": 1, "born": 0.0, "host": "another machine", "memory_kills": 0}
    write_json(Path(job.out) / "status.json", far)
    begin, lines = time.monotonic(), []
    said = runs.supervise(job, say=lines.append, retries=0)
    assert time.monotonic() - begin > 2 and said["state"] == "host gone" and "another machine" in said["error"]
    write_json(Path(job.out) / "status.json", far)
    assert runs.supervise(job)["state"] == "done", "one more try, on this machine"


def test_a_pid_used_again_is_another_process(tmp_path):
    import psutil
    me = {"state": "running", "host": os.uname().nodename, "pid": os.getpid(), "born": psutil.Process().create_time()}
    write_json(tmp_path / "status.json", me)
    assert runs.alive(me, tmp_path) and not runs.alive(me | {"born": me["born"] - 100}, tmp_path)
    assert not runs.alive(me | {"pid": 2**22 + 1}, tmp_path) and not runs.alive({}, tmp_path)


@pytest.mark.parametrize("file, text", [("status.json", '{"state": "do'), ("record.json", '{"status": "done"'),
                                        ("record.json", '{"status": "running"}'), ("record.json", "[]")])
def test_half_written_files_never_count(tmp_path, file, text):
    [job] = plan(toy(tmp_path, "ok"), out=tmp_path)
    folder = Path(job.out)
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "done", "key": job.key}))
    (folder / "record.json").write_text(json.dumps({"status": "done"}))
    assert runs.finished(job)
    changed = plan(toy(tmp_path, "ok"), overrides={"train.steps": 3}, out=tmp_path)[0]
    assert changed.out == job.out and not runs.finished(changed), "done, but not this run"
    (folder / file).write_text(text)
    assert not runs.finished(job)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_is_told_and_the_status_still_written(tmp_path):
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        body = "import pathlib\nwith open(pathlib.Path(out) / 'big', 'wb', buffering=0) as f:\n    while True: f.write(b'x' * 4096)"
        [job] = plan(toy(tmp_path, "ok", body=body), out=disk)
        said = runs.supervise(job, retries=0)
        assert said["state"] == "disk full" and runs.read_status(job.out)["state"] == "disk full"
    finally:
        subprocess.run(["umount", "-l", str(disk)])
