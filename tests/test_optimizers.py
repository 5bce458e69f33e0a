"Muon: its iteration, its step, which matrices it gets, its place in a run."
import math
from copy import deepcopy

import pytest
import torch
from runs import CPU, Stops
from torch import nn

from prx_nb.core import train as training
from prx_nb.core.checkpoint import find_checkpoint, new_state, restore
from prx_nb.core.denoiser import PRX
from prx_nb.core.flow import FlowMatching
from prx_nb.core.optimizers import (
    COEFFICIENTS, RowMuon, Together, maps, matrices, new_optimizer, newton_schulz, polar, spectra, stable_rank,
)
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.batch import add_noise, read_batch
from prx_nb.core.technique import Technique, objective
from prx_nb.core.train import learning_rate, optimise, train

SMOKE = preset("smoke").replace({"train.steps": 10, "train.checkpoint_every": 3, "train.validate_every": 5})
MUON = SMOKE.replace({"optimizer.name": "muon", "optimizer.muon.lr": 5e-3})
SPLIT = MUON.replace({"optimizer.muon.split_qkv": True, "optimizer.muon.modulation": False, "optimizer.muon.momentum": 0.9})


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def far(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 6, 4)])
@pytest.mark.parametrize("steps", [0, 1, 5, 8])
def test_the_iteration_moves_singular_values_and_nothing_else(shape, steps):
    m = draw(*shape)
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    s = s / m.flatten(-2).norm(dim=-1)[..., None]
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = s * (a + b * s**2 + c * s**4)
    torch.testing.assert_close(newton_schulz(m, steps), u * s[..., None, :] @ v)


def test_the_iteration_is_torchs_but_for_its_bfloat16():
    from torch.optim._muon import _zeropower_via_newtonschulz
    for shape in ((32, 32), (96, 32), (32, 112)):
        m = draw(*shape, dtype=torch.float32)
        assert far(_zeropower_via_newtonschulz(m, COEFFICIENTS, 5, 1e-7).float(), newton_schulz(m)) < 0.05
    assert torch.isfinite(newton_schulz(torch.zeros(4, 4))).all()


def test_the_polar_factor_is_that_of_newtons_iteration():
    m = draw(7, 7)
    x = m
    for _ in range(40):
        x = (x + torch.linalg.inv(x).T) / 2                           # Higham 1986
    torch.testing.assert_close(polar(m), x)
    torch.testing.assert_close(polar(draw(9, 4)).T @ polar(draw(9, 4)), torch.eye(4, dtype=torch.float64))


def test_five_steps_end_near_the_polar_factor():
    for shape in ((40, 40), (40, 120), (120, 40)):
        m = draw(*shape)
        cosine = (newton_schulz(m) * polar(m)).sum() / newton_schulz(m).norm() / polar(m).norm()
        assert cosine > 0.95
        assert (newton_schulz(m) * m).sum() > 0, "it goes along the gradient"


@pytest.mark.parametrize("shape", [(24, 24), (72, 24), (24, 84)])
def test_a_step_is_the_formula_written_out(shape):
    "Momentum as an average, Nesterov, orthogonalised, scaled to 0.2 sqrt(max) and decayed."
    recipe = SPLIT.replace({"optimizer.weight_decay": 20.0, "optimizer.muon.modulation": True, "optimizer.muon.split_qkv": False})
    net = nn.ModuleDict({"blocks": nn.ModuleDict({"lin": nn.Linear(shape[1], shape[0])})})
    p = net.blocks.lin.weight
    optimizer, average = new_optimizer(recipe, net), torch.zeros(shape)
    for step in range(4):
        p.grad = draw(*shape, seed=step, dtype=torch.float32)
        average = 0.9 * average + 0.1 * p.grad
        looked = 0.1 * p.grad + 0.9 * average
        change = 5e-3 * 0.2 * math.sqrt(max(shape)) * newton_schulz(looked)
        before = p.detach().clone()
        optimizer.step()
        assert far(before * (1 - 5e-3 * 20) - p.detach(), change) < 0.05


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_bands_of_rows_are_matrices_of_their_own(parts):
    fused, apart = nn.Parameter(draw(30, 8, dtype=torch.float32)), []
    apart = [nn.Parameter(t.clone()) for t in fused.detach().chunk(parts)]
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"}
    one, many = RowMuon([{"params": [fused], "parts": parts}], **settings), torch.optim.Muon(apart, **settings)
    for step in range(5):
        fused.grad = draw(30, 8, seed=step + 1, dtype=torch.float32)
        for p, g in zip(apart, fused.grad.chunk(parts)):
            p.grad = g.clone()
        one.step(), many.step()
    assert fused.equal(torch.cat(apart)), "bit for bit"
    assert one.state[fused]["momentum_buffer"].equal(torch.cat([many.state[p]["momentum_buffer"] for p in apart]))


