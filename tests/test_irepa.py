"Spatial normalisation and the convolution as projector: against the formulas, place by place, and in a training."
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import weights

from prx_nb.core.denoiser import Route
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.technique import Needs, Technique
from prx_nb.core.train import train
from prx_nb.techniques.irepa import Conv, alikeness, normaliser, scalar, similarity, token
from prx_nb.techniques.repa import REPA

SMOKE = preset("smoke").replace({"train.steps": 6, "train.checkpoint_every": 2, "train.keep": 9, "techniques.repa.weight": 0.5,
                                 "techniques.repa.projector": "conv", "techniques.repa.spatial_norm": "scalar"})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_scalar_is_the_papers_formula(gamma):
    maps = random(3, 5, 4, 6) * 2 + 3
    tokens = maps.double().flatten(2).transpose(1, 2).numpy()                    # (B, N, C)
    want = (tokens - gamma * tokens.mean(1, keepdims=True)) / (tokens.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(scalar(maps, gamma).flatten(2).transpose(1, 2).numpy(), want, rtol=1e-4, atol=1e-5)
    assert normaliser("scalar", gamma)(maps).equal(scalar(maps, gamma))


def test_token_is_the_public_codes_formula():
    maps = random(3, 5, 4, 6) * 2 + 3
    tokens = maps.double().flatten(2).transpose(1, 2).numpy()
    weight = tokens.mean(2, keepdims=True)                                       # of each token, over its channels
    left = tokens - weight * tokens.mean(1, keepdims=True)
    want = left / (left.std(1, ddof=1, keepdims=True) + 1e-6)                    # of what is left, as theirs
    before = left / (tokens.std(1, ddof=1, keepdims=True) + 1e-6)
    assert np.abs(want - before).max() > 0.1, "the order is seen by this test"
    np.testing.assert_allclose(token(maps).flatten(2).transpose(1, 2).numpy(), want, rtol=1e-4, atol=1e-5)
    assert normaliser("token")(maps).equal(token(maps)) and normaliser("none")(maps) is maps


def test_what_each_takes_off_layer_normed_tokens():
    "A common part is in all tokens. The paper's normalisation removes it; the public code's leaves it."
    tokens = F.layer_norm(random(4, 64, 48) + 3 * random(4, 1, 48, seed=1), (48,))
    maps = tokens.transpose(1, 2).unflatten(2, (8, 8))
    alike = {k: alikeness(normaliser(k)(maps).flatten(2).transpose(1, 2)) for k in ("none", "scalar", "token")}
    assert alike["none"] > 0.8 and alike["token"] > 0.8 and abs(alike["scalar"]) < 0.05


def test_a_channel_that_is_the_same_everywhere_does_no_harm():
    maps = random(2, 3, 4, 4)
    maps[:, 1] = 7.0
    assert scalar(maps).isfinite().all() and scalar(maps)[:, 1].abs().max() == 0


def test_similarity_is_the_cosine_of_every_pair():
    x = random(2, 6, 5)
    want = F.cosine_similarity(x[:, :, None], x[:, None], dim=3)
    torch.testing.assert_close(similarity(x), want)
    other = ~torch.eye(6, dtype=torch.bool)
    assert alikeness(x) == pytest.approx(want[:, other].mean().item(), abs=1e-6)


def by_hand(conv, tokens, kept):
    "Place by place: the sum over neighbours that are there, scaled by how many the grid has over how many are there."
    (rows, columns), weight, out = conv.grid, conv.conv.weight, []
    for x, places in zip(tokens, kept.tolist()):
        where = {p: i for i, p in enumerate(places)}
        for p in places:
            near = [(p // columns + dy, p % columns + dx, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            near = [(y * columns + z, dy, dx) for y, z, dy, dx in near if 0 <= y < rows and 0 <= z < columns]
            there = [(where[n], dy, dx) for n, dy, dx in near if n in where]
            out.append(sum(weight[:, :, dy + 1, dx + 1] @ x[i] for i, dy, dx in there) * len(near) / len(there) + conv.conv.bias)
    return torch.stack(out).view(len(tokens), kept.shape[1], -1)


@pytest.mark.parametrize("count", [1, 4, 9, 15])
def test_the_convolution_of_kept_tokens(count):
    torch.manual_seed(0)
    conv, tokens = Conv(6, 4, (3, 5)), random(3, count, 6).requires_grad_()
    kept = torch.stack([torch.randperm(15)[:count] for _ in range(3)])
    ours, theirs = conv(tokens, kept), by_hand(conv, tokens, kept)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    wrt, pull = [tokens, *conv.parameters()], random(*ours.shape, seed=1)
    for a, b in zip(torch.autograd.grad(ours, wrt, pull), torch.autograd.grad(theirs, wrt, pull)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_all_tokens_kept_is_the_plain_convolution():
    torch.manual_seed(0)
    conv, x = Conv(6, 4, (3, 5)), random(2, 15, 6)
    plain = F.conv2d(x.transpose(1, 2).reshape(2, 6, 3, 5), conv.conv.weight, conv.conv.bias, padding=1).reshape(2, 4, 15).transpose(1, 2)
    torch.testing.assert_close(conv(x), plain)
    torch.testing.assert_close(conv(x, torch.arange(15).expand(2, -1)), plain)
    mixed = torch.stack([torch.randperm(15) for _ in range(2)])
    torch.testing.assert_close(conv(torch.stack([x[i, mixed[i]] for i in range(2)]), mixed), torch.stack([plain[i, mixed[i]] for i in range(2)]))


def test_from_a_recipe(prepared):
    repa = REPA.of(SMOKE.replace({"techniques.repa.gamma": 0.3}), prepared)
    maps = random(2, 112, 4, 4)
    assert isinstance(repa.projector, Conv) and repa.projector.grid == (4, 4) and repa.normalise(maps).equal(scalar(maps, 0.3))
    other = REPA.of(SMOKE.replace({"techniques.repa.spatial_norm": "token", "techniques.repa.projector": "mlp"}), prepared)
    assert not isinstance(other.projector, Conv) and other.normalise(maps).equal(token(maps))
    with pytest.raises(RecipeError, match="techniques.repa.spatial_norm"):
        SMOKE.replace("techniques.repa.spatial_norm", "channel")


class Half(Technique):
    def needs(self, batch, step):
        return Needs((), Route(batch.random("route", 16).argsort(1)[:, :8], 0, 1))


@pytest.mark.parametrize("more", [[], [Half()]], ids=["all tokens", "half of them"])
def test_a_training_is_resumed_bit_for_bit(more, prepared, tmp_path):
    run = train(SMOKE, tmp_path / "a", prepared=prepared, progress=False, device="cpu", techniques=more)
    shutil.copytree(run.dir, tmp_path / "b")
    for path in sorted((tmp_path / "b/checkpoint").glob("*"))[1:]:
        path.unlink()
    (tmp_path / "b/record.json").unlink()
    again = train(SMOKE, tmp_path / "b", prepared=prepared, progress=False, device="cpu", techniques=more)
    first, second = weights(run), weights(again)
    assert first["techniques.repa.projector.conv.weight"].shape == (112, 32, 3, 3)
    assert first.keys() == second.keys() and all(v.equal(second[k]) for k, v in first.items())
    assert run.curves[run.curves.name == "loss REPA"].value.tolist() == again.curves[again.curves.name == "loss REPA"].value.tolist()
