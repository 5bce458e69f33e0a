"Ends and noises of real processes: what stops a kernel from outside is an interruption, what prints too much or too early harms nobody, and one bad record stops no other run."
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from toys import toy, wait_for

from prx_nb.lab import batch, plan, run

RECORD = "import json, pathlib\n(pathlib.Path(out) / 'record.json').write_text(json.dumps({'status': 'done', 'metrics': {'KID[toy]': 0.5}}))\n"


def quiet(line):
    pass


@pytest.mark.parametrize("how", ["a signal to the kernel", "raised"])
def test_an_interrupted_kernel_is_no_cell_error_and_goes_on_at_the_next_call(tmp_path, how):
    wait = "(pathlib.Path(out) / 'up').write_text(str(os.getpid())); time.sleep(600)" if how != "raised" else "raise KeyboardInterrupt"
    body = f"import os, pathlib, time\nif not (pathlib.Path(out) / 'again').exists():\n    (pathlib.Path(out) / 'again').touch(); {wait}\n" + RECORD
    [job] = plan.plan(toy(tmp_path, "ok", body=body), out=tmp_path, timeout=300)
    if how != "raised":
        def stop():
            wait_for(lambda: (Path(job.out) / "up").exists() and (Path(job.out) / "up").read_text())
            time.sleep(0.5)
            os.kill(int((Path(job.out) / "up").read_text()), signal.SIGINT)
        threading.Thread(target=stop, daemon=True).start()
    said = batch.run([job], prepare=None, say=quiet)[0]
    assert said["state"] == "interrupted" and "KeyboardInterrupt" in said["error"] and not batch.failed_for_good(job)
    assert batch.run([job], prepare=None, say=quiet)[0]["state"] == "done"


@pytest.mark.parametrize("loop", ["print('x' * 1000)", "os.write(1, b'y' * 100_000)", "display(HTML('z' * 100_000))"])
def test_a_cell_that_says_too_much_is_cut_with_a_word(tmp_path, loop):
    body = f"import os, time\nfrom IPython.display import HTML, display\nfor _ in range(40_000 if 'print' in {loop!r} else 400): {loop}\ntime.sleep(1)\n" + RECORD
    [job] = plan.plan(toy(tmp_path, "ok", body=body), out=tmp_path, timeout=200)
    assert batch.run([job], prepare=None, say=quiet)[0]["state"] == "done", "it may go on, unheard"
    log, notebook = (Path(job.out) / name for name in ("log.txt", "notebook.ipynb"))
    assert log.stat().st_size < 20_000_000 and notebook.stat().st_size < 20_000_000
    assert "[cut: " in (log if "os.write" in loop else notebook).read_text() and "end" in log.read_text()[-200:], "the next cell is heard again"


def test_a_clock_that_jumps_ends_no_run(tmp_path, monkeypatch):
    [job] = plan.plan(toy(tmp_path, "ok", body="import time; time.sleep(3)\n" + RECORD), out=tmp_path, timeout=60)
    Path(job.out).mkdir(parents=True)
    now, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + jump[0])
    for jump[0] in (7200.0, -7200.0):
        reporter = run._Reporter(job, "")
        reporter.finish("done")
        assert 0 <= run.read_status(job.out)["seconds"] < 10
    me = {"state": "running", "host": os.uname().nodename, "pid": os.getpid()} | run.birth()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 12345.0)
    assert run.alive(me, tmp_path), "the process is known by when it began after the boot, whatever the clock says"
    assert not run.alive(me | {"ticks": me["ticks"] + 1}, tmp_path) and not run.alive(me | {"boot": "another"}, tmp_path)


def test_what_prints_while_python_starts_harms_nobody(tmp_path, monkeypatch, capfd):
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text("import sys\nprint('hello')\nprint('{\"ready\": 1', end='', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "early"), str(Path(run.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    [job] = plan.plan(toy(tmp_path, "ok", body=RECORD), out=tmp_path)
    begin = time.monotonic()
    assert batch.run([job], prepare=None, say=quiet)[0]["state"] == "done" and time.monotonic() - begin < 100
    assert "Traceback" not in capfd.readouterr().err

    from prx_nb.core import images
    helper = images._helper()
    try:
        made = str(tmp_path / "shard.npz")
        images._feed(helper, iter([{"path": made, "jobs": [], "size": 8}]), threading.Lock(), lambda n: None)
        assert Path(made).exists(), "a line of somebody else's is no answer"
    finally:
        helper.kill()
        helper.wait()


@pytest.mark.parametrize("value", ["None", "'low'", "[1]", "float('nan')"])
def test_one_senseless_record_stops_no_other_run(tmp_path, value):
    body = "import json, pathlib\nv = " + value + " if variant == 'bad' else 0.5\n(pathlib.Path(out) / 'record.json').write_text(json.dumps({'status': 'done', 'metrics': {'KID[toy]': v}}))"
    jobs, lines = plan.plan(toy(tmp_path, "good", "bad", "late", body=body), out=tmp_path), []
    said = batch.run(jobs, prepare=None, say=lines.append)
    assert [s["state"] for j, s in zip(jobs, said) if j.variant != "bad"] == ["done", "done"]
    assert any("bad-s0 done" in line for line in lines)


def test_a_fault_in_looking_after_one_run_is_that_runs_alone(tmp_path, monkeypatch):
    jobs, lines, real = plan.plan(toy(tmp_path, "a", "b", body=RECORD), out=tmp_path), [], run.supervise
    monkeypatch.setattr(run, "supervise", lambda job, *a, **k: 1 / 0 if job.variant == "a" else real(job, *a, **k))
    batch.run(jobs, prepare=None, say=lines.append)
    assert any("a-s0 NOT STARTED" in line and "ZeroDivisionError" in line for line in lines) and run.finished(jobs[1])


def test_a_full_disk_names_the_run_and_is_not_a_kill(tmp_path, monkeypatch):
    import subprocess
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        jobs, lines = plan.plan(toy(tmp_path, "a", "b", body=RECORD), out=disk), []
        (disk / "fill").write_bytes(bytes(150_000))
        said = batch.run(jobs, prepare=None, say=lines.append)
        ends = [line for line in lines if "after" in line]
        assert {s["state"] for s in said} <= {"disk full", "done"} and not any("KILLED" in line for line in lines)
        assert all(str(disk) in line for line in ends if "FULL" in line)
    except OSError as error:                          # it was full before the first run began: the file is named
        assert str(disk) in str(error)
    finally:
        subprocess.run(["umount", "-l", str(disk)])
