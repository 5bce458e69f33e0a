"Perceptual losses against the formulas written out, LPIPS by torchmetrics, finite differences; who acts; resuming; what is refused."
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import CPU, same, strike, weights
from torch import nn

from prx_nb.core import train as training
from prx_nb.core.checkpoint import new_state
from prx_nb.core.encoders import EncoderError, load_vision_encoder
from prx_nb.core.flow import FlowMatching
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.seeds import stream
from prx_nb.core.batch import Batch, add_noise, read_batch
from prx_nb.core.denoiser import Output
from prx_nb.core.technique import Step, objective
from prx_nb.core.train import train
from prx_nb.core.technique import build
from prx_nb.techniques.perceptual import DISTANCES, Perceptual, cosine, gradient_norms, lpips_form

ON = {"techniques.perceptual.weight": 0.1, "techniques.perceptual.size": 32}
SMOKE = preset("smoke").replace({"train.steps": 6, "train.checkpoint_every": 2, "train.validate_every": 3} | ON)


class Toy:
    "Two small maps with random weights, in any precision."
    name, taps = "toy", {"one": 5, "two": 4}

    def __init__(self, dtype=torch.float32):
        draw = stream(0, "toy")
        self.first, self.second = (torch.randn(o, i, 3, 3, generator=draw).to(dtype) for o, i in ((5, 3), (4, 5)))

    def features(self, images, taps):
        one = F.conv2d(images, self.first, stride=2, padding=1).tanh()
        both = {"one": one, "two": F.conv2d(one, self.second, stride=2, padding=1)}
        return {t: both[t] for t in taps}


def batch(n=6, side=8, seed=0):
    "Random images, noise and times from 0.05 to 0.95, in order."
    draw = stream(seed, "batch")
    x0, noise = torch.rand(n, 3, side, side, generator=draw) * 2 - 1, torch.randn(n, 3, side, side, generator=draw)
    return Batch(torch.arange(n), x0, torch.zeros(n, 2, 4), torch.ones(n, 2, dtype=torch.bool), torch.zeros(n, dtype=torch.bool),
                 noise, torch.linspace(0.05, 0.95, n))


def step(b, flow, prediction=None):
    "A step of a network that answered `prediction`; none: random numbers."
    v = torch.randn(b.x0.shape, generator=stream(1, "answer")) if prediction is None else prediction
    return Step(b, flow.mix(b.x0, b.noise, b.t), Output(v.requires_grad_()), flow, 0)


def flow_of(**changes):
    return FlowMatching(preset("smoke").replace({f"flow.{k}": v for k, v in changes.items()}).flow)


@pytest.fixture(scope="module")
def effnet():
    return load_vision_encoder("effnet-lite0", 32, "cpu")


def test_distances_equal_the_formulas_written_out():
    a, b = torch.randn(2, 3, 7, 4, 5, generator=stream(0, "maps"))
    for n in range(3):
        squared, angles = [], []
        for i in range(4):
            for j in range(5):
                p, q = (v[n, :, i, j].double().numpy() for v in (a, b))
                squared.append(((p / np.linalg.norm(p) - q / np.linalg.norm(q)) ** 2).sum())
                angles.append(1 - p @ q / np.linalg.norm(p) / np.linalg.norm(q))
        assert lpips_form(a, b)[n].item() == pytest.approx(np.mean(squared), rel=1e-5)
        assert cosine(a, b)[n].item() == pytest.approx(np.mean(angles), rel=1e-5)


def lpips_by_torchmetrics(encoder, taps):
    "torchmetrics' LPIPS with this encoder for a network, and channel weights of one."
    from torchmetrics.functional.image.lpips import _LPIPS

    class Ones(nn.Module):
        def forward(self, x):
            return x.sum(1, keepdim=True)

    class Net(nn.Module):
        def forward(self, x):
            return list(encoder.features(x, taps).values())
    peer = _LPIPS.__new__(_LPIPS)
    nn.Module.__init__(peer)
    peer.scaling_layer, peer.resize, peer.spatial, peer.L = nn.Identity(), None, False, len(taps)
    peer.net, peer.lins = Net(), nn.ModuleList(Ones() for _ in taps)
    return peer


