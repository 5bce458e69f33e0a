"""What only a GPU can show: `make test-gpu`. `PRX_NB_TEST_GPU=rehearse` goes through the same motions on the processor.

Noise and times are drawn on the device, and a GPU's generator draws other numbers: where a curve is compared with the processor's, both draw there.
"""
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from runs import TECHNIQUES, Stops, plain, same, weights
from torch.testing import assert_close

from prx_nb.core import batch, cost, interop, precision, sample
from prx_nb.core import train as rooms
from prx_nb.core.checkpoint import new_state
from prx_nb.core.denoiser import PRX, Route, compile_blocks
from prx_nb.core.flow import FlowMatching
from prx_nb.core.recipe import preset
from prx_nb.core.technique import build, objective
from prx_nb.core.train import train

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
BACKEND = "inductor" if GPU.type == "cuda" else "eager"
SMOKE = preset("smoke").replace({"train.steps": 20, "train.checkpoint_every": 10, "train.validate_every": 10, "train.validate_samples": 8,
                                 "optimizer.warmup": 2, "data.limit": 64, "denoiser.depth": 4})
BF16 = SMOKE.replace({"train.precision": "bf16", "train.compile": True})
ON = {"plain": {}} | TECHNIQUES | {"flip": {"data.augment": ["flip"]}, "immiscible": {"techniques.immiscible.group": 8}}
CURVE = 2e-3         # relative, of a loss in float32 on both, over 20 steps
COARSE = 0.05        # the same where one of them computes or keeps weights in bfloat16


def values(run):
    "The losses of all steps."
    return torch.tensor(run.curves[run.curves.name.str.startswith("loss")].sort_values(["name", "step"]).value.to_numpy())


@pytest.fixture
def drawn_alike(monkeypatch):
    "Everything random is drawn on the processor and then sent."
    real, there = batch.add_noise, batch.Batch.random
    noisy = lambda b, recipe, step, device, part=slice(None): moved(real(batch.moved(b, CPU), recipe, step, CPU, part), device)
    moved = lambda b, device: dataclasses.replace(batch.moved(b, device), noise=b.noise.to(device), t=b.t.to(device))
    monkeypatch.setattr(rooms, "add_noise", noisy)
    monkeypatch.setattr(batch.Batch, "random", lambda b, name, *shape: there(dataclasses.replace(b, x0=b.x0.cpu()), name, *shape).to(b.x0.device))


@pytest.mark.parametrize("name", ON)
def test_twenty_steps_as_on_the_processor(name, prepared, tmp_path, drawn_alike):
    recipe = SMOKE.replace(ON[name])
    a, b = (train(recipe, tmp_path / d.type / "run", prepared=prepared, progress=False, device=d) for d in (CPU, GPU))
    assert values(a).shape == values(b).shape and len(values(a)) >= 20
    assert_close(values(b), values(a), rtol=COARSE if name == "bf16" else CURVE, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ON if n != "bf16"])
def test_compiled_in_bf16_near_float32(name, prepared, tmp_path):
    a, b = (train(r.replace(ON[name]), tmp_path / r.train.precision, prepared=prepared, progress=False, device=GPU) for r in (SMOKE, BF16))
    assert_close(values(b), values(a), rtol=COARSE, atol=0.02)
    assert b.record["precision"]["computed"] == ("bf16" if GPU.type == "cuda" else "fp32")
    assert all(v.dtype == torch.float32 for k, v in weights(b).items() if k.startswith("model."))