def test_split_maps_are_those_that_attention_splits():
    "Each band of the fused matrix is what makes q, k or v: orthonormal after a step by itself, not as a stack."
    for split in (True, False):
        model = PRX(**SMOKE.denoiser.model_dump())
        recipe = MUON.replace({"optimizer.muon.split_qkv": split, "optimizer.muon.steps": 20})
        before = {k: p.detach().clone() for k, p in matrices(model).items()}
        for i, p in enumerate(model.parameters()):
            p.grad = draw(*p.shape, seed=i, dtype=torch.float32)
        new_optimizer(recipe, model).step()
        for name, count in (("attention.img_qkv_proj", 3), ("attention.txt_kv_proj", 2), ("attention.to_out.0", 1), ("gate_proj", 1)):
            name = f"blocks.1.{name}.weight"
            change = before[name] - matrices(model)[name].detach()
            rows = change.shape[0] // count
            size = change.norm() / (5e-3 * 0.2 * math.sqrt(max(rows if split else change.shape[0], change.shape[1])))
            full = min(rows, change.shape[1]) * count if split else min(change.shape)      # how many directions move
            assert abs(size / math.sqrt(full) - 0.9) < 0.12, (name, split)
            assert maps(name) == count


def test_who_gets_which_weights():
    model = PRX(**SMOKE.denoiser.model_dump())
    named = dict(model.named_parameters())
    kinds = {"img_qkv_proj", "txt_kv_proj", "to_out", "gate_proj", "up_proj", "down_proj"}
    for recipe, modulation in ((MUON, True), (SPLIT, False)):
        other = nn.Linear(4, 4)
        muon, adamw = new_optimizer(recipe, model, other).optimizers
        mine = {k for k, p in named.items() if any(p is q for g in muon.param_groups for q in g["params"])}
        assert mine == {k for k in named if k.startswith("blocks.") and k.endswith("weight") and
                        (any(kind in k for kind in kinds) or modulation and "modulation" in k)}
        assert {g["parts"] for g in muon.param_groups} == ({1} if modulation else {1, 2, 3})
        rest = [p for g in adamw.param_groups for p in g["params"]]
        assert any(p is other.weight for p in rest) and len(rest) + len(mine) == len(named) + 2
        assert muon.defaults["ns_steps"] == 5 and muon.defaults["momentum"] == recipe.optimizer.muon.momentum and muon.defaults["nesterov"]
    plain = new_optimizer(SMOKE, model)
    assert type(plain) is torch.optim.AdamW and plain.param_groups[0]["params"] == list(model.parameters())


def test_every_group_follows_the_schedule_to_its_own_height(prepared):
    recipe = SPLIT.replace({"optimizer.lr": 1e-3, "optimizer.muon.lr": 7e-3})
    state = new_state(recipe, CPU)
    seen = []
    for step in range(10):
        batch = add_noise(read_batch(prepared, recipe, step), recipe, step, CPU)
        optimise(state, objective(state.model, batch, FlowMatching(recipe.flow), number=step), recipe, step)
        rates = [g["lr"] for g in state.optimizer.param_groups]
        assert rates[-1] == learning_rate(recipe, step) and rates[:-1] == [learning_rate(recipe, step, 7e-3)] * 3
        assert rates[0] / rates[-1] == pytest.approx(7)
        seen.append(rates[0])
    assert seen[0] == pytest.approx(7e-3 / 4) and max(seen) == 7e-3 and seen[-1] < 7e-3 / 3
    same = MUON.replace("optimizer.muon.lr", None)
    assert {g.get("initial_lr", same.optimizer.lr) for g in new_state(same, CPU).optimizer.param_groups} == {same.optimizer.lr}


class Trained(Technique):
    "Has a matrix of its own, which is not the blocks'."
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(3))

    def loss(self, step):
        return (self.matrix @ self.matrix - torch.ones(3, 3)).square().mean()