@pytest.mark.parametrize("taps", [("one",), ("one", "two")])
def test_lpips_form_is_that_of_torchmetrics_with_weights_of_one(taps):
    ours, b, peer = Perceptual(Toy(), taps), batch(), lpips_by_torchmetrics(Toy(), taps)
    x, y = (torch.randn(b.x0.shape, generator=stream(2, "x")).requires_grad_() for _ in range(2))
    mine, theirs = ours.distances(x, b.x0), peer(y, b.x0).flatten()
    torch.testing.assert_close(mine, theirs)
    for d in (mine, theirs):
        (d * torch.arange(1, 7)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("prediction,loss", [("v", "v"), ("x", "x"), ("x", "v"), ("eps", "eps")])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_and_gradient_equal_autograd_of_the_formula(prediction, loss, path, distance):
    "The estimate by the path's own algebra, the distance by torch's cosine."
    flow, b, toy = flow_of(prediction=prediction, loss=loss, path=path), batch(), Toy()
    s = step(b, flow)
    ours = Perceptual(toy, ("one", "two"), 0.3, distance).loss(s)
    got, = torch.autograd.grad(ours, s.output.prediction)
    t = b.t.view(-1, 1, 1, 1)
    alpha, sigma = (1 - t, t) if path == "linear" else (torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2))
    answer = s.output.prediction.detach().clone().requires_grad_()
    by_v = s.x_t - t * answer if path == "linear" else alpha * s.x_t - sigma * answer * 2 / torch.pi
    x = {"x": answer, "eps": (s.x_t - sigma * answer) / alpha, "v": by_v}[prediction]
    seen, real = toy.features(x, ("one", "two")), toy.features(b.x0, ("one", "two"))
    parts = [(1 - F.cosine_similarity(seen[k], real[k], dim=1)).mean((1, 2)) for k in seen]
    wanted = 0.3 * {"lpips_form": 2, "cosine": 1}[distance] * sum(parts).mean()
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, answer)[0], rtol=1e-3, atol=1e-7)
    assert got.abs().amax((1, 2, 3)).gt(1e-6).all()


def test_the_gradient_is_the_slope_of_the_loss_through_a_real_encoder(effnet):
    technique, flow, b = Perceptual(effnet), flow_of(), batch(2, 32)
    s = step(b, flow, 0.3 * torch.randn(b.x0.shape, generator=stream(1, "answer")))
    slope, = torch.autograd.grad(technique.loss(s), s.output.prediction)
    way, h = slope / slope.norm(), 0.02
    here = lambda sign: technique.loss(step(b, flow, s.output.prediction.detach() + sign * h * way)).item()
    assert (here(1) - here(-1)) / (2 * h) == pytest.approx(slope.norm().item(), rel=0.05)