def test_autocast_computes_in_bf16_and_keeps_float32(prepared):
    state = new_state(BF16, GPU)
    noisy = batch.add_noise(batch.read_batch(prepared, BF16, 0, device=GPU), BF16, 0, GPU)
    with precision.autocast(BF16, GPU):
        out = state.model(noisy.x0, noisy.t, noisy.text, noisy.mask, taps=(1,))
        sum(objective(state.model, noisy, FlowMatching(BF16.flow)).values()).backward()
    assert out.taps[1].dtype == (torch.bfloat16 if GPU.type == "cuda" else torch.float32)
    assert {p.grad.dtype for p in state.model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_blocks_answer_what_is_asked(fused):
    torch.compiler.reset()
    plain_, quick = (PRX(in_channels=3, patch_size=4, context_in_dim=24, hidden_size=64, num_heads=2, depth=5,
                         fusion=(1, 3) if fused else None).to(GPU) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    for p in plain_.parameters():
        torch.nn.init.normal_(p, float(p.ndim == 1), 0.1, generator=None if GPU.type == "cuda" else g)
    quick.load_state_dict(plain_.state_dict())
    compile_blocks(quick, BACKEND)
    keep = torch.stack([torch.randperm(16, generator=g)[:6] for _ in range(3)]).to(GPU)
    mask = (torch.arange(7) < torch.tensor([7, 3, 1])[:, None]).to(GPU)
    for side, masked, asked in ((16, True, {}), (16, True, {"taps": (0, 4)}), (16, False, {"taps": (2,)}), (16, True, {"route": Route(keep, 1, 3), "taps": (0, 2)}),
                                (32, True, {"taps": (1,)}), (16, True, {"taps": (0, 1, 2, 3, 4)})):
        x, t, text = (torch.randn(s, generator=g).to(GPU) for s in ((3, 3, side, side), (3,), (3, 7, 24)))
        found = []
        for net in (plain_, quick):
            net.zero_grad()
            out = net(x, t.sigmoid(), text, mask if masked else None, **asked)
            (out.prediction.square().mean() + sum(v.square().mean() for v in out.taps.values())).backward()
            found.append((out.prediction, out.taps, {k: p.grad for k, p in net.named_parameters() if p.grad is not None}))
        assert_close(found[1], found[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["plain", "repa", "tread", "sprint", "contrastive", "perceptual", "muon"])
@pytest.mark.parametrize("kind", [SMOKE, BF16], ids=["fp32", "bf16-compiled"])
def test_the_same_bits_each_time_and_after_an_interruption(name, kind, prepared, tmp_path):
    recipe = kind.replace(ON[name])
    whole, again = (train(recipe, tmp_path / d, prepared=prepared, progress=False, device=GPU) for d in ("whole", "again"))
    assert whole.record["deterministic"] is True
    same(whole, again)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "half", prepared=prepared, progress=False, device=GPU, techniques=[Stops(13)])
    same(whole, train(recipe, tmp_path / "half", prepared=prepared, progress=False, device=GPU))


def test_without_determinism_a_resumed_run_is_near(prepared, tmp_path):
    recipe = BF16.replace("train.deterministic", False)
    whole = train(recipe, tmp_path / "whole", prepared=prepared, progress=False, device=GPU)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "half", prepared=prepared, progress=False, device=GPU, techniques=[Stops(13)])
    half = train(recipe, tmp_path / "half", prepared=prepared, progress=False, device=GPU)
    assert whole.record["deterministic"] is (GPU.type == "cpu")
    assert_close(values(half), values(whole), rtol=COARSE, atol=0.02)


def test_weights_stored_in_bf16_as_emulated(prepared, tmp_path, drawn_alike):
    kept = SMOKE.replace({"train.weights": "bf16", "train.precision": "bf16"})
    real, emulated = (train(r, tmp_path / r.train.precision, prepared=prepared, progress=False, device=GPU)
                      for r in (kept, kept.replace("train.precision", "fp32")))
    assert precision.native(kept, GPU) is (GPU.type == "cuda") and not precision.native(emulated.recipe, GPU)
    assert_close(values(real), values(emulated), rtol=COARSE, atol=0.02)
    for k, v in weights(emulated).items():
        if k.startswith("model."):
            assert v.float().equal(v.bfloat16().float()), f"{k} is not of bfloat16 values"


def test_data_on_the_card_is_the_data(prepared):
    recipe = SMOKE.replace({"data.augment": ["flip"], "captions.dropout": 0.5})
    held = batch.hold(prepared, GPU, 2**30)
    assert isinstance(held, batch.Held) and held.images.device.type == GPU.type
    for step in range(3):
        a, b = (batch.add_noise(batch.read_batch(source, recipe, step, device=GPU), recipe, step, GPU) for source in (held, prepared))
        for name in ("x0", "text", "mask", "dropped", "caption", "noise", "t"):
            assert getattr(a, name).equal(getattr(b, name)), name


@pytest.mark.skipif(GPU.type == "cpu", reason="a processor has no queue")
@pytest.mark.parametrize("name", ["plain", "repa", "tread", "sprint", "contrastive", "average"])
def test_no_step_waits_for_the_card(name, prepared):
    recipe = BF16.replace(ON[name] | {"train.compile": False})
    state = new_state(recipe, GPU, build(recipe, prepared, GPU))
    held, flow = batch.hold(prepared, GPU, 2**30), FlowMatching(recipe.flow)

    def step(n):
        with precision.autocast(recipe, GPU):
            noisy = batch.add_noise(batch.read_batch(held, recipe, n, device=GPU), recipe, n, GPU)
            losses = objective(state.model, noisy, flow, state.techniques, n)
        rooms.optimise(state, losses, recipe, n)
    for n in range(3):
        step(n)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_runs_on_one_card_are_each_as_alone(prepared, tmp_path):
    recipes = [BF16.replace("seed", seed) for seed in (0, 1)]
    alone = [train(r, tmp_path / f"alone{r.seed}", prepared=prepared, progress=False, device=GPU) for r in recipes]
    children = []
    for r in recipes:
        r.save(tmp_path / f"{r.seed}.json")
        children.append(subprocess.Popen([sys.executable, "-m", "prx_nb.core.train", tmp_path / f"{r.seed}.json", tmp_path / f"side{r.seed}",
                                          json.dumps({"progress": False, "device": GPU.type})]))
    assert [c.wait(300) for c in children] == [0, 0]
    for run in alone:
        same(run, rooms.Run.load(tmp_path / f"side{run.recipe.seed}"))


@pytest.mark.skipif(GPU.type == "cpu", reason="a processor's memory is the machine's")
def test_out_of_memory_is_one_error_that_says_what_to_lower(prepared, tmp_path):
    free, whole = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 200 * 2**20) / whole))
    try:
        with pytest.raises(torch.OutOfMemoryError, match="take a smaller train.batch") as caught:
            train(SMOKE.replace({"train.batch": 4096, "denoiser.hidden_size": 256}), tmp_path, prepared=prepared, progress=False, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(str(caught.value).splitlines()) == 1
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "failed"


@pytest.mark.skipif(GPU.type == "cpu", reason="measures a card")
def test_memory_is_estimated_within_a_half(prepared, tmp_path):
    recipe = BF16.replace({"train.batch": 512, "denoiser.hidden_size": 256, "denoiser.depth": 6, "data.size": 32, "train.steps": 3})
    took = train(recipe, tmp_path, progress=False, device=GPU).record["cost"]["peak_memory_mb"] * 1e6
    assert 0.4 * took < cost.gpu_memory(recipe) - 2 * 2**30 < 2.5 * took


def test_export_round_trip(prepared, tmp_path):
    pytest.importorskip("diffusers")
    run = train(BF16, tmp_path / "run", prepared=prepared, progress=False, device=GPU)
    interop.to_diffusers(run, tmp_path / "export")
    mine = {k: v.cpu() for k, v in run.model.state_dict().items()}
    theirs = interop.from_diffusers(tmp_path / "export").model.state_dict()
    assert list(theirs) == list(mine) and all(v.cpu().equal(mine[k]) for k, v in theirs.items())


def test_pictures_as_on_the_processor(prepared, tmp_path):
    run = train(SMOKE, tmp_path, prepared=prepared, progress=False, device=GPU)
    words, mask = prepared.states.lookup(prepared.asked[:3])
    there, here = (sample.draw(run.model.to(d), SMOKE, words, mask, *prepared.states.null(1)) for d in (GPU, CPU))
    assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_plain_curves_are_read_late_but_whole(prepared, tmp_path):
    run = train(SMOKE.replace("train.steps", 33), tmp_path, prepared=prepared, progress=False, device=GPU)
    assert plain(run)[plain(run).name == "loss flow"].step.tolist() == list(range(1, 34))
