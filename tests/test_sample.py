"""The sampler against diffusers' scheduler, and its promises."""
from types import SimpleNamespace

import pytest
import torch

from prx_nb.core import recipe as recipes
from prx_nb.core.denoiser import PRX
from prx_nb.core.flow import FlowMatching, coefficients, spread
from prx_nb.core.sample import draw, euler, grid, guided, noise
from prx_nb.core.seeds import stream


def network(recipe: recipes.Recipe) -> PRX:
    net = PRX(**recipe.denoiser.model_dump())
    for p in net.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1, generator=stream(0, "w"))
    return net


def words(n: int, length: int = 6, dim: int = 384):
    lengths = torch.tensor([6, 3, 2, 5, 1])[torch.arange(n) % 5]
    return torch.randn(n, length, dim, generator=stream(0, "words")), torch.arange(length) < lengths[:, None]


EMPTY = torch.zeros(1, 6, 384), torch.arange(6)[None] < 2


@pytest.mark.parametrize("steps,shift", [(28, 3.0), (28, 1.0), (7, 2.0), (1, 1.0)])
def test_walk_equals_diffusers_scheduler_step_by_step(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler
    recipe = recipes.preset("smoke")
    net, (text, mask) = network(recipe), words(3)
    velocity = guided(net, FlowMatching(), text, mask, EMPTY[0].expand(3, -1, -1), EMPTY[1].expand(3, -1), 3.0)
    start, stops = noise(2, range(3), (3, 16, 16)), []
    with torch.no_grad():
        euler(velocity, start, grid(steps, shift, "diffusers"), lambda i, x: stops.append(x))
        peer = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        peer.set_timesteps(steps)
        x = start
        for i, t in enumerate(peer.timesteps):
            x = peer.step(velocity(x, (t / 1000).expand(3)), t, x).prev_sample
            torch.testing.assert_close(stops[i], x, rtol=1e-3, atol=1e-4)
    assert len(stops) == steps


@pytest.mark.parametrize("kind", ["linear", "diffusers"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grids_run_from_one_to_zero(kind, shift):
    times = grid(20, shift, kind)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all() and len(times) == 21


def test_unknown_grid():
    with pytest.raises(ValueError, match="linear and diffusers"):
        grid(3, 1.0, "cosine")


@pytest.mark.parametrize("ask", ["v", "x", "eps"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_perfect_model_leaves_no_noise(ask, path):
    "The mistake of the public sampler: with the divisor clamped, noise of deviation .014 stays."
    image, start = torch.rand(2, 3, 8, 8) * 2 - 1, noise(0, range(2), (3, 8, 8))
    f = FlowMatching(recipes.Flow(prediction=ask, path=path))
    text = torch.zeros(2, 1, 4)

    def perfect(x, t, *_):                                           # knows the image; the noise is what else x holds
        alpha, sigma, *_ = (spread(c, x) for c in coefficients(t, path))
        return SimpleNamespace(prediction=f.target(image.expand_as(x), (x - alpha * image) / sigma, t))
    steps = 50 if path == "linear" else 400
    out = euler(guided(perfect, f, text, None, text, None), start, grid(steps))
    assert (out - image).std() < (1e-4 if path == "linear" else 0.02)
    if ask == "x" and path == "linear":
        clamped = euler(guided(perfect, f, text, None, text, None, clamp=0.05), start, grid(steps))
        assert (clamped - image).std() > 0.01


@pytest.mark.parametrize("ask", ["v", "x", "eps"])
def test_guidance_by_hand(ask):
    recipe = recipes.preset("smoke")
    net, f = network(recipe), FlowMatching(recipes.Flow(prediction=ask))
    (text, mask), x, t = words(4), torch.randn(4, 3, 16, 16), torch.full((4,), 0.6)
    null = EMPTY[0].expand(4, -1, -1), EMPTY[1].expand(4, -1)
    with torch.no_grad():
        with_ = f.to("v", net(x, t, text, mask).prediction, x, t)
        without = f.to("v", net(x, t, *null).prediction, x, t)
        got = guided(net, f, text, mask, *null, 2.5)(x, t)
    torch.testing.assert_close(got, without + 2.5 * (with_ - without), rtol=1e-3, atol=1e-3)


def test_guidance_one_asks_once():
    calls = []
    model = lambda x, t, text, mask: calls.append(len(x)) or SimpleNamespace(prediction=x)
    text = torch.zeros(3, 1, 4)
    for w in (1, 2):
        guided(model, FlowMatching(), text, None, text, None, w)(torch.zeros(3, 3, 4, 4), torch.ones(3))
    assert calls == [3, 6]


def test_pictures_depend_on_seed_and_number_only():
    recipe = recipes.preset("smoke")
    net, (text, mask) = network(recipe), words(5)
    whole = draw(net, recipe.replace("evaluate.batch", 5), text, mask, *EMPTY, seed=3)
    parts = draw(net, recipe.replace("evaluate.batch", 2), text, mask, *EMPTY, seed=3)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)
    assert (draw(net, recipe, text, mask, *EMPTY, seed=4) - whole).abs().mean() > 0.05
    wide = draw(net, recipe, text[:1], mask[:1], *EMPTY, size=(16, 32))
    assert wide.shape == (1, 3, 16, 32)


def test_noise_is_never_shared():
    "The public evaluation starts each batch from the same noise; here all samples differ, across batches too."
    many = torch.cat([noise(0, range(i, i + 50), (3, 4, 4)) for i in range(0, 500, 50)]).flatten(1)
    assert torch.pdist(many).min() > 1
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_the_start_is_not_written_to():
    start = torch.randn(2, 3, 4, 4)
    before = start.clone()
    euler(lambda x, t: x, start, grid(3))
    assert start.equal(before)
