"SPRINT: the fused denoiser against the same arithmetic written out, its average and checkpoints, both stages, guidance without deep blocks, no export."
import copy

import pytest
import torch
from runs import CPU, inputs, randomise, same, strike, weights
from torch import nn

from prx_nb.core import interop
from prx_nb.core.checkpoint import new_state
from prx_nb.core.cost import flops_parts
from prx_nb.core.denoiser import PRX, Fusion, Route, choose
from prx_nb.core.flow import FlowMatching
from prx_nb.core.recipe import preset, routing
from prx_nb.core.sample import draw, grid, noise
from prx_nb.core.seeds import stream
from prx_nb.core.batch import add_noise, read_batch
from prx_nb.core.technique import objective, build
from prx_nb.core.train import Run, train
from prx_nb.techniques.sprint import SPRINT

SMOKE = preset("smoke").replace({"denoiser.depth": 3, "denoiser.fusion": (1, None), "techniques.sprint.rate": 0.75, "techniques.sprint.path_drop": 0.3,
                                 "techniques.sprint.stop": 0.8, "train.steps": 10, "train.checkpoint_every": 3, "train.validate_every": 5})
PLAIN = dict(in_channels=3, patch_size=4, context_in_dim=24, hidden_size=48, num_heads=4, depth=5)
FUSED = PLAIN | {"fusion": (1, 3)}


def by_hand(net, x, t, text, mask, keep, without):
    "An unfused network with the same blocks does the three parts; the fusion is written out."
    early = net.plain(x, t, text, mask, taps=(0,)).taps[0]
    rows = []
    for i in range(len(x)):
        if without[i] or not len(keep[i]):
            rows.append(net.fusion.mask.repeat(early.shape[1], 1))
            continue
        one = net.plain(x[i:i + 1], t[i:i + 1], text[i:i + 1, mask[i]], route=Route(keep[i][None], 1, 3), taps=(3,)).taps[3][0]
        places = {int(k): j for j, k in enumerate(keep[i])}
        rows.append(torch.stack([one[places[j]] if j in places else net.fusion.mask for j in range(early.shape[1])]))
    a, b = net.fusion.linear.weight.chunk(2, 1)
    x5, seen = early @ a.T + torch.stack(rows) @ b.T + net.fusion.linear.bias, {}

    def swap(module, args):                                       # the last block, on what was fused
        seen["args"] = args
        return (x5, *args[1:])
    hook = net.plain.blocks[4].register_forward_pre_hook(swap)
    answer = net.plain(x, t, text, mask).prediction
    hook.remove()
    return answer


@pytest.mark.parametrize("rate", [0.6, 0.0, None], ids=["some", "all", "nothing kept"])
def test_a_fused_pass_and_its_gradients_are_those_written_out(rate):
    net, batch = randomise(PRX(**FUSED)), inputs()
    plain = PRX(**PLAIN)
    plain.img_in, plain.time_in, plain.txt_in, plain.blocks, plain.final_layer = net.img_in, net.time_in, net.txt_in, net.blocks, net.final_layer
    object.__setattr__(net, "plain", plain)                       # the same weights, not a part of it
    keep = torch.empty(3, 0, dtype=torch.long) if rate is None else choose(torch.rand(3, 24, generator=stream(0, "keep")), rate)
    without = torch.tensor([False, True, False])
    weight, found = torch.randn(batch[0].shape, generator=stream(0, "weight")) / batch[0].numel() ** 0.5, []
    for answer in (lambda: net(*batch, route=Route(keep, 1, 3, without)).prediction, lambda: by_hand(net, *batch, keep, without)):
        net.zero_grad()
        out = answer()
        (out * weight).sum().backward()
        found.append((out.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}))
    assert found[0][0].std() > 0.1
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    for name, theirs in found[1][1].items():
        ours = found[0][1][name]
        if rate is None and name.startswith(("blocks.1.", "blocks.2.", "blocks.3.")):
            assert ours is None, "these blocks were not run"
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1, theirs.abs().max().item()), msg=lambda m, name=name: f"{name}: {m}")
    assert found[0][1]["fusion.mask"].abs().max() > 0