def test_gradient_norms_are_those_of_the_two_losses():
    flow, b, technique = flow_of(), batch(), Perceptual(Toy(), ("one", "two"), 0.7)
    s = step(b, flow)
    first, second, angle = gradient_norms(technique, s)
    t, v = b.t.view(-1, 1, 1, 1), s.output.prediction.detach()
    by_flow = (2 * (v - (b.noise - b.x0)) / b.x0[0].numel()).flatten(1)
    x = (s.x_t - t * v).requires_grad_()
    by_x, = torch.autograd.grad(0.7 * technique.distances(x, b.x0).sum(), x)
    torch.testing.assert_close(first, by_flow.norm(dim=1))
    torch.testing.assert_close(second, b.t * by_x.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(angle, F.cosine_similarity(by_flow, (-t * by_x).flatten(1)), rtol=1e-4, atol=1e-5)


def test_features_that_are_all_zero_give_a_finite_gradient():
    for kind in DISTANCES.values():
        a = torch.zeros(1, 4, 2, 2).requires_grad_()
        kind(a, torch.ones(1, 4, 2, 2)).sum().backward()
        assert a.grad.isfinite().all()


@pytest.mark.parametrize("t_max,acts", [(1.0, 6), (0.5, 3), (0.06, 1)])
def test_only_samples_below_t_max_act_and_their_pull_does_not_depend_on_the_others(t_max, acts):
    flow, b = flow_of(), batch()
    s, t = step(b, flow), Perceptual(Toy(), ("one",), t_max=t_max)
    pull, = torch.autograd.grad(t.loss(s), s.output.prediction)
    whole, = torch.autograd.grad(Perceptual(Toy(), ("one",)).loss(s), s.output.prediction)
    assert (pull.flatten(1).abs().sum(1) > 0).tolist() == [True] * acts + [False] * (6 - acts)
    torch.testing.assert_close(pull[:acts], whole[:acts])


def test_nobody_below_t_max_adds_zero_and_costs_nothing(monkeypatch):
    toy = Toy()
    monkeypatch.setattr(toy, "features", lambda *a: pytest.fail("the encoder was asked"))
    s = step(batch(), flow_of())
    added = Perceptual(toy, ("one",), t_max=0.05).loss(s)
    assert added.shape == () and added == 0 and added.isfinite()
    (added + s.output.prediction.sum()).backward()
    assert s.output.prediction.grad.eq(1).all()


def test_one_in_some_is_the_mean_over_these_and_shares_of_a_batch_average_to_the_whole():
    flow, b, t = flow_of(), batch(8), Perceptual(Toy(), ("one",), one_in=2, t_max=0.8)
    v = torch.randn(b.x0.shape, generator=stream(3, "v"))
    s = step(b, flow, v)
    each = Perceptual(Toy(), ("one",)).distances(flow.to("x", v.detach(), s.x_t, b.t), b.x0).detach()
    wanted = 0.1 * (each * (b.t < 0.8))[[0, 2, 4, 6]].mean()
    torch.testing.assert_close(t.loss(s).detach(), wanted)
    cut = lambda part: replace(b, **{k: getattr(b, k)[part] for k in ("x0", "noise", "t", "index", "text", "mask", "dropped")})
    parts = [t.loss(step(cut(part), flow, v.detach()[part])).detach() for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(parts) / 2, wanted)


def test_the_encoder_works_in_float32_under_autocast(effnet):
    b, t = batch(2, 32), Perceptual(effnet)
    x = b.x0 + 0.01 * b.noise
    plain = t.distances(x, b.x0)
    with torch.autocast("cpu", torch.bfloat16):
        assert effnet.model(effnet.prepare(x), ("tap1",))["tap1"].dtype == torch.bfloat16, "autocast is on"
        under = t.distances(x.bfloat16(), b.x0), t.distances(x, b.x0)
    assert under[1].equal(plain) and under[0].dtype == torch.float32


def test_larger_images_are_made_smaller_with_antialias(effnet):
    "Stripes finer than the encoder's pixels are grey to it; whoever only looks at the rows it needs sees white."
    rows = torch.arange(128)
    fade = torch.sin(torch.pi * rows / 127) ** 2                       # the edges of the image are no stripes
    stripes, white = (v.view(1, 1, 128, 1).expand(1, 3, -1, 128) for v in (fade * ((rows % 4 % 3 != 0) * 2.0 - 1), fade))
    d, grey = Perceptual(effnet).distances, torch.zeros(1, 3, 128, 128)
    assert d(stripes, grey) < 0.02 * d(white, grey)


def test_the_batch_is_not_written_to_and_the_encoder_is_no_part_of_the_technique(effnet):
    class Module(nn.Module, Toy):
        def __init__(self):
            nn.Module.__init__(self)
            Toy.__init__(self)
            self.weight = nn.Parameter(torch.ones(1))
    for encoder, taps in ((effnet, ("tap1", "tap2")), (Module(), ("one",))):
        b, t = batch(2, 32), Perceptual(encoder, taps)
        before = [v.clone() for v in (b.x0, b.noise, b.t)]
        t.loss(step(b, flow_of())).backward()
        assert all(v.equal(w) for v, w in zip(before, (b.x0, b.noise, b.t)))
        assert not list(t.parameters()) and not list(t.modules())[1:] and not t.state_dict()
    assert all(p.grad is None and not p.requires_grad for p in effnet.model.parameters())


def test_two_perceptual_losses_add_up(prepared, effnet):
    "PRX used one with convolutional features and one with a transformer's, side by side."
    b = add_noise(read_batch(prepared, SMOKE, 0), SMOKE, 0, CPU)
    model, flow = new_state(SMOKE, CPU).model, FlowMatching(SMOKE.flow)
    a, c = Perceptual(effnet, ("tap1",), 0.2), Perceptual(effnet, ("tap2",), 0.01, "cosine")
    one, two, both = (objective(model, b, flow, k)["Perceptual"] for k in ([a], [c], [a, c]))
    torch.testing.assert_close(both, one + two)
    assert one > 0 and two > 0


def test_training_with_it_moves_the_weights_and_keeps_no_encoder(whole, prepared, tmp_path):
    plain = train(SMOKE.replace("techniques.perceptual.weight", 0), tmp_path, prepared=prepared, progress=False)
    assert weights(whole).keys() == weights(plain).keys(), "nothing more in the checkpoint"
    name = "model.final_layer.linear.weight"
    assert not weights(whole)[name].equal(weights(plain)[name])
    first = [run.curves[(run.curves.name == "loss flow") & (run.curves.step == 1)].value.item() for run in (whole, plain)]
    assert first[0] == first[1] and set(whole.curves.name) - set(plain.curves.name) == {"loss Perceptual"}
    assert whole.record["cost"]["parameters"] == plain.record["cost"]["parameters"]


def test_it_brings_the_distance_down(prepared, effnet, tmp_path):
    "The same steps on the loss alone: the distance on a fixed batch falls."
    recipe = SMOKE.replace({"train.steps": 30, "optimizer.lr": 3e-3, "techniques.perceptual.weight": 1.0})
    b, flow = add_noise(read_batch(prepared, recipe, 0), recipe, 0, CPU), FlowMatching(recipe.flow)
    state, technique = new_state(recipe, CPU), build(recipe, prepared, CPU)[0]
    seen = []
    for n in range(30):
        losses = objective(state.model, b, flow, [technique], n)
        seen.append(losses["Perceptual"].item())
        training.optimise(state, {"only": losses["Perceptual"]}, recipe, n)
    assert seen[-1] < 0.8 * seen[0]


def test_it_acts_from_start_to_stop(prepared, tmp_path):
    recipe = SMOKE.replace({"techniques.perceptual.start": 2, "techniques.perceptual.stop": 4})
    run = train(recipe, tmp_path, prepared=prepared, progress=False)
    assert run.curves[run.curves.name == "loss Perceptual"].step.tolist() == [3, 4]


def test_a_killed_run_goes_on_bit_for_bit(whole, prepared, tmp_path):
    folder = strike(SMOKE, tmp_path, 3, "after")
    assert [p.name for p in (folder / "checkpoint").glob("*")] == ["step-0000002.safetensors"]
    same(train(SMOKE, folder, prepared=prepared, progress=False), whole)


BAD = {
    "no encoder": ({"techniques.perceptual.encoder": "vgg16"}, "vgg16"),
    "no hub": ({"techniques.perceptual.encoder": "someone/dinov2", "techniques.perceptual.taps": ["block12"]}, "someone/dinov2"),
    "no tap": ({"techniques.perceptual.taps": ["tap1", "tap9"]}, "no tap 'tap9'; it has tap1, tap2"),
    "tap of another": ({"techniques.perceptual.taps": ["block9"]}, "effnet-lite0 has no tap 'block9'"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_encoder_or_tap_that_is_not_there_is_one_error_before_training(name, prepared, tmp_path, monkeypatch):
    changes, says = BAD[name]
    monkeypatch.setattr(training, "objective", lambda *a, **k: pytest.fail("training began"))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError) as error:
        train(SMOKE.replace(changes), tmp_path, prepared=prepared, progress=False)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "record.json").exists()


def test_a_size_below_one_patch_is_one_error(monkeypatch):
    real = load_vision_encoder("effnet-lite0", 32, "cpu")
    monkeypatch.setattr(real, "size", 0)
    monkeypatch.setattr("prx_nb.techniques.perceptual.load_vision_encoder", lambda *a: real)
    with pytest.raises(EncoderError, match="perceptual.size = 32 is smaller than one patch of 'effnet-lite0'"):
        Perceptual.of(SMOKE, None, "cpu")


WRONG = [("weight", -1, "greater than or equal to 0"), ("t_max", 0, "greater than 0"), ("t_max", 1.5, "less than or equal to 1"),
         ("taps", [], "at least one tap"), ("taps", ["tap1", "tap1"], "each once"), ("distance", "lpips", "'lpips_form' or 'cosine'"),
         ("size", 8, "greater than or equal to 16"), ("one_in", 0, "greater than or equal to 1")]


@pytest.mark.parametrize("field,value,says", WRONG, ids=[f"{f}={v}" for f, v, _ in WRONG])
def test_wrong_settings_are_one_clear_error(field, value, says):
    with pytest.raises(RecipeError) as error:
        SMOKE.replace(f"techniques.perceptual.{field}", value)
    assert says in str(error.value) and f"perceptual.{field}" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_latents_are_refused():
    latents = {"latents.autoencoder": "a/b", "latents.channels": 4, "latents.factor": 2, "denoiser.in_channels": 4}
    assert preset("smoke").replace(latents)
    with pytest.raises(RecipeError, match="latents.autoencoder"):
        SMOKE.replace(latents)
    with pytest.raises(EncoderError, match=r"takes floating point images \(B, 3, H, W\)"):
        Perceptual(load_vision_encoder("effnet-lite0", 32, "cpu")).distances(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))


def test_the_recipe_says_all_of_it(prepared):
    recipe = SMOKE.replace({f"techniques.perceptual.{k}": v for k, v in {
        "weight": 0.3, "encoder": "random-vit-s14", "taps": ["block2"], "distance": "cosine", "t_max": 0.5, "size": 30, "one_in": 4,
        "start": 1, "stop": 5}.items()})
    t, = build(recipe, prepared, "cpu")
    assert (t.weight, t.taps, t.distance, t.t_max, t.one_in, t.start, t.stop) == (0.3, ("block2",), "cosine", 0.5, 4, 1, 5)
    assert t._frozen[0].name == "random-vit-s14" and t._frozen[0].size == 28