@pytest.mark.parametrize("recipe", [MUON, SPLIT, MUON.replace("train.weights", "bf16")], ids=["muon", "split", "bf16 weights"])
def test_a_stopped_run_goes_on_bit_for_bit(recipe, prepared, tmp_path):
    whole = train(recipe, tmp_path / "a", prepared=prepared, progress=False, techniques=[Trained()])
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "b", prepared=prepared, progress=False, techniques=[Trained(), Stops(7)])
    again = train(recipe, tmp_path / "b", prepared=prepared, progress=False, techniques=[Trained()])
    first, second = (find_checkpoint(r.dir / "checkpoint", r.recipe)[0] for r in (whole, again))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    losses = whole.curves[whole.curves.name == "loss flow"].value
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()
    names = [k for k, _ in PRX(**recipe.denoiser.model_dump()).named_parameters()]
    momenta = {k.removeprefix("optimizer.model.").rsplit(":", 1)[0] for k in first if k.endswith("momentum_buffer")}
    model = PRX(**recipe.denoiser.model_dump())
    assert momenta == set(matrices(model, recipe.optimizer.muon.modulation)), "memory is named by the model's parameters"
    assert "optimizer.techniques.Trained.matrix:exp_avg" in first and {k for k in first if k.startswith("model.")} == {f"model.{k}" for k in names}


def test_resume_needs_the_momentum(prepared, tmp_path):
    run = train(MUON, tmp_path, prepared=prepared, progress=False)
    tensors, _ = find_checkpoint(run.dir / "checkpoint", MUON)
    state = new_state(MUON, CPU)
    restore(state, tensors)
    assert all(v.equal(tensors[k]) for k, v in state.tensors().items()) and set(state.tensors()) == set(tensors)


def test_memory_goes_from_one_to_another():
    model, other = PRX(**SMOKE.denoiser.model_dump()), PRX(**SMOKE.denoiser.model_dump())
    a, b = new_optimizer(SPLIT, model), new_optimizer(SPLIT, other)
    for i, p in enumerate(model.parameters()):
        p.grad = draw(*p.shape, seed=i, dtype=torch.float32)
    a.step()
    saved = deepcopy(a.state_dict())
    assert sorted(saved["state"]) == list(range(len(list(model.parameters())))) == sorted(i for g in saved["param_groups"] for i in g["params"])
    b.load_state_dict(saved)
    for p, q in zip(model.parameters(), other.parameters()):
        assert a.state[p].keys() == b.state[q].keys() and all(torch.as_tensor(v).equal(torch.as_tensor(b.state[q][k])) for k, v in a.state[p].items())
    with pytest.raises(ValueError, match="other groups"):
        new_optimizer(MUON, model).load_state_dict(saved)
    a.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_every_parameter_has_exactly_one_optimizer():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    muon, adamw = torch.optim.Muon([a]), torch.optim.AdamW([b])
    assert len(Together([a, b], [muon, adamw]).param_groups) == 2
    for parameters, optimizers in (([a, b], [muon]), ([a], [muon, adamw]), ([a, b], [muon, torch.optim.AdamW([a, b])])):
        with pytest.raises(ValueError, match="exactly one optimizer"):
            Together(parameters, optimizers)


def test_spectra_of_known_changes():
    before = {"one": draw(6, 4), "all": draw(4, 4), "none": draw(3, 3)}
    after = {"one": before["one"] + draw(6, 1, seed=1) @ draw(1, 4, seed=2), "all": before["all"] + 0.3 * polar(draw(4, 4, seed=3)), "none": before["none"]}
    found = spectra(before, after)
    assert found.keys() == {"one", "all"}
    assert stable_rank(found["one"]) == pytest.approx(1, abs=1e-5) and stable_rank(found["all"]) == pytest.approx(4, abs=1e-4)


@pytest.mark.parametrize("path,value,says", [
    ("optimizer.muon.steps", 0, "optimizer.muon.steps"), ("optimizer.muon.lr", 0, "optimizer.muon.lr"), ("optimizer.name", "lion", "'adamw' or 'muon'"),
    ("optimizer.muon.momentum", 1, "less than 1")])
def test_one_clear_error(path, value, says):
    with pytest.raises(RecipeError) as error:
        MUON.replace(path, value)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_shares_of_matrices_are_refused():
    with pytest.raises(RecipeError, match="muon.* needs whole matrices, which fsdp2 cuts"):
        MUON.replace({"train.processes": 2, "train.parallel": "fsdp2"})


def test_two_processes_equal_one(prepared, tmp_path):
    "Every process steps the whole matrices with the averaged gradients."
    recipe = SPLIT.replace({"train.steps": 6, "ema.decay": 0.0, "optimizer.eps": 1e-4})
    one = train(recipe, tmp_path / "one", prepared=prepared, progress=False, device="cpu")
    two = train(recipe.replace("train.processes", 2), tmp_path / "two", progress=False, device="cpu")
    start = new_state(recipe, CPU).model
    for (name, a), b, c in zip(one.model.named_parameters(), two.model.parameters(), start.parameters()):
        assert (a - b).norm() <= 0.02 * (a - c).norm() + 1e-6, name
    assert training.read_json(two.dir / "record.json")["status"] == "done"
