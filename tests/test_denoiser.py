"""The denoiser against diffusers' PRXTransformer2DModel: outputs, gradients and weights, both ways."""
import copy

import pytest
import torch

from prx_nb.core.denoiser import PRX, Route, compile_blocks, rotary, rotate
from prx_nb.core.seeds import stream

CONFIGS = {
    "plain": dict(in_channels=3, patch_size=4, context_in_dim=24, hidden_size=48, num_heads=4, depth=3),
    "latents": dict(in_channels=16, patch_size=2, context_in_dim=40, hidden_size=64, num_heads=2, depth=2, axes_dim=(12, 20), mlp_ratio=3.0),
    "bottleneck": dict(in_channels=3, patch_size=8, context_in_dim=24, hidden_size=48, num_heads=3, depth=2, bottleneck_size=20),
    "resolution": dict(in_channels=4, patch_size=2, context_in_dim=24, hidden_size=32, num_heads=2, depth=2, resolution_embeds=True, theta=500,
                       time_factor=300.0, time_max_period=5000),
}


def randomised(config: dict, seed: int = 0) -> PRX:
    "Weights of ordinary size everywhere, so that no branch is silent."
    net = PRX(**config)
    for i, p in enumerate(net.parameters()):
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.7 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1, generator=stream(seed, "p", i))
    return net


def peer_of(net: PRX):
    from diffusers import PRXTransformer2DModel
    peer = PRXTransformer2DModel(**{**net.config, "axes_dim": list(net.config["axes_dim"])})
    peer.load_state_dict(net.state_dict(), strict=True)
    return peer


