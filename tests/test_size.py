"Plans and tables of any size: they cost their size, not its square, and what nobody means is refused at once, with the number."
import json
import os
import time
from pathlib import Path

import pytest

from prx_nb.lab import ablations, cli, plan, sweep, watch

MANY = 9_900


@pytest.fixture
def cost():
    "Seconds of this process's own work since it was last asked."
    begin = [time.process_time()]

    def told():
        took, begin[0] = time.process_time() - begin[0], time.process_time()
        return took
    return told


def test_ten_thousand_runs_are_planned_shown_and_looked_at(tmp_path, cost):
    jobs = cli.planned(["prediction_target"], "smoke", "3333", out=tmp_path / "out")
    assert len(jobs) == 9_999 and len({j.key for j in jobs}) == len({j.out for j in jobs}) == 9_999
    assert "9999 runs" in cli.plan_in_words(jobs, 10**9) and cost() < 30, "10 s on an idle core"
    some = jobs[::1000]
    assert [plan.plan("prediction_target", "smoke", [j.seed], [j.variant], out=tmp_path / "out", timeout=900)[0] for j in some] == some, "as if planned alone"
    for n, job in enumerate(jobs):
        folder = Path(job.out)
        folder.mkdir(parents=True)
        (folder / "job.json").write_text("{}")
        (folder / "status.json").write_text(json.dumps({"state": "queued" if n % 2 else "done", "key": job.key}))
    cost()
    rows = watch.survey(tmp_path / "out")
    assert len(rows) == 9_999 and len(watch.as_text(rows).splitlines()) > 100 and cost() < 30


def test_a_grid_and_a_file_of_many_entries_cost_their_size(tmp_path, cost):
    values = ", ".join(f"{0.001 + i * 1e-5:.6f}" for i in range(50))
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"runs:\n  - {{ablation: prediction_target, preset: smoke, seeds: 1, variants: [v], grid: {{optimizer.lr: [{values}], train.steps: {list(range(20, 60))}}}}}\n")
    assert len({j.key for j in cli.planned([str(grid)], out=tmp_path)}) == 2000 and cost() < 15
    entries = tmp_path / "entries.yaml"
    entries.write_text("runs:\n" + "".join(f"  - {{ablation: prediction_target, preset: smoke, seeds: 1, variants: [v], label: l{i}}}\n" for i in range(2000)))
    assert len(cli.planned([str(entries)], out=tmp_path)) == 2000 and cost() < 15
    entries.write_text(entries.read_text().replace("label: l1999", "label: l0"))
    with pytest.raises(sweep.SweepError, match="entry 2000.*same folder as entry 1, prediction_target/smoke@l0/v-s0"):
        sweep.read(entries)


@pytest.mark.parametrize("seeds, number", [("100000", "300,000"), (str(10**30), f"{3 * 10**30:,}"), (",".join(map(str, range(4000))), "12,000")])
def test_too_many_seeds_are_refused_with_the_number(seeds, number, cost):
    with pytest.raises(ValueError, match=f"{number} runs .*10,000"):
        cli.planned(["prediction_target"], "smoke", seeds)
    assert cost() < 5


def test_too_many_runs_of_several_names_are_refused(tmp_path, cost):
    with pytest.raises(sweep.SweepError, match="10,000 is the most"):
        cli.planned(["prediction_target", "repa"], "smoke", "2500", out=tmp_path)
    assert cost() < 20


FILES = {"anchors that unfold": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)) + "runs: *a9\n",
         "an anchor within itself": "runs: &a [*a]\n",
         "a mapping of 10^5": "runs: [{ablation: prediction_target}]\nset: {" + ", ".join(f"k{i}: 1" for i in range(90_000)) + "}\n",
         "a list of 10^5": "runs: [" + ",".join("x" for i in range(100_000)) + "]\n",
         "nested 10^5 deep": "runs: " + "[" * 100_000,
         "a key twice": "runs: []\n" + "\n".join(f"k{i}: 1" for i in range(3000)) + "\nk0: 1\n",
         "too large": "runs: []\n#" + "x" * 1_100_000,
         "entries that make too many": "runs:\n" + "".join(f"  - {{ablation: prediction_target, preset: smoke, variants: [v], label: l{i}, seeds: 3400}}\n" for i in range(3)),
         "one entry that makes too many": f"runs: [{{ablation: prediction_target, preset: smoke, seeds: {10**25}}}]\n",
         "a grid that makes too many": "runs: [{ablation: prediction_target, grid: {train.steps: " + str(list(range(1, 200))) + ", train.batch: " + str(list(range(1, 200))) + "}}]\n"}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_nobody_means_is_refused_at_once(tmp_path, what, cost):
    path = tmp_path / "s.yaml"
    path.write_text(FILES[what])
    cost()
    with pytest.raises(sweep.SweepError) as error:
        sweep.read(path)
    assert cost() < 10 and str(path) in str(error.value) and len(str(error.value)) < 3000


def test_a_pipe_or_a_folder_in_place_of_a_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.ipynb")
    for name in ("pipe.yaml", "folder.yaml"):
        with pytest.raises(sweep.SweepError, match=f"{name}: not a file"):
            sweep.read(tmp_path / name)
    with pytest.raises(ablations.AblationError, match="pipe.ipynb"):
        ablations.from_notebook(tmp_path / "pipe.ipynb")


OPTIONS = [("--seeds", ""), ("--preset", ""), ("--timeout", "0"), ("--timeout", "inf"), ("--timeout", "nan"), ("--cell-timeout", "0"), ("--variants", ""),
           ("--set", "train.steps=" + "[" * 60_000), ("--set", "train.steps=" + "9" * 5000), ("--seeds", "1e3"), ("--jobs", "0")]


@pytest.mark.parametrize("option, value", OPTIONS, ids=lambda v: v[:20])
def test_an_option_of_no_sense_is_one_line_and_not_taken_for_unsaid(tmp_path, option, value, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["ablate", "prediction_target", "--preset", "smoke", "--dry-run", "--out", str(tmp_path), option, value])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "unexpected" not in said and said.strip() and len(said) < 2000


def test_as_many_jobs_at_once_as_one_likes(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["ablate", "prediction_target", "--preset", "smoke", "--dry-run", "--out", str(tmp_path), "--jobs", str(10**12)])
    assert end.value.code == 0 and "runs in" in capsys.readouterr().out
