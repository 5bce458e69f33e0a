"JiT: the spectrum of patches against other algebra, the floor of a narrow network against networks, the weight against the flow's own loss."
import numpy as np
import pytest
import torch
from runs import CPU, same, weights

from prx_nb.core.denoiser import PRX, patchify
from prx_nb.core.flow import FlowMatching, timesteps
from prx_nb.core.recipe import Flow, preset
from prx_nb.core.seeds import stream
from prx_nb.core.batch import add_noise, prepare, read_batch
from prx_nb.core.train import train
from prx_nb.lab import ablations
from prx_nb.techniques.jit import dimension, floor, loss_weight, patch_spectrum, plot_spectrum


def images(seed, n=200, size=16):
    "Smooth images with some structure, on several scales."
    g = stream(seed, "images")
    parts = [torch.nn.functional.interpolate(torch.randn(n, 3, k, k, generator=g), (size, size), mode="bilinear") for k in (2, 4, 8)]
    return parts[0] + 0.5 * parts[1] + 0.2 * parts[2] + torch.randn(3, 1, 1, generator=g)


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_spectrum_is_that_of_numpys_svd_and_torchs_pca(patch, seed):
    x = images(seed)
    rows = torch.nn.functional.unfold(x, patch, stride=patch).transpose(1, 2).flatten(0, 1).double()       # another way to cut patches
    ours = patch_spectrum(x, patch)
    theirs = np.linalg.svd((rows - rows.mean(0)).numpy(), compute_uv=False) ** 2 / len(rows)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-9)
    assert (ours.diff() <= 0).all() and torch.isclose(ours.sum(), rows.var(0, correction=0).sum())
    _, values, _ = torch.pca_lowrank(rows, rows.shape[1], center=True)
    torch.testing.assert_close(ours, values**2 / len(rows), rtol=1e-6, atol=1e-9)


