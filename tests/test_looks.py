"Until decided: real batches of made-up numbers, looked at after 3, 5 and 8 seeds; killed, failed and started again."
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from toys import toy, wait_for

from prx_nb.lab import batch, cli, sweep
from prx_nb.lab import run as runs
from prx_nb.lab.ablations import AblationError
from prx_nb.lab.decision import decide
from prx_nb.lab.plan import plan

BODY = """
import json, pathlib, time
if variant == "raises" or variant == "half" and seed == 1: raise RuntimeError("on purpose")
size, scatter, start = {"base": (100, .01, 0), "far": (150, .01, 1), "near": (100, .01, 2), "torn": (106, .04, 3),
                        "wild": (104, .2, 1)}.get(variant, (100, .01, 4))
value = size * (1 + scatter * [1, -1, .5, -.5, .8, -.8, .3, -.3][(seed + start) % 8])
time.sleep(overrides.get("train.steps", 0) / 1000)
tries = pathlib.Path(out) / "tries"
tries.write_text(str(int(tries.read_text()) + 1 if tries.exists() else 1))
(pathlib.Path(out) / "record.json").write_text(json.dumps({"status": "done", "ablation": NAME, "variant": variant, "preset": preset,
    "seed": seed, "metrics": {"FD[toy]": value}, "cost": {"total_seconds": 1.0}}))
"""


def asked(folder, *variants, name="toy", seeds=8, **more):
    ablation = toy(folder, *variants, name=name, body=BODY.replace("NAME", repr(name)))
    return plan(ablation, seeds=seeds, out=folder, timeout=200, until=True, **more)


def drive(jobs, said, at_once=2):
    start = lambda some: batch.run(some, at_once, prepare=None, say=lambda line: None)
    return batch.until_decided(jobs, start, cli._answers, said.append)


def seeds(folder):
    return dict(Counter(p.parent.name.rpartition("-s")[0] for p in Path(folder).glob("*/record.json")))


def test_seeds_are_added_for_what_is_undecided_only(tmp_path):
    said = []
    jobs = asked(tmp_path, "base", "far", "near", "torn") + asked(tmp_path, "base", "wild", name="other", seeds=5, baseline_seeds=4)
    ran, statuses = drive(jobs, said)
    assert seeds(tmp_path / "toy/smoke") == {"base": 5, "far": 3, "near": 3, "torn": 5}
    assert seeds(tmp_path / "other/smoke") == {"base": 5, "wild": 5}
    assert len(ran) == 26 and {s["state"] for s in statuses} == {"done"}
    text = "\n".join(said)
    assert said[0] == "toy/smoke: look at 3 seeds, FD[toy]" and "far worse: +49" in said[1] and "near equivalent within 5%" in said[2]
    assert "torn undecided" in said[3] and said[4].strip() == "more seeds: 2 of base, 2 of torn"
    assert "more seeds: 2 of wild, 1 of base" in text, "the baseline had four at once"
    assert "look at 5 seeds" in text and "torn worse" in text and "all decided" in text and "no more seeds: wild not decided" in text
    again = []
    drive(jobs, again)
    assert again == said, "started again it comes the same way"
    assert {p.read_text() for p in tmp_path.rglob("tries")} == {"1"}, "and runs nothing twice"


def test_failed_runs_do_not_hang_it(tmp_path):
    said = []
    ran, statuses = drive(asked(tmp_path, "base", "raises", "half", seeds=5), said)
    assert "raises no run of it ended well" in said[1].strip() and "half" in said[2]
    assert Counter(s["state"] for s in statuses)["cell error"] >= 4 and len({j.out for j in ran if j.variant == "raises"}) == 3
    said.clear()
    ran, statuses = drive(asked(tmp_path, "raises", "base", "far", name="bad"), said)
    assert len(ran) == 9 and "no run of the baseline raises ended well: nothing can be decided" in said[1]


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_looks import asked, drive
class Out(list):
    def append(self, line): print(line, flush=True)