def test_a_fresh_network_is_the_one_without_fusion_bit_for_bit():
    for seed in (0, 1):
        plain, fused = (PRX(**c).initialise(stream(seed, "w")) for c in (PLAIN, FUSED))
        a, b = plain.state_dict(), fused.state_dict()
        assert set(b) - set(a) == {"fusion.mask", "fusion.linear.weight", "fusion.linear.bias"} and all(a[k].equal(b[k]) for k in a)
        batch = inputs()
        one, two = (n(*batch, taps=(4,)) for n in (plain, fused))
        assert two.prediction.eq(0).all() and one.taps[4].equal(two.taps[4])
        few = Route(choose(torch.rand(3, 24), 0.75), 1, 3)
        routed = fused(*batch, route=few, taps=(0, 4))
        skipped = torch.ones(3, 24, dtype=torch.bool).scatter(1, few.keep, False)
        assert routed.prediction.eq(0).all() and routed.taps[4][skipped].equal(routed.taps[0][skipped] / 2), "its own early state is still there"
        fused(*batch, route=few).prediction.sub(batch[0]).square().mean().backward()
        assert fused.final_layer.linear.weight.grad.abs().max() > 0


def test_all_tokens_on_the_route_is_no_route():
    net, batch, found = randomise(PRX(**FUSED)), inputs(), []
    for route in (None, Route(choose(torch.rand(3, 24), 0), 1, 3), Route(choose(torch.rand(3, 24), 0), 1, 3, torch.zeros(3, dtype=torch.bool))):
        net.zero_grad()
        out = net(*batch, route=route).prediction
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    assert found[0][0].equal(found[1][0]) and found[0][0].equal(found[2][0]) and found[0][0].std() > 0.1
    for a, b, c in zip(*found):                                   # gradients of three uses are added in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5), torch.testing.assert_close(b, c, rtol=0, atol=0)


@pytest.mark.parametrize("config", [PLAIN, FUSED], ids=["plain", "fused"])
def test_a_route_that_keeps_no_token_does_not_run_its_blocks(config):
    net, batch, ran = randomise(PRX(**config)), inputs(), []
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    nothing = Route(torch.empty(3, 0, dtype=torch.long), 1, 3)
    out = net(*batch, route=nothing, taps=(0, 2, 4))
    assert ran == [0, 4] and [v.shape[1] for v in out.taps.values()] == [24, 0, 24] and out.kept.shape == (3, 0)
    if config is PLAIN:
        skip = copy.deepcopy(net)
        del skip.blocks[1:4]
        torch.testing.assert_close(out.prediction, skip(*batch).prediction)
    out.prediction.sum().backward()
    assert net.blocks[2].down_proj.weight.grad is None and net.blocks[0].down_proj.weight.grad is not None


def test_recomputing_blocks_changes_no_gradient():
    net, batch = randomise(PRX(**FUSED)), inputs()
    route, found = Route(choose(torch.rand(3, 24), 0.5), 1, 3, torch.tensor([True, False, False])), []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(*batch, route=route).prediction.square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("call, config, says", [
    (dict(route=Route(torch.zeros(3, 2, dtype=torch.long), 1, 2)), FUSED, "fuses the stream of blocks 1 to 3"),
    (dict(route=Route(torch.zeros(3, 2, dtype=torch.long), 1, 2, torch.zeros(3, dtype=torch.bool))), PLAIN, "fuses no stream"),
    (dict(route=Route(torch.zeros(2, 0, dtype=torch.long), 1, 3)), FUSED, "needs 3 rows")])
def test_impossible_calls_are_refused(call, config, says):
    with pytest.raises(ValueError, match=says):
        PRX(**config)(*inputs(), **call)
    for bad in ((3, 1), (2, 5)):
        with pytest.raises(ValueError, match="numbered 0 to 4"):
            PRX(**PLAIN, fusion=bad)


@pytest.mark.parametrize("depth, last", [(2, 1), (4, 2), (16, 14)])
def test_one_setting_fits_all_depths(depth, last):
    assert PRX(**PLAIN | {"depth": depth, "fusion": (1, None)}).config["fusion"] == (1, last)
    r = preset("cpu").replace({"denoiser.depth": depth, "denoiser.fusion": (1, None), "techniques.sprint.rate": 0.5})
    assert (routing(r).first, routing(r).last) == (1, last)


# --- training

