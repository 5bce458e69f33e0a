"Weights kept in bfloat16: equal to real storage, everywhere in a run, and what it loses."
import pytest
import torch
from runs import CPU
from torch import nn

from prx_nb.core import precision
from prx_nb.core.checkpoint import find_checkpoint, new_state, read_checkpoint, restore, save_checkpoint
from prx_nb.core.denoiser import PRX
from prx_nb.core.flow import FlowMatching
from prx_nb.core.optimizers import new_optimizer
from prx_nb.core.precision import directions, emulated, lost, lost_by_layer, round_, spacing, step, store
from prx_nb.core.recipe import preset
from prx_nb.core.batch import add_noise, read_batch
from prx_nb.core.technique import Technique, objective
from prx_nb.core.train import Run, optimise, train

SMOKE = preset("smoke").replace({"train.steps": 10, "train.checkpoint_every": 3, "train.validate_every": 5})
BF16 = SMOKE.replace("train.weights", "bf16")


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    return train(BF16, tmp_path_factory.mktemp("bf16"), prepared=prepared, progress=False, techniques=[Trained()])


class Trained(Technique):
    "Has weights of its own."
    def __init__(self, stops=None):
        super().__init__()
        self.weight, self._stops = nn.Parameter(torch.full((3,), 0.1)), stops

    def loss(self, step):
        if step.number == self._stops:
            raise KeyboardInterrupt
        return (self.weight - 1).square().mean()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_bf16(t):
    return t.equal(t.bfloat16().to(t.dtype))


