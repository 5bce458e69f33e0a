"""The flow against diffusers, scipy and autograd."""
import itertools

import numpy as np
import pytest
import torch

from prx_nb.core import recipe as recipes
from prx_nb.core.flow import PATHS, FlowMatching, coefficients, convert, shifted, spread, timesteps
from prx_nb.core.seeds import stream

KINDS = ("v", "x", "eps")


def triple(path: str, n: int = 128):
    "Random images, noise and the true v, x and eps on a path, in float64."
    g = stream(0, "flow", path)
    x0, e = torch.randn(2, n, 3, 4, 5, generator=g, dtype=torch.float64)
    t = torch.rand(n, generator=g, dtype=torch.float64) * 0.98 + 0.01
    a, s, da, ds = (spread(c, x0) for c in coefficients(t, path))
    return t, a * x0 + s * e, {"x": x0, "eps": e, "v": da * x0 + ds * e}


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative_of_the_path(path):
    t = torch.rand(200, dtype=torch.float64) * 0.98 + 0.01
    t.requires_grad_()
    a, s, da, ds = coefficients(t, path)
    for value, slope in ((a, da), (s, ds)):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], slope)
    ends = coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64), path)
    np.testing.assert_allclose(ends[0], [1, 0], atol=0.01)
    np.testing.assert_allclose(ends[1], [0, 1], atol=0.01)


@pytest.mark.parametrize("source,to", itertools.product(KINDS, repeat=2))
@pytest.mark.parametrize("path", PATHS)
def test_conversions_are_exact(path, source, to):
    t, x_t, truth = triple(path)
    torch.testing.assert_close(convert(truth[source], x_t, t, source, to, path, clamp=0), truth[to], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("source,to", itertools.permutations(KINDS, 2))
def test_there_and_back(source, to):
    t, x_t, truth = triple("linear")
    guess = torch.randn(x_t.shape, dtype=torch.float64)
    back = convert(convert(guess, x_t, t, source, to, clamp=0), x_t, t, to, source, clamp=0)
    torch.testing.assert_close(back, guess, rtol=1e-6, atol=1e-6)


def test_linear_path_against_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler()
    x0, e = torch.randn(2, 6, 3, 8, 8)
    t = scheduler.timesteps[torch.randint(0, 1000, (6,))]
    theirs = scheduler.scale_noise(x0, t, e)
    torch.testing.assert_close(FlowMatching().mix(x0, e, t / 1000), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(FlowMatching().target(x0, e, t / 1000), e - x0)


def test_jit_formula_with_its_clamp():
    x_t, x_hat, t = torch.randn(50, 3, 4, 4), torch.randn(50, 3, 4, 4), torch.rand(50)
    t[:10] *= 0.05
    written = (x_t - x_hat) / t.clamp_min(0.05).view(-1, 1, 1, 1)
    torch.testing.assert_close(convert(x_hat, x_t, t, "x", "v"), written)


@pytest.mark.parametrize("ask,space", itertools.product(KINDS, repeat=2))
@pytest.mark.parametrize("path", PATHS)
def test_loss_is_the_error_after_conversion_outputs_and_gradients(path, ask, space):
    f = FlowMatching(recipes.Flow(path=path, prediction=ask, loss=space, noise_scale=1.7))
    g = stream(3, "loss")
    x0, e = torch.randn(2, 16, 3, 4, 4, generator=g)
    t = timesteps(16, g)
    x_t = f.mix(x0, e, t)
    guess = torch.randn(x0.shape, generator=g).requires_grad_()
    short = f.loss(guess, x0, e, t)
    long = (f.to(space, guess.double(), x_t.double(), t.double())
            - f.to(space, f.target(x0, e, t).double(), x_t.double(), t.double())).square().flatten(1).mean(1)
    torch.testing.assert_close(short.double(), long.double(), rtol=1e-3, atol=1e-3)
    a, = torch.autograd.grad(short.mean(), guess, retain_graph=True)
    b, = torch.autograd.grad(long.mean(), guess)
    torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-3)
    assert f.loss(f.target(x0, e, t), x0, e, t).max() == 0


@pytest.mark.parametrize("mix,shift", [(0.0, 1.0), (0.1, 1.0), (0.1, 3.0), (1.0, 1.0)])
def test_times_follow_their_distribution(mix, shift):
    "Kolmogorov-Smirnov against the distribution written with scipy."
    from scipy import stats
    t = timesteps(40_000, stream(0, "ks"), recipes.Flow(uniform_mix=mix, shift=shift)).double().numpy()
    assert t.min() >= 1e-3 - 1e-9 and t.max() < 1

    def cdf(x):
        back = x / (shift - (shift - 1) * x)                              # undo the shift
        low = stats.norm.cdf(np.log(1e-3 / (shift - (shift - 1) * 1e-3) / (1 - 1e-3 / (shift - (shift - 1) * 1e-3))))
        normal = (stats.norm.cdf(np.log(back / (1 - back))) - low) / (1 - low)
        return (1 - mix) * np.clip(normal, 0, 1) + mix * (x - 1e-3) / (1 - 1e-3)
    assert stats.kstest(t, cdf).pvalue > 1e-3
    if mix == 0:
        assert stats.kstest(t, lambda x: (x - 1e-3) / (1 - 1e-3)).pvalue < 1e-6, "the test would notice another distribution"


def test_logit_normal_agrees_with_diffusers():
    from diffusers.training_utils import compute_density_for_timestep_sampling
    from scipy import stats
    theirs = compute_density_for_timestep_sampling("logit_normal", 20_000, logit_mean=0.0, logit_std=1.0, generator=torch.Generator().manual_seed(0))
    ours = timesteps(20_000, stream(0, "peer"), recipes.Flow(uniform_mix=0))
    assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3


def test_uniform_times_and_the_shift():
    t = timesteps(20_000, stream(1, "u"), recipes.Flow(timesteps="uniform", shift=3.0))
    assert abs(t.median() - 0.75) < 0.01
    torch.testing.assert_close(shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))