def test_what_is_drawn(prepared):
    batch = add_noise(read_batch(prepared, SMOKE, 4), SMOKE, 4, CPU)
    sprint, = build(SMOKE, prepared, CPU)
    assert isinstance(sprint, SPRINT) and (sprint.rate, sprint.path_drop, sprint.stop) == (0.75, 0.3, 8)
    route = sprint.needs(batch, 4).route
    assert route.keep.shape == (8, 4) and len(route.keep.unique(dim=0)) == 8 and (route.start, route.end) == (1, 1)
    dropped = torch.cat([sprint.needs(add_noise(read_batch(prepared, SMOKE, i), SMOKE, i, CPU), i).route.without for i in range(50)])
    assert 0.2 < dropped.float().mean() < 0.4
    halves = [add_noise(read_batch(prepared, SMOKE, 4, s), SMOKE, 4, CPU, s) for s in (slice(0, 4), slice(4, 8))]
    assert route.without.equal(torch.cat([sprint.needs(b, 4).route.without for b in halves]))
    assert route.keep.equal(torch.cat([sprint.needs(b, 4).route.keep for b in halves]))
    assert SPRINT(path_drop=0.0).needs(batch, 4).route.without is None
    for bad in (dict(rate=1.0), dict(path_drop=-0.1)):
        with pytest.raises(ValueError, match="a share should be at least 0 and below 1"):
            SPRINT(**bad)


def test_samples_without_the_deep_stream_teach_the_deep_blocks_nothing(prepared):
    state, batch = new_state(SMOKE, CPU), add_noise(read_batch(prepared, SMOKE, 4), SMOKE, 4, CPU)
    randomise(state.model)

    class All(SPRINT):
        def needs(self, batch, step):
            route = super().needs(batch, step).route
            route.without[:] = True
            return type(super().needs(batch, step))(route=route)
    objective(state.model, batch, FlowMatching(), [All(0.75, 1, 1)], 4)["flow"].backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in state.model.blocks[1].parameters())
    assert state.model.fusion.mask.grad.abs().max() > 0 and state.model.blocks[0].down_proj.weight.grad.abs().max() > 0


def test_it_trains_in_two_stages_and_learns_the_mask(whole, prepared, tmp_path, monkeypatch):
    real, seen = PRX.forward, []
    monkeypatch.setattr(PRX, "forward", lambda self, *a, route=None, **k: seen.append((torch.is_grad_enabled(), route)) or real(self, *a, route=route, **k))
    train(SMOKE, tmp_path, prepared=prepared, progress=False)
    assert [r is not None for grad, r in seen if grad][-10:] == [True] * 8 + [False] * 2
    assert {r for grad, r in seen if not grad} == {None}, "validation sees all tokens"
    t = weights(whole)
    assert t["model.fusion.mask"].abs().max() > 0 and t["model.fusion.linear.bias"].abs().max() > 0
    loss = whole.curves[whole.curves.name == "loss flow"].value
    assert loss.iloc[-2:].mean() < loss.iloc[:2].mean()


def test_the_average_is_the_same_function_as_the_network(prepared, tmp_path):
    "In the public code it has no fusion: the same weights, another answer."
    run = train(SMOKE.replace({"ema.decay": 1e-9, "train.steps": 6}), tmp_path, prepared=prepared, progress=False)
    t = weights(run)
    trained = {k.removeprefix("model."): v for k, v in t.items() if k.startswith("model.")}
    averaged = {k.removeprefix("ema.module."): v for k, v in t.items() if k.startswith("ema.module.")}
    assert trained.keys() == averaged.keys() >= {"fusion.mask", "fusion.linear.weight"}
    model = PRX(**run.recipe.denoiser.model_dump())
    model.load_state_dict(trained)
    batch = add_noise(read_batch(prepared, run.recipe, 0), run.recipe, 0, CPU)
    for route in (None, SPRINT.of(run.recipe).needs(batch, 0).route):
        with torch.no_grad():
            ours, theirs = (m(batch.x0, batch.t, batch.text, batch.mask, route=route).prediction for m in (model, Run.load(tmp_path).model))
        assert ours.std() > 0 and ours.equal(theirs)


@pytest.mark.parametrize("at", [5, 9], ids=["in the first stage", "in the second"])
def test_a_killed_run_goes_on_bit_for_bit(at, whole, prepared, tmp_path):
    same(train(SMOKE, strike(SMOKE, tmp_path, at), prepared=prepared, progress=False), whole)


