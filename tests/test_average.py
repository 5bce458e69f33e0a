"Averages of the weights: closed form, half-life, start, several side by side, resume."
import math

import pytest
import torch
from runs import CPU, Stops
from torch import nn

from prx_nb.core import train as training
from prx_nb.core.average import decay_of, first_update, half_life_of, new_average, shares, update
from prx_nb.core.checkpoint import find_checkpoint, new_state, restore
from prx_nb.core.denoiser import PRX
from prx_nb.core.flow import FlowMatching
from prx_nb.core.recipe import Ema, RecipeError, preset
from prx_nb.core.train import train, validate, validation_set

SMOKE = preset("smoke").replace({"train.steps": 10, "train.checkpoint_every": 3, "train.validate_every": 5})
SEVERAL = SMOKE.replace({"ema.decay": None, "ema.half_life": 4.0, "ema.every": 2, "ema.start": 3, "ema.also": (1.0, 20.0)})


@pytest.mark.parametrize("decay,every", [(0.999, 10), (0.5, 1), (0.9, 7), (0.99999, 1)])
def test_decay_and_half_life_are_two_words_for_one(decay, every):
    h = half_life_of(decay, every)
    assert decay_of(h, every) == pytest.approx(decay, rel=1e-12)
    assert decay ** (h / every) == pytest.approx(0.5)
    assert half_life_of(0.0) == 0 and half_life_of(0.5, every) == pytest.approx(every)
    by_half_life = SMOKE.replace({"ema.decay": None, "ema.half_life": h, "ema.every": every}).ema
    assert by_half_life.keeps(9) == pytest.approx(decay, rel=1e-12)


EMAS = [Ema(decay=0.8), Ema(decay=None, half_life=6, every=3), Ema(decay=0.9, every=2, start=5), Ema(decay=0.9, every=4, start=4),
        Ema(decay=0.7, start=100), Ema(decay=0.7, every=50), Ema(decay=0.0)]


@pytest.mark.parametrize("ema", EMAS, ids=str)
def test_an_average_is_the_sum_with_known_shares(ema):
    "Against a plain recursion on exact numbers, and torch's AveragedModel against both."
    net, mean, g = nn.Linear(1, 1).double(), None, torch.Generator().manual_seed(0)
    average, path = new_average(nn.Linear(1, 1), ema.keeps(9)), []
    counted = 0
    for step in range(23):
        value = torch.randn((), generator=g, dtype=torch.float64)
        with torch.no_grad():
            net.weight.fill_(value)
        path.append(value)
        update([average], net.float(), ema, step)
        net.double()
        if step >= ema.start and (step + 1) % ema.every == 0:
            mean = value if counted == 0 else ema.keeps(9) * mean + (1 - ema.keeps(9)) * value
            counted += 1
        expected = value if counted == 0 else mean
        s = shares(step + 1, ema)
        assert s.shape == (step + 1,) and s.sum() == pytest.approx(1) and (s >= 0).all()
        assert (s * torch.stack(path)).sum().item() == pytest.approx(expected.item(), abs=1e-12)
        assert average.module.weight.item() == pytest.approx(expected.item(), abs=1e-5)
    assert average.n_averaged == counted


def test_the_last_half_life_weighs_half():
    for h, every in ((10, 1), (12, 3)):
        s = shares(600, Ema(decay=None, half_life=h, every=every))
        assert s[-h:].sum() == pytest.approx(0.5) and s[-2 * h:].sum() == pytest.approx(0.75)
    assert [first_update(Ema(start=s, every=k)) for s, k in ((0, 1), (0, 10), (9, 10), (10, 10), (5, 1))] == [0, 9, 9, 19, 5]


@pytest.fixture(scope="module")
def several(prepared, tmp_path_factory):
    "A run with three averages, and its weights after every step."
    path, real = [], training.optimise

    def optimise(state, *more):
        norm = real(state, *more)
        path.append({k: v.detach().clone() for k, v in state.model.state_dict().items()})
        return norm
    training.optimise = optimise
    try:
        return train(SEVERAL, tmp_path_factory.mktemp("several"), prepared=prepared, progress=False), path
    finally:
        training.optimise = real


def test_the_averages_of_a_run_are_those_sums(several):
    run, path = several
    tensors, _ = find_checkpoint(run.dir / "checkpoint", SEVERAL)
    named = {"ema.module.": 4.0, "also.0.module.": 1.0, "also.1.module.": 20.0}
    for prefix, h in named.items():
        s = shares(10, Ema(decay=None, half_life=h, every=2, start=3))
        assert s.count_nonzero() == 4
        for k in path[0]:
            expected = sum(w * p[k].double() for w, p in zip(s, path))
            torch.testing.assert_close(tensors[prefix + k].double(), expected, rtol=1e-5, atol=1e-7)
    assert not tensors["also.0.module.img_in.weight"].equal(tensors["also.1.module.img_in.weight"])
    assert run.model.img_in.weight.equal(tensors["ema.module.img_in.weight"])