def test_rounding_is_to_nearest_with_ties_to_even():
    x = torch.cat((draw(5000), draw(5000, seed=1) * 1e-6, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, 65504.0])))
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    expected = torch.where(up > 2**31, up - 2**32, up).int().view(torch.float32)
    ours = x.clone()
    round_([ours])
    assert ours.equal(expected) and not ours.equal(x)
    assert ours[-5:].tolist() == [1.0, 1 + 2**-6, -1.0, 0.0, 65536.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_spacing_is_the_way_to_the_next_number(dtype):
    x = torch.cat((draw(2000) / 8, torch.tensor([1.0, 0.5, 2.0, -1.0]))).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    following = (x.abs().view(bits) + 1).view(dtype)
    assert spacing(x, dtype).equal(following.double() - x.abs().double())


def test_an_update_is_lost_if_adding_it_changes_no_bit():
    w, u = (draw(4000) / 8).bfloat16(), draw(4000, seed=1) * 3e-4
    real = w.clone()
    real += u.bfloat16()                                               # bfloat16 arithmetic computes inside and rounds once
    assert lost(w.float(), u.bfloat16().float()).equal(real.view(torch.int16) == w.view(torch.int16))
    assert 0.2 < lost(w, u).float().mean() < 0.8
    assert not lost(w, torch.zeros(4000)).any() and not lost(w, u, torch.float32).any()
    assert lost(w, u)[u.abs() < spacing(w) / 4].all() and not lost(w, u)[u.abs() > spacing(w) / 2].any()


@pytest.mark.parametrize("rate,decay,size", [(1e-4, 0.0, 1.0), (1e-3, 0.1, 1e-3), (5e-3, 0.0, 1e-2)])
def test_the_emulation_equals_real_storage(rate, decay, size):
    "torch's AdamW on real bfloat16 parameters; a number in thousands may be one spacing away, where float32's last bit decides a tie."
    start = [(draw(200, 37) / 8).bfloat16(), (draw(41, seed=1) / 8).bfloat16()]
    real, ours = [nn.Parameter(t.clone()) for t in start], [nn.Parameter(t.float()) for t in start]
    a, b = (torch.optim.AdamW(ps, rate, (0.9, 0.95), 1e-8, decay, fused=True) for ps in (real, ours))
    for n in range(30):
        for i, (p, q) in enumerate(zip(real, ours)):
            g = draw(*p.shape, seed=100 * n + i) * size
            p.grad, q.grad = g.bfloat16(), g
        a.step()
        step(b, ours)
        for p, q in zip(real, ours):
            for r, o in ((p, q), *((a.state[p][k], b.state[q][k]) for k in ("exp_avg", "exp_avg_sq"))):
                assert r.dtype == torch.bfloat16 and o.dtype == torch.float32 and is_bf16(o)
                assert ((r.float() - o).abs() <= spacing(r)).all() and (r.float() != o).float().mean() < 1e-3
    assert any((p != t).any() for p, t in zip(real, start))


def test_the_same_with_muon():
    start = (draw(24, 32) / 6).bfloat16()
    real, ours = nn.Parameter(start.clone()), nn.Parameter(start.float())
    a, b = (torch.optim.Muon([p], 1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw") for p in (real, ours))
    for n in range(10):
        g = draw(24, 32, seed=n)
        real.grad, ours.grad = g.bfloat16(), g
        a.step()
        step(b, [ours])
        assert is_bf16(ours) and is_bf16(b.state[ours]["momentum_buffer"])
    assert (real.float() - ours).norm() < 0.05 * (ours - start.float()).norm(), "but for the rounding of the momentum before its use"


def test_only_what_is_named_is_rounded():
    a, b = nn.Parameter(draw(50)), nn.Parameter(draw(50, seed=1))
    optimizer = torch.optim.AdamW([a, b], 1e-3, fused=True)
    round_([a.detach()])
    a.grad, b.grad = draw(50, seed=2), draw(50, seed=3)
    step(optimizer, [a])
    assert is_bf16(a) and not is_bf16(b) and is_bf16(optimizer.state[a]["exp_avg"]) and not is_bf16(optimizer.state[b]["exp_avg"])
    assert optimizer.state[a]["step"].item() == 1


def test_without_rounding_a_step_is_the_optimizers():
    a, b = nn.Parameter(draw(50)), nn.Parameter(draw(50))
    one, two = torch.optim.AdamW([a], 1e-3), torch.optim.AdamW([b], 1e-3)
    a.grad, b.grad = draw(50, seed=2), draw(50, seed=2)
    one.step(), step(two)
    assert a.equal(b)


def test_everything_of_the_denoiser_is_kept_in_bf16_and_nothing_else(run):
    tensors, _ = find_checkpoint(run.dir / "checkpoint", run.recipe)
    count = len(list(run.model.parameters()))
    mine = {k: v for k, v in tensors.items() if k.startswith("model.") or
            k.startswith("optimizer.model.") and not k.endswith(":step")}
    assert len(mine) == 3 * count and all(is_bf16(v) for v in mine.values())
    assert not all(is_bf16(v) for k, v in tensors.items() if k.startswith("ema.module.")), "the average is float32"
    assert not is_bf16(tensors["techniques.Trained.weight"]) and not is_bf16(tensors["optimizer.techniques.Trained.weight:exp_avg"])


def test_it_starts_from_the_same_weights_rounded():
    a, b = new_state(SMOKE, CPU), new_state(BF16, CPU)
    for p, q, mean in zip(a.model.parameters(), b.model.parameters(), b.ema.module.parameters()):
        assert q.equal(p.bfloat16().float()) and mean.equal(q)
    assert not all(p.equal(q) for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_a_stopped_run_goes_on_bit_for_bit(run, prepared, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(BF16, tmp_path, prepared=prepared, progress=False, techniques=[Trained(stops=7)])
    again = train(BF16, tmp_path, prepared=prepared, progress=False, techniques=[Trained()])
    first, second = (find_checkpoint(r.dir / "checkpoint", r.recipe)[0] for r in (run, again))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def test_it_trains_elsewhere_than_float32(run, prepared, tmp_path):
    exact = train(SMOKE, tmp_path, prepared=prepared, progress=False, techniques=[Trained()])
    losses = run.curves[run.curves.name == "loss flow"].value
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()
    assert not run.model.img_in.weight.equal(exact.model.img_in.weight)
    assert abs(run.record["metrics"]["val"] / exact.record["metrics"]["val"] - 1) < 0.1


@pytest.fixture
def natively(monkeypatch):
    "As on a GPU that computes with bf16 autocast: real storage."
    monkeypatch.setattr(precision, "native", lambda recipe, device: recipe.train.weights == "bf16")


def advance(state, recipe, prepared, steps):
    flow, said = FlowMatching(recipe.flow), []
    for n in steps:
        batch = add_noise(read_batch(prepared, recipe, n), recipe, n, CPU)
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(state.model, batch, flow, state.techniques, n)
        said.append(losses["flow"].item())
        optimise(state, losses, recipe, n)
    return said


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_real_storage_and_its_emulation_are_the_same_run(name, prepared, monkeypatch):
    "Under autocast, on the CPU: the same first losses to the bit, then the same but for roundings of clipped gradients."
    recipe = BF16.replace({"optimizer.name": name, "train.steps": 30})
    ours = new_state(recipe, CPU)
    monkeypatch.setattr(precision, "native", lambda r, device: True)
    real = new_state(recipe, CPU)
    assert all(p.dtype == torch.bfloat16 for p in real.model.parameters()) and all(p.dtype == torch.float32 for p in real.ema.parameters())
    assert emulated(recipe, real.model) == [] and len(emulated(recipe, ours.model)) == len(list(ours.model.parameters()))
    a, b = (advance(s, recipe, prepared, range(12)) for s in (ours, real))
    assert a[0] == b[0]
    assert max(abs(x - y) for x, y in zip(a, b)) < 0.02 and a[-1] < a[0]
    start = new_state(recipe, CPU).model
    away = lambda s: torch.cat([(p.float() - q.float()).flatten() for p, q in zip(s.parameters(), start.parameters())])
    assert torch.cosine_similarity(away(ours.model), away(real.model), 0) > 0.9
    assert all(v.dtype == torch.bfloat16 for p in real.model.parameters() for k, v in real.optimizer.state[p].items() if k != "step")
    assert not all(is_bf16(p) for p in real.ema.module.parameters()), "the average is float32"


def test_checkpoints_of_real_storage_go_on_exactly_and_either_way(prepared, natively, tmp_path, monkeypatch):
    state = new_state(BF16, CPU, [Trained()])
    advance(state, BF16, prepared, range(4))
    tensors, _ = read_checkpoint(save_checkpoint(tmp_path, 4, state, BF16, 1.0))
    assert tensors["model.img_in.weight"].dtype == tensors["optimizer.model.img_in.weight:exp_avg"].dtype == torch.bfloat16
    assert tensors["ema.module.img_in.weight"].dtype == tensors["techniques.Trained.weight"].dtype == torch.float32
    again = new_state(BF16.replace("seed", 1), CPU, [Trained()])
    restore(again, {k: v.clone() for k, v in tensors.items()})
    assert advance(state, BF16, prepared, range(4, 7)) == advance(again, BF16, prepared, range(4, 7))
    assert all(v.equal(again.tensors()[k]) for k, v in state.tensors().items())
    monkeypatch.undo()
    emulation = new_state(BF16, CPU, [Trained()])
    restore(emulation, tensors)
    assert all(v.dtype == torch.float32 or v.numel() == 1 for v in emulation.tensors().values())
    assert all(v.float().equal(tensors[k].float()) for k, v in emulation.tensors().items())
    BF16.save(tmp_path / "recipe.json")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "step-0000004.safetensors").rename(tmp_path / "checkpoint" / "step-0000004.safetensors")
    assert Run.load(tmp_path).model.img_in.weight.dtype == torch.float32


def test_the_norms_weights_may_be_bfloat16_and_are_computed_in_float32():
    from prx_nb.core.denoiser import norm
    rms = nn.RMSNorm(8, eps=1e-6)
    nn.init.uniform_(rms.weight)
    x = draw(3, 8).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms.weight.double()
    torch.testing.assert_close(norm(x, rms).double(), exact, rtol=1e-6, atol=1e-6)
    rms.weight.data = rms.weight.data.bfloat16().float()
    plain = norm(x, rms)
    assert plain.dtype == torch.float32 and norm(x, rms.bfloat16()).equal(plain)


def test_directions_are_adamws_last_update(prepared):
    recipe = SMOKE.replace({"optimizer.eps": 1e-6, "optimizer.betas": (0.8, 0.9)})
    state = new_state(recipe, CPU)
    names = [k for k, _ in state.model.named_parameters()]
    for n in range(4):
        batch = add_noise(read_batch(prepared, recipe, n), recipe, n, CPU)
        before = {k: p.detach().clone() for k, p in state.model.named_parameters()}
        optimise(state, objective(state.model, batch, FlowMatching(recipe.flow)), recipe, n)
    found, rate = directions(state.tensors(), names, recipe), state.optimizer.param_groups[0]["lr"]
    for k, p in state.model.named_parameters():
        torch.testing.assert_close(before[k] - rate * found[k], p.detach(), rtol=0, atol=1e-6)
    shares = [lost_by_layer(before, found, r) for r in (1e-2, 1e-4, 1e-6)]
    assert shares[0].keys() == {k for k in names if before[k].ndim > 1}
    mean = [sum(s.values()) / len(s) for s in shares]
    assert mean[0] < mean[1] < mean[2] and all(0 <= v <= 1 for s in shares for v in s.values())
    muon = recipe.replace("optimizer.name", "muon")
    model = PRX(**muon.denoiser.model_dump())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = new_optimizer(muon, model)
    optimizer.step()
    named = {f"optimizer.{i}.{k}": v for i, m in optimizer.state_dict()["state"].items() for k, v in m.items()}
    with pytest.raises(KeyError, match="exp_avg"):
        directions(named, names, muon)


def test_float32_is_left_alone():
    model = PRX(**SMOKE.denoiser.model_dump())
    before = [p.detach().clone() for p in model.parameters()]
    assert store(model, SMOKE) is model and all(p.equal(q) for p, q in zip(model.parameters(), before)) and emulated(SMOKE, model) == []


def test_shares_in_two_processes_equal_one(prepared, tmp_path):
    "Rounded in shares, with two averages: the same run."
    recipe = BF16.replace({"train.steps": 5, "ema.also": (3.0,), "optimizer.eps": 1e-4})
    one = train(recipe, tmp_path / "one", prepared=prepared, progress=False, device="cpu")
    two = train(recipe.replace({"train.processes": 2, "train.parallel": "fsdp2"}), tmp_path / "two", progress=False, device="cpu")
    a, b = (find_checkpoint(r.dir / "checkpoint", r.recipe)[0] for r in (one, two))
    start = new_state(recipe, CPU).tensors()
    assert a.keys() == b.keys() and any(k.startswith("also.0.") for k in b)
    assert all(is_bf16(v) for k, v in b.items() if k.startswith("model."))
    moved = lambda t: torch.cat([(t[k] - start[k]).flatten() for k in start if k.startswith(("model.", "also.0.module."))])
    assert torch.cosine_similarity(moved(a), moved(b), 0) > 0.95