drive(asked(Path(sys.argv[1]), "base", "torn", overrides={{"train.steps": 400}}), Out())
"""


def test_a_killed_driver_is_started_again_where_it_was(tmp_path):
    script = DRIVER.format(tests=str(Path(__file__).parent))
    first = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    before = next(iter(first.stdout)) + next(iter(first.stdout)) + next(iter(first.stdout))
    assert "look at 3 seeds" in before and "more seeds: 2 of base, 2 of torn" in before
    wait_for(lambda: (tmp_path / "toy/smoke/torn-s3/status.json").exists())
    time.sleep(0.5)
    first.kill()
    first.communicate(timeout=30)
    said = []
    drive(asked(tmp_path, "base", "torn", overrides={"train.steps": 400}), said)
    assert "\n".join(said[:3]) + "\n" == before and "look at 5 seeds" in said[3]
    assert {p.read_text() for p in tmp_path.rglob("tries")} == {"1"}


def test_what_is_read_at_a_look_is_of_that_look(tmp_path):
    "Runs beyond it that lie there, as a kill leaves them, are not read."
    jobs, read = asked(tmp_path, "base", "near", seeds=8), []
    for job in jobs:
        os.makedirs(job.out)
        for name, value in {"record": {"status": "done"}, "status": {"state": "done", "key": job.key}}.items():
            batch.write_json(f"{job.out}/{name}.json", value)
    def answers(done):
        read.append(sorted(job.name for job in done))
        return "FD", {}
    batch.until_decided(jobs, lambda some: [runs.read_status(j.out) for j in some], answers, lambda line: None)
    assert [len(r) for r in read] == [6, 10, 16]


def test_a_question_that_was_decided_too_early_goes_on(tmp_path):
    "A first look borrows scatter from fewer questions than the report: what does not hold at the end is taken up again."
    jobs = asked(tmp_path, "base", "near", seeds=5) + asked(tmp_path, "base", "wild", name="other", seeds=5)
    begun, said = [], []
    def start(some):
        begun.append(Counter(job.group.parent.name for job in some))
        for job in some:
            os.makedirs(job.out, exist_ok=True)
            for name, value in {"record": {"status": "done"}, "status": {"state": "done", "key": job.key}}.items():
                batch.write_json(f"{job.out}/{name}.json", value)
        return [runs.read_status(job.out) for job in some]
    firm, open_ = decide([1, 1.01, .99], [1, 1.01, .99], False, .05), decide([1, 1.3, .8], [1, 1.3, .8], False, .05)
    def read(done):
        name, n = done[0].group.parent.name, len(done)
        early = name == "toy" and n == 6 and sum(map(sum, map(Counter.values, begun))) == 12
        return "FD", {"near" if name == "toy" else "wild": firm if early or n == 10 else open_}
    batch.until_decided(jobs, start, read, said.append)
    assert begun == [{"toy": 6, "other": 6}, {"other": 4}, {"toy": 4}]
    assert [line for line in said if "look at" in line][3] == "again toy/smoke: look at 3 seeds, FD" and said[-1].strip() == "all decided"


@pytest.mark.parametrize("words, more", [
    ("seeds = 6 with until = decided: it is the last look, one of 3, 5, 8", dict(seeds=6)),
    ("seeds = \\[0, 1\\] with until", dict(seeds=[0, 1])),
    ("needs the baseline 'base' and another variant", dict(variants=["base"])),
    ("baseline_seeds = 2: .* at least the 3 seeds", dict(baseline_seeds=2)),
])
def test_bad_designs_are_refused(tmp_path, words, more):
    with pytest.raises(AblationError, match=words):
        asked(tmp_path, "base", "far", **more)


def test_a_sweep_file_says_it_too(tmp_path):
    text = "{}\nruns:\n  - {{ablation: null_check, preset: smoke{}}}\n"
    write = lambda head, more="": (tmp_path / "s.yaml").write_text(text.format(head, more)) and tmp_path / "s.yaml"
    jobs = sweep.read(write("until: decided\nbaseline_seeds: 6")).jobs(tmp_path)
    assert Counter((j.variant, j.look) for j in jobs) == {("a", 3): 6, ("a", 8): 2, ("b", 3): 3, ("b", 5): 2, ("b", 8): 3}
    assert {j.recipe["seed"] - j.seed for j in jobs if j.variant == "b"} == {1000}, "a null check has other seeds"
    assert {j.look for j in sweep.read(write("until: decided", ", until: null, seeds: 4")).jobs(tmp_path)} == {0}
    for head, more, words in (("until: soon", "", "until = 'soon': should be 'decided'"), ("until: decided\nseeds: 4", "", "one of 3, 5, 8"),
                              ("until: decided", ", variants: [a]", "needs the baseline 'a'"),
                              ("seeds: 3", ", baseline_seeds: 2", "baseline_seeds = 2")):
        with pytest.raises(sweep.SweepError, match=words):
            sweep.read(write(head, more))


def command(*arguments):
    done = subprocess.run([str(Path(sys.executable).parent / "prx-nb"), *map(str, arguments)], capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_the_command_line(tmp_path):
    base = ["ablate", "prediction_target", "--preset", "smoke", "--out", tmp_path, "--until"]
    code, out = command(*base, "decided", "--baseline-seeds", "4", "--dry-run")
    assert code == 0 and "10 runs" in out and "first look of 3, 5, 8 seeds" in out and "at most 14 runs more" in out
    assert not list(tmp_path.iterdir())
    for more, words in ((["soon"], "--until soon: expected decided"), (["decided", "--seeds", "4"], "one of 3, 5, 8"),
                        (["decided", "--executor", "slurm"], "add --wait")):
        code, out = command(*base, *more)
        assert code == 2 and words in out and len(out.strip().splitlines()) == 1, out
    assert command("ablate", "sweeps/weekend.yaml", "--until", "decided")[0] == 2