def test_each_is_validated(several, prepared):
    run, _ = several
    tensors, _ = find_checkpoint(run.dir / "checkpoint", SEVERAL)
    for i, h in enumerate((1, 20)):
        model = PRX(**SEVERAL.denoiser.model_dump())
        model.load_state_dict({k.removeprefix(f"also.{i}.module."): v for k, v in tensors.items() if k.startswith(f"also.{i}.module.")})
        said = run.curves[run.curves.name == f"ema {h} val"]
        assert said.step.tolist() == [5, 10]
        assert said.value.iloc[-1] == validate(model, validation_set(prepared, SEVERAL, CPU), FlowMatching(SEVERAL.flow))["val"]
    assert not any(k.startswith("ema") for k in run.record["metrics"])


def test_a_stopped_run_goes_on_bit_for_bit(several, prepared, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(SEVERAL, tmp_path, prepared=prepared, progress=False, techniques=[Stops(7)])
    again = train(SEVERAL, tmp_path, prepared=prepared, progress=False)
    first, second = (find_checkpoint(r.dir / "checkpoint", SEVERAL)[0] for r in (several[0], again))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    curves = [r.curves[r.curves.name != "seconds"].reset_index(drop=True) for r in (several[0], again)]
    assert curves[0].equals(curves[1])
    fresh = new_state(SEVERAL.replace("seed", 3), CPU)
    restore(fresh, first)
    assert all(v.equal(first[k]) for k, v in fresh.tensors().items()) and fresh.also[1].n_averaged == 4
    with pytest.raises(RuntimeError, match="also|Missing|img_in"):
        restore(new_state(SEVERAL, CPU), {k: v for k, v in first.items() if k != "also.1.module.img_in.weight"})


def test_more_averages_change_nothing_else(several, prepared, tmp_path):
    "And one by its half-life is the one by its decay."
    run = train(SEVERAL.replace({"ema.also": (), "ema.half_life": None, "ema.decay": 0.5 ** (2 / 4)}), tmp_path, prepared=prepared, progress=False)
    mine, other = (find_checkpoint(r.dir / "checkpoint", r.recipe)[0] for r in (run, several[0]))
    assert mine.keys() == {k for k in other if not k.startswith("also.")} and all(v.equal(other[k]) for k, v in mine.items())


def test_an_average_that_never_begins_is_the_weights(prepared, tmp_path):
    "Not the weights that were drawn at the start."
    for name, changes in {"late": {"ema.start": 900}, "rare": {"ema.every": 900}}.items():
        run = train(SMOKE.replace(changes | {"train.steps": 4}), tmp_path / name, prepared=prepared, progress=False)
        tensors, _ = find_checkpoint(run.dir / "checkpoint", run.recipe)
        assert run.model.img_in.weight.equal(tensors["model.img_in.weight"])
        assert not run.model.img_in.weight.equal(new_state(run.recipe, CPU).model.img_in.weight)


def test_without_an_average_others_may_be_kept(prepared, tmp_path):
    recipe = SMOKE.replace({"ema.decay": 0.0, "ema.also": (3.0,), "train.steps": 4})
    run = train(recipe, tmp_path, prepared=prepared, progress=False)
    tensors, _ = find_checkpoint(run.dir / "checkpoint", recipe)
    assert not any(k.startswith("ema.") for k in tensors) and any(k.startswith("also.0.") for k in tensors)
    assert run.model.img_in.weight.equal(tensors["model.img_in.weight"])
    assert "ema 3 val" in set(run.curves.name)


@pytest.mark.parametrize("changes,says", [
    ({"ema.half_life": 5.0}, "one says the other"), ({"ema.decay": None}, "one says the other"), ({"ema.half_life": -1, "ema.decay": None}, "greater than 0"),
    ({"ema.decay": 1.0}, "less than 1"), ({"ema.also": (5.0, -1.0)}, "above 0"), ({"ema.also": (5.0, 5.0)}, "each once"), ({"ema.every": 0}, "ema.every")])
def test_one_clear_error(changes, says):
    with pytest.raises(RecipeError) as error:
        SMOKE.replace(changes)
    assert says in str(error.value) and "ema" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_half_lives_so_short_that_nothing_is_kept_are_copies():
    ema = SMOKE.replace({"ema.decay": None, "ema.half_life": 1e-3, "ema.every": 2}).ema
    assert ema.keeps(9) == 0 or math.isclose(ema.keeps(9), 0, abs_tol=1e-300)
    assert shares(6, ema).tolist() == [0, 0, 0, 0, 0, 1]