def test_dimension_counts_components():
    s = torch.tensor([6.0, 3.0, 1.0, 0.0])
    assert [dimension(s, v) for v in (0.1, 0.6, 0.61, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert dimension(torch.ones(100)) == 95


@pytest.mark.parametrize("width", [1, 5, 20, 47, 48])
def test_the_floor_is_what_the_best_plane_leaves_and_no_other_plane_is_nearer(width):
    x, g = images(1), stream(1, "planes")
    rows = patchify(x, 4).flatten(0, 1).double()
    centred = rows - rows.mean(0)
    left = lambda plane: (centred - centred @ plane @ plane.T).square().mean().item()
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    low = floor(patch_spectrum(x, 4), width)
    assert low == pytest.approx(left(v[:width].T), rel=1e-6, abs=1e-12)
    for _ in range(5):
        assert left(torch.linalg.qr(torch.randn(48, width, generator=g, dtype=torch.float64))[0]) >= low - 1e-12


def test_the_velocitys_spectrum_is_one_more_than_the_images():
    x, g = images(2, n=4000), stream(2, "noise")
    noise = torch.randn(x.shape, generator=g)
    v = FlowMatching().target(x, noise, torch.rand(len(x), generator=g))
    torch.testing.assert_close(patch_spectrum(v, 4), 1 + patch_spectrum(x, 4), rtol=0.03, atol=0.03)


def test_no_denoiser_answers_below_the_floor():
    "Weights drawn at random, then trained on one batch: the answers stay on a plane of the network's width, and the error above the floor."
    g = stream(0, "net")
    net = PRX(in_channels=3, patch_size=8, context_in_dim=8, hidden_size=16, num_heads=2, depth=1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    flow, x0 = FlowMatching(), images(3, n=128)
    noise, t, text = torch.randn(x0.shape, generator=g), torch.rand(128, generator=g), torch.randn(128, 2, 8, generator=g)
    answer = lambda: net(flow.mix(x0, noise, t), t, text).prediction
    low, descent = floor(patch_spectrum(noise - x0, 8), 16), torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        loss = flow.loss(answer(), x0, noise, t).mean()
        assert loss.item() > low > 0.8
        descent.zero_grad(), loss.backward(), descent.step()
    s = patch_spectrum(answer().detach(), 8)
    assert s[16] < 1e-8 * s[0] and dimension(s, 1.0) <= 16 < len(s)
    free = patch_spectrum(images(3, n=128), 8)
    assert floor(free, 16) < 0.05, "the images would pass"


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
@pytest.mark.parametrize("loss", ["v", "x", "eps"])
def test_the_weight_is_what_the_loss_of_the_flow_applies(path, prediction, loss):
    g = stream(0, "weight")
    flow = FlowMatching(Flow(path=path, prediction=prediction, loss=loss, clamp=0.1))
    x0, noise, wrong = torch.randn(3, 64, 3, 4, 4, generator=g)
    t = timesteps(64, g)
    target = flow.target(x0, noise, t)
    ratio = flow.loss(target + wrong, x0, noise, t) / wrong.square().flatten(1).mean(1)
    torch.testing.assert_close(loss_weight(t, prediction, loss, 0.1, path), ratio, rtol=1e-4, atol=1e-6)


def test_the_weight_on_the_straight_path_is_that_of_the_paper():
    t = torch.linspace(0, 1, 101)
    torch.testing.assert_close(loss_weight(t), 1 / t.clamp_min(0.05) ** 2)
    torch.testing.assert_close(loss_weight(t, clamp=0.2), 1 / t.clamp_min(0.2) ** 2)
    torch.testing.assert_close(loss_weight(t, "eps", "v"), 1 / (1 - t).clamp_min(0.05) ** 2)
    assert loss_weight(t, "x", "x").eq(1).all() and loss_weight(t, "v", "v").eq(1).all()


def test_patches_that_do_not_fill_the_image_are_one_clear_error():
    with pytest.raises(ValueError, match="patches of 5 x 5 do not fill images of 16 x 16"):
        patch_spectrum(images(0, 2), 5)


def test_the_picture_shows_the_three_shares():
    s = patch_spectrum(images(0), 4)
    ax = plot_spectrum(s, 16)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["image"], (s.cumsum(0) / s.sum()).numpy())
    np.testing.assert_allclose(lines["noise"], np.arange(1, 49) / 48)
    np.testing.assert_allclose(lines["velocity"], ((1 + s).cumsum(0) / (1 + s).sum()).numpy())
    assert (lines["image"][:-1] > lines["velocity"][:-1]).all() and (lines["velocity"][:-1] > lines["noise"][:-1]).all()


@pytest.mark.parametrize("size", ["smoke", "cpu", "gpu"])
def test_the_ablation_asks_its_question_where_it_says(size):
    a = ablations.get("jit")
    recipes = {v: ablations.recipe(a, v, size) for v in a.variants}
    assert {v: (r.flow.prediction, r.flow.loss, r.flow.clamp, r.denoiser.bottleneck_size) for v, r in recipes.items()} == {
        "v": ("v", "v", 0.05, None), "x": ("x", "v", 0.05, None), "x_bottleneck": ("x", "v", 0.05, 16),
        "x_loss_x": ("x", "x", 0.05, None), "x_clamp": ("x", "v", 0.2, None)}
    d = recipes["x"].denoiser
    assert d.in_channels * d.patch_size**2 / d.hidden_size == {"smoke": 6, "cpu": 3, "gpu": 0.5}[size]


SMOKE = {"train.steps": 6, "train.checkpoint_every": 4, "data.limit": 64}


@pytest.fixture(scope="module")
def recipe():
    return ablations.recipe(ablations.get("jit"), "x_bottleneck", "smoke", 0, SMOKE)


def test_a_run_with_wide_patches_and_a_bottleneck_goes_on_bit_for_bit(recipe, tmp_path, monkeypatch):
    from prx_nb.core import train as training
    prepared = prepare(recipe, progress=False)
    whole = train(recipe, tmp_path / "whole", prepared=prepared, progress=False)
    assert weights(whole)["model.img_in.0.weight"].shape == (16, 192)
    real, seen = training.optimise, []

    def stumble(state, losses, recipe, step, *more):
        seen.append(step)
        if step == 5:
            raise KeyboardInterrupt
        return real(state, losses, recipe, step, *more)
    with monkeypatch.context() as patch:
        patch.setattr(training, "optimise", stumble)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "again", prepared=prepared, progress=False)
    same(train(recipe, tmp_path / "again", prepared=prepared, progress=False), whole)
    assert seen == [0, 1, 2, 3, 4, 5]
    batch = add_noise(read_batch(prepared, recipe, 0), recipe, 0, CPU)
    assert patch_spectrum(batch.x0, 8).shape == (192,) and preset("smoke").denoiser.patch_size == 4
