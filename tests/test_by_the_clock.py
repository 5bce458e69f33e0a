"""A run whose budget is seconds of training steps (`train.seconds`), on a clock that is made up."""
import pytest

from prx_nb.core import train as training
from prx_nb.core.batch import prepare
from prx_nb.core.recipe import PRESETS, RecipeError, preset
from prx_nb.core.train import continue_, train

CLOCKED = preset("smoke").replace({"train.seconds": 10.0, "train.steps": 99, "train.checkpoint_every": 4, "train.validate_every": 5,
                                   "optimizer.cooldown": 0.5, "ema.share": 0.2, "ema.decay": None})


class Clock:
    "Each step takes a second, each validation a hundred; nothing else takes any."
    def __init__(self, patch, break_at=None):
        self.now, self.rates, step, look = 0.0, [], training._step, training._look

        def stepped(s, batch, number):
            if number == break_at:
                raise KeyboardInterrupt
            found = step(s, batch, number)
            self.now += 1.0
            self.rates.append(s.state.optimizer.param_groups[0]["lr"])
            return found

        def looked(*given):
            self.now += 100.0
            look(*given)
        patch.setattr(training, "_step", stepped)
        patch.setattr(training, "_look", looked)
        patch.setattr(training.time, "perf_counter", lambda: self.now)


@pytest.fixture(scope="module")
def prepared():
    return prepare(CLOCKED, progress=False)


def test_a_run_ends_when_its_time_is_up_and_says_where(prepared, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    run = train(CLOCKED, tmp_path / "run", prepared=prepared, progress=False)
    assert run.record["ended"] == {"step": 10, "by": "seconds"} and run.record["status"] == "done" and not run.record["deterministic"]
    spent = run.record["cost"]
    assert (spent["train_seconds"], spent["step_seconds"], spent["images_seen"]) == (10.0, 1.0, 10 * CLOCKED.train.batch)
    assert run.curves.query("name == 'val'").step.tolist() == [5, 10], "the last look is at the end"
    assert clock.rates[4] == CLOCKED.optimizer.lr and clock.rates[9] == pytest.approx(CLOCKED.optimizer.lr * 0.2)
    assert run.model.img_in.weight.isfinite().all()


def test_the_rest_of_the_budget_is_left_to_a_run_that_was_stopped(prepared, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Clock(patch, break_at=6)
        with pytest.raises(KeyboardInterrupt):
            train(CLOCKED, tmp_path / "run", prepared=prepared, progress=False)
    clock = Clock(monkeypatch)
    run = train(CLOCKED, tmp_path / "run", prepared=prepared, progress=False)
    assert run.record["ended"] == {"step": 10, "by": "seconds"} and len(clock.rates) == 6, "4 s were kept, 6 are left"
    again = train(CLOCKED, tmp_path / "run", prepared=prepared, progress=False)
    assert len(clock.rates) == 6 and again.record["cost"]["train_seconds"] == 10.0, "no time, no step"


def test_steps_are_the_upper_limit(prepared, tmp_path, monkeypatch):
    Clock(monkeypatch)
    run = train(CLOCKED.replace("train.steps", 7), tmp_path / "run", prepared=prepared, progress=False)
    assert run.record["ended"] == {"step": 7, "by": "steps"}
    with pytest.raises(training.CheckpointError, match="ended by the clock"):
        continue_(run, 3)


def test_the_half_life_is_a_share_of_the_steps_that_the_clock_allows(prepared, tmp_path, monkeypatch):
    clock, objective, kept = Clock(monkeypatch), training.objective, []

    def slow(*given):
        clock.now += 1.0           # a real step takes its time before the average, the first one too
        return objective(*given)

    def seen(averages, model, ema, step):
        kept.append(next(iter(averages)).keeps)
    monkeypatch.setattr(training, "objective", slow)
    monkeypatch.setattr(training.average, "update", seen)
    train(CLOCKED, tmp_path / "run", prepared=prepared, progress=False)
    # steps of 2 s, the average after 1, 3, 5, 7 and 9 of 10 s: so many steps in all, as the clock has it then
    assert kept == pytest.approx([0.5 ** (1 / (0.2 * 10 * (n + 1) / (2 * n + 1))) for n in range(5)])


def test_a_run_without_a_budget_says_nothing_of_it(prepared, tmp_path):
    run = train(preset("smoke").replace("train.steps", 2), tmp_path / "run", progress=False)
    assert "ended" not in run.record


@pytest.mark.parametrize("name", PRESETS)
def test_no_recipe_gets_another_name(name):
    assert preset(name).replace("train.seconds", None).key == preset(name).key != preset(name).replace("train.seconds", 9).key


@pytest.mark.parametrize("changes,words", [
    ({"techniques.repa.weight": 0.5, "techniques.repa.stop": 0.8}, "techniques.repa.stop = 0.8 with train.seconds = 9"),
    ({"captions.last": "short"}, "captions.last_share = 0.2 with"), ({"train.processes": 2}, "each has a clock of its own"),
    ({"train.seconds": -1}, "greater than 0"),
])
def test_shares_of_all_steps_are_refused(changes, words):
    with pytest.raises(RecipeError, match=words):
        preset("smoke").replace({"train.seconds": 9} | changes)