def inputs(config: dict, h: int, w: int, seed: int = 0):
    g = stream(seed, "inputs")
    x = torch.randn(3, config["in_channels"], h, w, generator=g)
    t = torch.rand(3, generator=g)
    text = torch.randn(3, 7, config["context_in_dim"], generator=g)
    mask = torch.arange(7) < torch.tensor([7, 3, 1])[:, None]
    return x, t, text, mask


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("shape", [(32, 32), (16, 40)], ids=["square", "wide"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_diffusers(name, shape, masked):
    net = randomised(CONFIGS[name])
    peer = peer_of(net)
    x, t, text, mask = inputs(CONFIGS[name], *shape)
    mask = mask if masked else None
    leaves = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in ((x, text), (x, text))]
    ours = net(leaves[0][0], t, leaves[0][1], mask).prediction
    theirs = peer(leaves[1][0], t, leaves[1][1], attention_mask=mask).sample
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4
    weight = torch.randn(ours.shape, generator=stream(0, "weight")) / ours.numel() ** 0.5
    (ours * weight).sum().backward(), (theirs * weight).sum().backward()
    for a, b in zip(*leaves):
        assert (a.grad - b.grad).abs().max() <= 1e-3
    theirs_by_name = dict(peer.named_parameters())
    for key, p in net.named_parameters():
        assert (p.grad - theirs_by_name[key].grad).abs().max() <= 1e-3 * max(1, theirs_by_name[key].grad.abs().max()), key


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_go_both_ways_strictly(name):
    from diffusers import PRXTransformer2DModel
    config = CONFIGS[name]
    fresh = PRXTransformer2DModel(**{"axes_dim": list(PRX(**config).config["axes_dim"])} | config)
    net = PRX(**config)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    net.load_state_dict(fresh.state_dict(), strict=True)
    x, t, text, mask = inputs(config, 16, 16)
    assert (net(x, t, text, mask).prediction - fresh(x, t, text, attention_mask=mask).sample).abs().max() <= 1e-4


def test_a_fresh_network_answers_zero_but_learns():
    net = PRX(**CONFIGS["plain"])
    x, t, text, mask = inputs(CONFIGS["plain"], 16, 16)
    assert net(x, t, text, mask).prediction.eq(0).all()
    net(x, t, text, mask).prediction.sub(x).square().mean().backward()
    assert net.final_layer.linear.weight.grad.abs().max() > 0


def test_padding_does_not_leak():
    net = randomised(CONFIGS["plain"])
    x, t, text, mask = inputs(CONFIGS["plain"], 16, 16)
    spoiled = torch.where(mask[..., None], text, torch.full_like(text, 50.0))
    assert net(x, t, spoiled, mask).prediction.sub(net(x, t, text, mask).prediction).abs().max() <= 1e-5
    assert net(x, t, spoiled).prediction.sub(net(x, t, text).prediction).abs().max() > 1e-2
    longer = torch.cat((text, torch.randn(3, 4, 24)), 1), torch.cat((mask, torch.zeros(3, 4, dtype=torch.bool)), 1)
    assert net(x, t, *longer).prediction.sub(net(x, t, text, mask).prediction).abs().max() <= 1e-5
    assert net(x, t, text, torch.zeros_like(mask)).prediction.isfinite().all(), "no word at all is allowed"


def test_the_batch_is_not_written_to():
    net = randomised(CONFIGS["plain"])
    batch = inputs(CONFIGS["plain"], 16, 16)
    before = copy.deepcopy(batch)
    keep = torch.arange(8).expand(3, -1)
    net(*batch, route=Route(keep, 0, 1), taps=(0, 2)).prediction.sum().backward()
    assert all(a.equal(b) for a, b in zip(batch, before))


def test_a_route_equals_the_same_blocks_on_the_kept_tokens():
    "Written out by hand with the network's own blocks: gather, run, put back."
    net = randomised(CONFIGS["plain"])
    x, t, text, mask = inputs(CONFIGS["plain"], 16, 24)
    seen = {}
    handle = net.blocks[1].register_forward_hook(lambda m, a, o: seen.update(args=a, out=o))
    keep = torch.stack([torch.randperm(24, generator=stream(i, "keep"))[:9] for i in range(3)])
    out = net(x, t, text, mask, route=Route(keep, 1, 1), taps=(0, 1, 2))
    handle.remove()
    dense = net(x, t, text, mask, taps=(0,)).taps[0]
    rows = torch.stack([dense[i, keep[i]] for i in range(3)])
    torch.testing.assert_close(seen["args"][0], rows)
    torch.testing.assert_close(out.taps[1], seen["out"])
    one = net.blocks[1](rows[:1], seen["args"][1][:1], None, seen["args"][3][:1], rotary(4, 6, (6, 6), 1e4)[keep[:1]].unsqueeze(1))
    torch.testing.assert_close(seen["out"][:1], one)                 # the first caption has no padding
    whole = dense.clone()
    for i in range(3):
        whole[i, keep[i]] = seen["out"][i]
    last = net.blocks[2](whole[:1], seen["args"][1][:1], None, seen["args"][3][:1], rotary(4, 6, (6, 6), 1e4))
    torch.testing.assert_close(out.taps[2][:1], last)


def test_taps_have_gradients_and_change_nothing():
    net = randomised(CONFIGS["plain"])
    batch = inputs(CONFIGS["plain"], 16, 16)
    out = net(*batch, taps=(1,))
    assert out.prediction.equal(net(*batch).prediction)
    out.taps[1].square().mean().backward()
    assert net.blocks[1].down_proj.weight.grad.abs().max() > 0 and net.blocks[2].down_proj.weight.grad is None


def test_activation_checkpointing_changes_no_gradient():
    net = randomised(CONFIGS["plain"])
    batch, grads = inputs(CONFIGS["plain"], 16, 16), []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(*batch, route=Route(torch.arange(5).expand(3, -1), 1, 1), taps=(1,)).prediction.square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_both_ways_of_turning_agree(monkeypatch):
    x, turn = torch.randn(2, 3, 12, 8), rotary(3, 4, (4, 4), 100.0)
    quick = rotate(x, turn)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, turn), quick)


@pytest.mark.parametrize("call,says", [
    (dict(taps=(3,)), "0 to 2"), (dict(route=Route(torch.zeros(3, 2, dtype=torch.long), 2, 1)), "route from block 2 to 1"),
    (dict(route=Route(torch.zeros(2, 2, dtype=torch.long), 0, 1)), "needs 3 rows")])
def test_impossible_calls_are_refused(call, says):
    net = PRX(**CONFIGS["plain"])
    with pytest.raises(ValueError, match=says):
        net(*inputs(CONFIGS["plain"], 16, 16), **call)


