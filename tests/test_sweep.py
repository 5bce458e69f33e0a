"Sweep files: every fault is found and said before anything runs; points, order and estimates are what they promise."
import itertools
import json
import random
import re
import string
from collections import Counter
from pathlib import Path

import pytest
import yaml

from prx_nb.core import recipe as recipes
from prx_nb.lab import ablations, plan, sweep

ROOT = Path(__file__).parents[1]


def write(tmp_path, text, name="some.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def faults(tmp_path, text, name="some.yaml"):
    path = write(tmp_path, text, name)
    with pytest.raises(sweep.SweepError) as error:
        sweep.read(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


ONE = "runs: [{{ablation: prediction_target, {}}}]"


@pytest.mark.parametrize("text, words", [
    ("", ["is None, not a mapping"]),
    ("- a\n- b", ["is ['a', 'b'], not a mapping"]),
    ("runs: []", ["runs", "at least one"]),
    ("runs: {ablation: x}", ["runs", "should be a list"]),
    ("name: a", ["'runs' is missing"]),
    ("name: ../up\nruns: [{ablation: prediction_target}]", ["name = '../up'", "letters"]),
    ("sedes: 3\nruns: [{ablation: prediction_target}]", ["no field 'sedes'", "did you mean 'seeds'"]),
    ("runs: [{preset: cpu}]", ["entry 1", "'ablation' is missing"]),
    ("runs: [{ablation: predict_target}]", ["entry 1 (predict_target)", "did you mean 'prediction_target'"]),
    (ONE.format("presets: cpu"), ["entry 1 (prediction_target)", "no field 'presets'", "did you mean 'preset'"]),
    (ONE.format("preset: huge"), ["preset = 'huge'", "smoke, cpu, gpu, paper"]),
    (ONE.format("variants: [v, w]"), ["variants = 'w'", "v, x, eps"]),
    (ONE.format("variants: v"), ["variants = 'v'", "a list of variants"]),
    (ONE.format("variants: []"), ["variants = []", "at least one"]),
    (ONE.format("variants: [v, v]"), ["'v' is in the list twice"]),
    (ONE.format("seeds: 0"), ["seeds = 0", "1 or more"]),
    (ONE.format("seeds: [1, 1]"), ["seeds = [1, 1]", "different"]),
    (ONE.format("seeds: [-1]"), ["seeds = [-1]"]),
    (ONE.format("seeds: true"), ["seeds = True"]),
    (ONE.format("seeds: '3'"), ["seeds = '3'"]),
    (ONE.format("seeds: []"), ["seeds = []"]),
    (ONE.format("timeout: 0"), ["timeout = 0", "greater than 0"]),
    (ONE.format("cell_timeout: soon"), ["cell_timeout = 'soon'", "number"]),
    (ONE.format("label: a/b"), ["label = 'a/b'"]),
    (ONE.format("set: [a]"), ["set = ['a']", "should be a mapping"]),
    (ONE.format("set: {train.step: 3}"), ["set", "no field 'train.step'", "did you mean 'train.steps'"]),
    (ONE.format("set: {train: {steps: 3}}"), ["no field 'train'"]),
    (ONE.format("set: {train.steps: -3}"), ["'train.steps' = -3"]),
    (ONE.format("set: {flow.prediction: x}"), ["set.flow.prediction", "the ablation 'prediction_target' sets it itself"]),
    (ONE.format("set: {flow.loss: x}"), ["the ablation 'prediction_target' sets it itself"]),
    (ONE.format("set: {seed: 3}"), ["'seeds' sets it"]),
    (ONE.format("grid: {optimizer.lr: []}"), ["grid.optimizer.lr = []", "at least one"]),
    (ONE.format("grid: {optimizer.lr: 1e-3}"), ["grid.optimizer.lr = 0.001", "a list of values"]),
    (ONE.format("grid: {optimizer.lr: [1e-3, 0.001]}"), ["'0.001' is in the list twice"]),
    (ONE.format("grid: {optimizer.lr: [1, 1.0]}"), ["optimizer.lr=1 and optimizer.lr=1.0 are the same runs"]),
    (ONE.format("grid: {optimizer.rl: [1e-3]}"), ["grid", "no field 'optimizer.rl'", "did you mean 'optimizer.lr'"]),
    (ONE.format("grid: {flow.prediction: [x]}"), ["grid.flow.prediction", "sets it itself"]),
    (ONE.format("grid: {optimizer.lr: [1e-3]}, set: {optimizer.lr: 2e-3}"), ["'set.optimizer.lr' sets it already"]),
    (ONE.format("grid: {denoiser.num_heads: [2, 3]}"), ["num_heads = 3", "at denoiser.num_heads=3"]),
    (ONE.format("pairs: {caption_length: []}"), ["pairs.caption_length = []"]),
    (ONE.format("pairs: {caption_length: [tiny]}"), ["pairs.caption_length = 'tiny'", "dense, long, short, mixed"]),
    (ONE.format("pairs: {caption_lengths: [short]}"), ["pairs = 'caption_lengths'", "did you mean 'caption_length'"]),
    (ONE.format("pairs: {prediction_target: [x]}"), ["cannot be paired with itself"]),
    (ONE.format("pairs: {null_check: [a, b]}"), ["pairs.null_check", "differ in their seeds"]),
    (ONE.format("pairs: {caption_length: [short]}, grid: {captions.kind: [long]}"), ["pairs.caption_length", "'grid.captions.kind' sets it already"]),
    (ONE.format("seeds: 5000"), ["15,000 runs", "10,000"]),
    ("runs: [{ablation: prediction_target}, {ablation: prediction_target, seeds: [1, 5]}]", ["entry 2", "same folder as entry 1"]),
    ("runs: [{ablation: prediction_target}, 7]", ["entry 2: is 7"]),
    ("runs: [{ablation: a}\n", ["line 2"]),
    ("runs: 1\nruns: 2", ["'runs' is given twice"]),
    ("runs: &a [*a]", ["an anchor is used within itself"]),
    ("a: !!python/object/apply:os.system [ls]", ["constructor"]),
    ("runs: [{ablation: prediction_target, [1]: 2}]", []),
    ("1: 2\nruns: [{ablation: prediction_target}]", ["1"]),
])
def test_a_fault_is_one_line_that_says_where(tmp_path, text, words):
    [line] = faults(tmp_path, text)
    for word in words:
        assert word in line, line


def test_unreadable_files_are_one_line(tmp_path):
    assert "No such file" in str(pytest.raises(sweep.SweepError, sweep.read, tmp_path / "none.yaml").value)
    assert "ends in .yaml, .yml or .toml" in faults(tmp_path, "", "a.json")[0]
    assert "line 1" in faults(tmp_path, "a = = 2", "a.toml")[0]
    (tmp_path / "folder.yaml").mkdir()
    assert "not a file" in str(pytest.raises(sweep.SweepError, sweep.read, tmp_path / "folder.yaml").value)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    assert "not UTF-8" in str(pytest.raises(sweep.SweepError, sweep.read, tmp_path / "bytes.yaml").value)


def test_all_faults_of_a_file_come_at_once(tmp_path):
    lines = faults(tmp_path, """
name: a b
sedes: 3
timeout: -1
runs:
  - {ablation: prediction_targte, seeds: 0, preset: huge}
  - {ablation: prediction_target, variants: [z], set: {train.step: 1, train.steps: -1, flow.loss: x}, grid: {optimizer.lr: [fast], ema.decay: []}}
  - {ablation: prediction_target}
  - {ablation: prediction_target, pairs: {caption_length: [tiny, short], nothing: [a]}}
  - {ablation: prediction_target, seeds: [1]}
""")
    told = Counter(re.match(r"entry \d", line)[0] if line.startswith("entry") else "file" for line in lines)
    assert told == {"file": 3, "entry 1": 3, "entry 2": 5, "entry 4": 2, "entry 5": 1}
    numbers = [int(line[6]) for line in lines if line.startswith("entry")]
    assert numbers == sorted(numbers)


def random_tree(rng, depth=0):
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [random_tree(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(["a", "b c", "runs", "train.steps", "", "é"]): random_tree(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [None, True, False, rng.randrange(-10**6, 10**6), rng.uniform(-1, 1) * 10 ** rng.randrange(-20, 20),
            "".join(rng.choices(string.printable[:94], k=rng.randrange(8))), rng.choice(["no", "on", "1:30", "010", "1e3", "2024-01-01", "~", "null"])][kind]


def test_yaml_reads_json_as_json_does(tmp_path):
    rng = random.Random(0)
    for _ in range(400):
        tree = {"top": random_tree(rng)}
        assert yaml.load(json.dumps(tree, ensure_ascii=False), sweep._Yaml) == tree


def test_whatever_a_file_holds_is_read_or_refused_in_words(tmp_path):
    rng = random.Random(1)
    values = {"ablation": ["prediction_target", "null_check", "x", 3, None], "preset": ["smoke", "cpu", [], 1], "seeds": [1, [0, 2], -1, "a", {}],
              "variants": [None, ["v"], ["a", "b"], [], "v", [1]], "label": ["", "a", "a b", 3], "set": [{}, {"train.steps": 3}, {"x": 1}, [1], {1: 2}, None],
              "grid": [{}, {"optimizer.lr": [0.1, 0.2]}, {"optimizer.lr": [{}]}, {"optimizer.lr": None}, [], {"data.styles": [["noto"], ["fluent"]]}],
              "pairs": [{}, {"caption_length": ["short"]}, {"caption_length": [3]}, {"null_check": ["a"]}, 3], "timeout": [1, 0, "x"], "extra": [1]}
    good = 0
    for _ in range(300):
        entries = [{k: rng.choice(v) for k, v in values.items() if rng.random() < 0.35} | ({"ablation": "prediction_target"} if rng.random() < 0.8 else {})
                   for _ in range(rng.randrange(1, 3))]
        path = write(tmp_path, yaml.safe_dump({"runs": entries}))
        try:
            read = sweep.read(path)
            good += 1
            assert len(read.runs) == len(entries) and all(ablations.recipe(ablations.get(e.ablation), v, e.preset, 0, p.overrides)
                                                          for e in read.runs for p in sweep.points(e) for v in e.variants or ablations.get(e.ablation).variants)
        except sweep.SweepError as error:
            assert all(line.startswith(f"{path}: ") for line in str(error).splitlines())
    assert good > 10


def test_toml_and_yaml_say_the_same(tmp_path):
    one = sweep.read(write(tmp_path, "seeds: 3\nruns:\n- {ablation: prediction_target, timeout: 60, grid: {optimizer.lr: [1e-3, 2e-3]}, pairs: {caption_length: [short]}}"))
    two = sweep.read(write(tmp_path, 'seeds = 3\n[[runs]]\nablation = "prediction_target"\ntimeout = 60\n[runs.grid]\n"optimizer.lr" = [1e-3, 2e-3]\n'
                           '[runs.pairs]\ncaption_length = ["short"]\n', "some.toml"))
    assert one == two and one.name == "some" and one.runs[0].seeds == 3


def test_names_of_points_differ_and_can_be_folders(tmp_path):
    rng = random.Random(2)
    odd = ["", ".", "..", "/", "a/b", "a\\b", "CON", "~", "é", "\n", "x" * 300, "x" * 299 + "y", 1, 1.5, -1, 1e-30, None, True, False, [1, 2], [1, [2]], {"a": 1}]
    values = odd + [random_tree(rng) for _ in range(300)]
    different = {json.dumps(v, sort_keys=True) if not isinstance(v, str) else v for v in values}
    words = {sweep.word(v) for v in values}
    assert len(words) == len(different)
    for word in words:
        (tmp_path / f"cpu@axis={word}").mkdir()
        assert re.fullmatch(r"[A-Za-z0-9._+~-]+", word) and not word.startswith(".") and len(word) <= 24
    assert len(list(tmp_path.iterdir())) == len(words)
    long = {sweep.label({f"some.long.axis{i}": i * j for i in range(20)}) for j in range(50)}
    assert len(long) == 50 and max(map(len, long)) <= 120
    assert sweep.label({"optimizer.lr": 0.002, "caption_length": "short"}) == "optimizer.lr=0.002,caption_length=short"


def test_points_are_all_combinations_with_a_baseline_each(tmp_path):
    read = sweep.read(write(tmp_path, "runs: [{ablation: prediction_target, preset: smoke, seeds: [7, 3], set: {train.steps: 5}, variants: [v, x], label: L, "
                                      "grid: {optimizer.lr: [1e-3, 2e-3], ema.decay: [0.5, 0.9]}, pairs: {caption_length: [short, mixed]}}]"))
    jobs = read.jobs(out=tmp_path / "out", timeout=50, cell_timeout=5)
    expected = set()
    for lr, decay, kind in itertools.product((1e-3, 2e-3), (0.5, 0.9), ("short", "mixed")):
        for variant, seed in itertools.product("vx", (7, 3)):
            expected.add((f"smoke@L,optimizer.lr={lr},ema.decay={decay},caption_length={kind}", f"{variant}-s{seed}", lr, decay, kind, seed, variant))
    flat = lambda job: [recipes.flatten(job.recipe)[k] for k in ("optimizer.lr", "ema.decay", "captions.kind", "seed", "flow.prediction")]
    assert {(j.group.name, j.name, *flat(j)) for j in jobs} == expected and len(jobs) == 32
    assert all(j.recipe["train"]["steps"] == 5 and (j.timeout, j.cell_timeout) == (50, 5) for j in jobs)
    assert len({j.out for j in jobs}) == len({j.key for j in jobs}) == 32
    assert [j.seed for j in jobs] == [7] * 16 + [3] * 16, "a whole grid for one seed, then for the next"
    for stop in range(0, 33, 2):                                   # stopped after any pair: pairs are whole
        found = Counter((j.group, j.seed) for j in jobs[:stop])
        assert set(found.values()) <= {2}
    assert not (tmp_path / "out").exists()


def test_what_the_file_says_for_all_stands_unless_an_entry_says_otherwise(tmp_path):
    read = sweep.read(write(tmp_path, "out: there\npreset: smoke\nseeds: 1\ntimeout: 9\nruns:\n- {ablation: caption_length, variants: [dense, short]}\n"
                                      "- {ablation: prediction_target, variants: [v], seeds: [4], timeout: 7, cell_timeout: 3, preset: cpu}\n"))
    jobs = read.jobs(limits={"smoke": 1, "cpu": 2})
    assert [(j.preset, j.seed, j.timeout, j.cell_timeout) for j in jobs] == [("smoke", 0, 9, None)] * 2 + [("cpu", 4, 7, 3)]
    assert all(j.group.parents[1] == Path.cwd() / "there" for j in jobs)
    bare = sweep.read(write(tmp_path, "runs: [{ablation: caption_length, preset: smoke}]"))
    assert {j.timeout for j in bare.jobs(limits={"smoke": 5})} == {5} and {j.timeout for j in bare.jobs(timeout=4, limits={"smoke": 5})} == {4}


def test_the_shipped_sweep_is_right_and_its_commands_exist():
    path = ROOT / "sweeps" / "weekend.yaml"
    jobs = sweep.read(path).jobs()
    assert len(jobs) == 45 + 10 + 10 + 40 and len({j.out for j in jobs}) == len(jobs)
    import typer.main

    from prx_nb.lab.cli import app
    commands = typer.main.get_command(app).commands
    told = re.findall(r"prx-nb (\w+)((?: --[\w-]+)*)", path.read_text())
    assert {name for name, _ in told} <= set(commands)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_is_a_plan_with_a_name_of_its_own(path):
    read = sweep.read(path)
    jobs = read.jobs()
    assert read.name == path.stem and len({j.out for j in jobs}) == len(jobs) > 20
    assert {entry.ablation for entry in read.runs} == {j.group.parent.name for j in jobs}


def put_record(folder, seconds, training, images, status=None, **facts):
    folder.mkdir(parents=True)
    facts = {"status": "done", "ablation": "prediction_target", "preset": "cpu", "variant": "v", "hardware": "abacus"} | facts
    (folder / "record.json").write_text(json.dumps(facts | {"cost": {"total_seconds": seconds, "train_seconds": training, "images_seen": images}}))
    if status:
        (folder / "status.json").write_text(json.dumps(status))


def test_estimates_follow_the_closest_records(tmp_path):
    jobs = lambda **kw: plan.plan("prediction_target", "cpu", 1, ["v"], out=tmp_path, **kw)
    guess = lambda **kw: sweep.seconds_each(jobs(**kw), sweep.history(tmp_path))[0][0]
    published = guess()
    assert published and "published" in sweep.estimate(jobs(), tmp_path)[1]
    home = tmp_path / "prediction_target"
    put_record(home / "cpu@a" / "x-s0", 30, 20, 32000, variant="x")
    assert guess() == 30
    put_record(home / "cpu@a" / "v-s0", 50, 20, 32000, {"state": "done", "seconds": 60})
    assert guess() == 60, "the whole run's seconds, kernel and all"
    put_record(home / "cpu" / "v-s0", 100, 80, 32000)
    put_record(home / "cpu" / "v-s1", 140, 80, 32000)
    put_record(home / "cpu" / "v-s2", 999, 80, 32000, status={"state": "done"})
    put_record(home / "cpu" / "v-s3", 1, 1, 32000)
    assert guess() == 120, "the median of 1, 100, 140 and 999"
    assert guess(overrides={"train.steps": 3000}) > guess(), "twice the images"
    for broken in ("{", "[]", '{"status": "done"}', ""):
        (home / "cpu" / "v-s3" / "record.json").write_text(broken)
        assert guess() == 140
    one = [p for p in sweep.history(tmp_path) if p.seconds == 100][0]
    assert one.for_images(64000) == 180 and one.for_images(0) == 20
    assert (one.for_images(64000, 30), one.for_images(64000, 500)) == (50, 180), "by the clock: no longer than its budget"
    assert guess(overrides={"train.steps": 50000, "train.seconds": 30.0}) == pytest.approx(90), "the rest of each run, and 30 s"
    seconds, words = sweep.estimate(jobs() * 4, tmp_path, at_once=2)
    assert seconds == 280 and words.startswith("about 4.7 min with 2 at a time (9.3 min of work), judged by earlier runs on abacus")
    mixed = jobs() + plan.plan("prediction_target", "paper", 1, ["v"], out=tmp_path)
    assert sweep.estimate(mixed, tmp_path)[1].startswith("at least") and "unknown for 1 runs of prediction_target at preset paper" in sweep.estimate(mixed, tmp_path)[1]
    assert sweep.estimate(mixed[1:], tmp_path)[0] is None


def test_estimates_of_a_new_ablation_come_from_others_at_its_preset(tmp_path):
    _, words = sweep.estimate(plan.plan("caption_length", "cpu", 1, ["dense"], out=tmp_path), tmp_path)
    assert "runs of other ablations at preset cpu" in words or "published" in words


def test_wall_clock_is_that_of_workers_who_take_the_next_job():
    rng = random.Random(3)
    for _ in range(200):
        jobs, at_once = [rng.uniform(0.1, 10) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 6)
        ends = []                                                  # an independent account: a job starts when fewer than at_once are going on
        for s in jobs:
            start = 0.0 if len(ends) < at_once else sorted(ends)[-at_once]
            ends.append(start + s)
        wall = sweep.wall_clock(jobs, at_once)
        assert wall == pytest.approx(max(ends))
        assert max(max(jobs), sum(jobs) / at_once) - 1e-9 <= wall <= sum(jobs) / at_once + max(jobs)


@pytest.mark.parametrize("seconds, words", {0: "0 s", 89: "89 s", 90: "1.5 min", 600: "10 min", 5400: "1.5 h", 200000: "2.3 days"}.items())
def test_lengths_of_time_in_words(seconds, words):
    assert sweep.in_words(seconds) == words