@pytest.fixture(scope="module")
def one(prepared, tmp_path_factory):
    recipe = SMOKE.replace({"train.steps": 5, "train.checkpoint_every": 5, "optimizer.eps": 1e-4})
    return train(recipe, tmp_path_factory.mktemp("one"), prepared=prepared, progress=False, device="cpu")


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_equal_one(way, one, tmp_path):
    two = train(one.recipe.replace({"train.processes": 2, "train.parallel": way}), tmp_path, progress=False, device="cpu")
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and any("fusion" in k for k in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# --- sampling, cost, export

EMPTY = torch.zeros(1, 6, 384), torch.arange(6)[None] < 2


@pytest.mark.parametrize("guide", ["caption", "route", "both"])
def test_guidance_leads_away_from_the_network_without_its_deep_blocks(guide):
    recipe = SMOKE.replace({"sample.guide": guide, "sample.guidance": 2.5})
    net = PRX(**recipe.denoiser.model_dump())
    for p in net.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1, generator=stream(0, "w"))
    text, mask = torch.randn(2, 6, 384, generator=stream(0, "words")), torch.arange(6) < torch.tensor([[6], [3]])
    null, nothing = (EMPTY[0].expand(2, -1, -1), EMPTY[1].expand(2, -1)), Route(torch.empty(2, 0, dtype=torch.long), 1, 1)
    times, x = grid(recipe.sample.steps), noise(0, range(2), (3, 16, 16))
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:]):
            t = now.expand(2)
            full = net(x, t, text, mask).prediction
            weak = net(x, t, *((text, mask) if guide == "route" else null), route=None if guide == "caption" else nothing).prediction
            x = x + (then - now) * (weak + 2.5 * (full - weak))
    torch.testing.assert_close(draw(net, recipe, text, mask, *EMPTY), x, rtol=1e-3, atol=1e-3)


def test_the_fusion_is_counted():
    recipe = preset("cpu").replace({"denoiser.fusion": (1, None), "techniques.sprint.rate": 0.75})
    b, n, d = recipe.train.batch, 64, recipe.denoiser.hidden_size
    assert flops_parts(recipe)["fusion"] == flops_parts(recipe, routed=True)["fusion"] == 2 * b * n * 2 * d * d
    assert "fusion" not in flops_parts(preset("cpu"))


def test_a_fusion_is_not_exported_and_nothing_is_written(tmp_path):
    r = preset("smoke").replace("denoiser.fusion", (1, None))
    fused = PRX(**r.denoiser.model_dump())
    for go in (lambda: interop.to_diffusers(interop.Parts(fused, r), tmp_path / "out"), lambda: interop.pipeline_for(r),
               lambda: interop.denoiser_config(r.denoiser)):
        with pytest.raises(interop.InteropError, match="denoiser.fusion = .1, None. cannot be exported"):
            go()
    with pytest.raises(interop.InteropError, match="no place for: fusion.mask, fusion.linear.weight, fusion.linear.bias"):
        interop.to_diffusers(interop.Parts(fused, preset("smoke")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_config_of_a_network_without_fusion_is_diffusers_own():
    diffusers = pytest.importorskip("diffusers")
    for name in ("smoke", "cpu", "paper"):
        d = preset(name).denoiser
        config = interop.denoiser_config(d)
        with torch.device("meta"):
            theirs = diffusers.PRXTransformer2DModel.from_config(config)
            ours = PRX(**d.model_dump())
        assert "fusion" not in config and "fusion" not in ours.config
        assert {k for k in config if not k.startswith("_")} <= set(theirs.config) and interop.denoiser_config(ours.config) == config
        assert theirs.state_dict().keys() == ours.state_dict().keys()


def test_fusion_keeps_the_dtype_of_the_streams():
    fusion = Fusion(16)
    fusion.start()
    early, deep = torch.randn(2, 6, 16), torch.randn(2, 3, 16)
    route = Route(choose(torch.rand(2, 6), 0.5), 1, 1, torch.tensor([True, False]))
    with torch.autocast("cpu", torch.bfloat16):
        for r, d in ((route, deep.bfloat16()), (None, early.bfloat16())):
            out = fusion(early.bfloat16(), d, r)
            assert out.dtype == torch.bfloat16
            out.float().sum().backward()
    assert fusion.mask.grad.dtype == torch.float32 and fusion.mask.grad.abs().max() > 0