def test_wrong_sizes_are_refused():
    net = PRX(**CONFIGS["plain"])
    x, t, text, mask = inputs(CONFIGS["plain"], 16, 16)
    for bad in (x[:, :2], x[..., :15]):
        with pytest.raises(ValueError, match="3 channels"):
            net(bad, t, text, mask)


FUSED = {**CONFIGS["plain"], "depth": 5, "fusion": (1, 3)}
KEEP = torch.stack([torch.randperm(16, generator=stream(0, "keep", i))[:6] for i in range(3)])
# (network, size, masked, what else is asked for), in this order of one compiled network each
ASKED = [
    ("plain", (16, 16), True, {}), ("plain", (16, 16), True, {"taps": (1,)}), ("plain", (16, 16), True, {"taps": (0, 1, 2)}),
    ("plain", (16, 16), False, {"taps": (2,)}), ("plain", (16, 16), True, {"route": Route(KEEP, 1, 1), "taps": (0, 1)}),
    ("plain", (16, 16), True, {"route": Route(KEEP[:, :4], 0, 1), "taps": (0, 2)}), ("plain", (24, 40), True, {"taps": (0,)}),
    ("plain", (16, 16), True, {"taps": (0,)}), ("resolution", (12, 8), True, {"taps": (0, 1)}), ("resolution", (8, 12), True, {}),
    ("fused", (16, 16), True, {"taps": (1, 4)}), ("fused", (16, 16), True, {"route": Route(KEEP, 1, 3), "taps": (2,)}),
    ("fused", (16, 16), True, {"route": Route(KEEP, 1, 3, torch.tensor([True, False, True]))}),
    ("fused", (16, 16), False, {"route": Route(KEEP[:, :0], 1, 3), "taps": (0, 4)}), ("fused", (16, 16), True, {"taps": (0, 2)})]


def answer(net, batch, asked):
    "Prediction, taps and gradients of a call."
    net.zero_grad()
    out = net(*batch, **asked)
    (out.prediction.square().mean() + sum(v.square().mean() for v in out.taps.values())).backward()
    return out, {k: p.grad for k, p in net.named_parameters() if p.grad is not None}


def changing_calls(compiled, asked_for=ASKED):
    "Ask networks that `compiled` makes of plain ones for one thing after the other, beside the plain ones."
    torch.compiler.reset()
    plain = {name: randomised(FUSED if name == "fused" else CONFIGS[name]) for name in ("plain", "resolution", "fused")}
    quick = {name: compiled(copy.deepcopy(net)) for name, net in plain.items()}
    for name, size, masked, asked in asked_for:
        x, t, text, mask = inputs(plain[name].config, *size)
        batch = (x, t, text, mask if masked else None)
        (a, slopes), (b, true) = answer(quick[name], batch, asked), answer(plain[name], batch, asked)
        assert list(a.taps) == list(b.taps), f"{name} {asked}: taps {list(a.taps)}, not {list(b.taps)}"
        torch.testing.assert_close((a.prediction, a.taps), (b.prediction, b.taps), rtol=1e-4, atol=1e-4)
        assert {k.removeprefix("_orig_mod.") for k in slopes} == set(true)
        torch.testing.assert_close({k.removeprefix("_orig_mod."): v for k, v in slopes.items()}, true, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend,some", [("eager", slice(None)), ("aot_eager", slice(1, 5))])
def test_compiled_blocks_answer_what_is_asked(backend, some):
    changing_calls(lambda net: compile_blocks(net, backend), ASKED[some])


def test_a_compiled_network_does_not():
    "Why blocks are compiled: if this passes one day, the whole network may be."
    with pytest.raises((AssertionError, KeyError, RuntimeError)):
        changing_calls(lambda net: torch.compile(net, backend="eager"))


def test_all_blocks_share_what_was_compiled():
    torch.compiler.reset()
    graphs = []
    net = compile_blocks(randomised({**CONFIGS["plain"], "depth": 6}), lambda graph, example: graphs.append(graph) or graph)
    for _ in range(2):
        net(*inputs(net.config, 16, 16), taps=(0, 5))
    assert len(graphs) == 1, "six blocks, one compilation"
    torch.compiler.reset()
