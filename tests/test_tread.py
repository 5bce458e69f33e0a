"TREAD: routed training against the same arithmetic written out, its randomness, its cost, guidance by a routed pass; moments as shares of all steps."

import pytest
import torch
from runs import CPU, inputs, operations, randomise, same, strike, weights
from torch import nn

from prx_nb.core import processes
from prx_nb.core.checkpoint import find_checkpoint, new_state
from prx_nb.core.cost import flops_parts, flops_step
from prx_nb.core.denoiser import PRX, Route, choose, kept, patchify, rotary, unpatchify
from prx_nb.core.flow import FlowMatching
from prx_nb.core.recipe import Recipe, RecipeError, in_steps, preset, routing
from prx_nb.core.sample import draw, euler, grid, guided, noise, routes
from prx_nb.core.seeds import stream
from prx_nb.core.batch import add_noise, read_batch
from prx_nb.core.technique import objective, build
from prx_nb.core.train import train
from prx_nb.techniques.tread import TREAD, fade, step_seconds

SMOKE = preset("smoke").replace({"train.steps": 8, "train.checkpoint_every": 3, "train.validate_every": 4, "techniques.tread.rate": 0.5})
TINY = dict(in_channels=3, patch_size=4, context_in_dim=24, hidden_size=48, num_heads=4, depth=4)


def randomised(config=TINY, seed=0):
    return randomise(PRX(**config), seed)


def by_hand(net, x, t, text, mask, keep, start, end):
    "One sample at a time, without a mask: only its real words, and in the routed blocks only its kept tokens."
    answers = []
    for i in range(len(x)):
        words = net.txt_in(text[i:i + 1, mask[i]])
        h, w = x.shape[2] // 4, x.shape[3] // 4
        angle = t[i:i + 1, None] * 1000 * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
        vec = net.time_in(torch.cat((angle.cos(), angle.sin()), -1))
        tokens, turn = net.img_in(patchify(x[i:i + 1], 4)), rotary(h, w, (6, 6), 1e4)
        for n, block in enumerate(net.blocks):
            if n == start:
                rows = tokens[:, keep[i]]
            if start <= n <= end:
                rows = block(rows, words, None, nn.functional.silu(vec), turn[keep[i]])
            else:
                tokens = block(tokens, words, None, nn.functional.silu(vec), turn)
            if n == end:
                places = {int(k): j for j, k in enumerate(keep[i])}
                tokens = torch.stack([rows[0, places[j]] if j in places else tokens[0, j] for j in range(tokens.shape[1])])[None]
        answers.append(unpatchify(net.final_layer(tokens, vec), 4, *x.shape[2:]))
    return torch.cat(answers)


@pytest.mark.parametrize("start, end", [(1, 2), (0, 3), (2, 2)])
def test_a_routed_pass_and_its_gradients_are_those_written_out(start, end):
    net, (x, t, text, mask) = randomised(), inputs()
    keep = choose(torch.rand(3, 24, generator=stream(0, "keep")), 0.6)
    weight = torch.randn(x.shape, generator=stream(0, "weight")) / x.numel() ** 0.5
    found = []
    for answer in (lambda x, text: net(x, t, text, mask, route=Route(keep, start, end)).prediction,
                   lambda x, text: by_hand(net, x, t, text, mask, keep, start, end)):
        leaves = x.clone().requires_grad_(), text.clone().requires_grad_()
        net.zero_grad()
        out = answer(*leaves)
        (out * weight).sum().backward()
        found.append((out.detach(), *(v.grad for v in leaves), *(p.grad.clone() for p in net.parameters())))
    assert found[0][0].std() > 0.1
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1, theirs.abs().max().item()))
    dense = net(x, t, text, mask).prediction
    assert (dense - found[0][0]).abs().max() > 0.05, "and not those of all tokens"


def test_a_rate_that_leaves_nobody_out_is_dense_bit_for_bit(prepared, tmp_path):
    net, batch = randomised(), inputs()
    everyone = choose(torch.rand(3, 24), 0.01)
    assert everyone.equal(torch.arange(24).expand(3, -1))
    found = []
    for route in (None, Route(everyone, 1, 2)):
        net.zero_grad()
        out = net(*batch, route=route).prediction
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    assert all(a.equal(b) for a, b in zip(*found))
    with pytest.raises(RecipeError, match="of an image's 16 tokens is none"):
        SMOKE.replace("techniques.tread.rate", 1e-9)


@pytest.mark.parametrize("tokens, rate, left", [(16, 0.5, 8), (64, 0.75, 16), (10, 0.7, 3), (100, 0.29, 71), (16, 0.99, 1), (16, 0, 16)])
def test_how_many_stay(tokens, rate, left):
    keep = choose(torch.rand(5, tokens), rate)
    assert kept(tokens, rate) == keep.shape[1] == left
    assert all(len(set(row)) == left and row == sorted(row) and 0 <= row[0] and row[-1] < tokens for row in keep.tolist())


def test_kept_tokens_are_those_with_the_smallest_numbers():
    numbers = torch.rand(4, 30, generator=stream(0, "n"))
    assert choose(numbers, 0.5).equal(numbers.argsort(1)[:, :15].sort(1).values)


def patterns(recipe, prepared, step, part=slice(None)):
    batch = add_noise(read_batch(prepared, recipe, step, part), recipe, step, CPU, part)
    return TREAD.of(recipe).needs(batch, step).route.keep


def test_each_sample_and_step_has_a_pattern_of_its_own_that_can_be_drawn_again(prepared):
    keep = patterns(SMOKE, prepared, 5)
    assert keep.shape == (8, 8) and len(keep.unique(dim=0)) == 8
    assert keep.equal(patterns(SMOKE, prepared, 5)) and not keep.equal(patterns(SMOKE, prepared, 6))
    assert not keep.equal(patterns(SMOKE.replace("seed", 1), prepared, 5))
    assert keep.equal(torch.cat([patterns(SMOKE, prepared, 5, s) for s in (slice(0, 4), slice(4, 8))])), "however the batch is shared out"
    assert keep.equal(patterns(SMOKE.replace("optimizer.lr", 1e-4), prepared, 5)), "nothing else in the recipe changes it"


def test_only_training_is_routed(prepared, tmp_path, monkeypatch):
    real, seen = PRX.forward, []

    def spy(self, *a, route=None, **k):
        seen.append((torch.is_grad_enabled(), route))
        return real(self, *a, route=route, **k)
    monkeypatch.setattr(PRX, "forward", spy)
    run = train(SMOKE.replace({"train.steps": 5, "train.validate_every": 2, "techniques.tread.start": 1, "techniques.tread.stop": 0.8}), tmp_path,
                prepared=prepared, progress=False)
    trained = [r is not None for grad, r in seen if grad][-5:]         # before them the cost was counted
    assert trained == [False, True, True, True, False], "start 1, stop 80% of 5"
    states, mask = prepared.states.lookup(prepared.asked[:2])
    draw(run.model, run.recipe, states, mask, *prepared.states.null(1))
    looked = [r for grad, r in seen if not grad]
    assert len(looked) >= 3 + run.recipe.sample.steps and set(looked) == {None}


def test_the_loss_is_that_of_the_whole_image(prepared):
    model, flow = new_state(SMOKE, CPU).model, FlowMatching()
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1, generator=stream(0, "w"))
    batch = add_noise(read_batch(prepared, SMOKE, 2), SMOKE, 2, CPU)
    tread = TREAD.of(SMOKE)
    route = tread.needs(batch, 2).route
    found = objective(model, batch, flow, [tread], 2)
    v = model(flow.mix(batch.x0, batch.noise, batch.t), batch.t, batch.text, batch.mask, route=route).prediction
    assert set(found) == {"flow"} and found["flow"].item() == pytest.approx((v - (batch.noise - batch.x0)).square().mean().item(), rel=1e-5)


def test_it_trains_and_goes_on_bit_for_bit_after_a_kill(prepared, whole, tmp_path):
    same(train(SMOKE, strike(SMOKE, tmp_path, 5), prepared=prepared, progress=False), whole)
    loss = whole.curves[whole.curves.name == "loss flow"].value
    dense = train(SMOKE.replace("techniques.tread.rate", 0.0), tmp_path / "dense", prepared=prepared, progress=False)
    assert loss.iloc[-2:].mean() < loss.iloc[:2].mean()
    assert not weights(whole)["model.img_in.weight"].equal(weights(dense)["model.img_in.weight"])


def test_two_processes_equal_one(tmp_path):
    recipe = SMOKE.replace({"train.steps": 4, "optimizer.eps": 1e-4})
    one = train(recipe, tmp_path / "one", progress=False, device="cpu")
    two = train(recipe.replace("train.processes", 2), tmp_path / "two", progress=False, device="cpu")
    assert not processes.launched()
    a, b = (find_checkpoint(r.dir / "checkpoint", r.recipe)[0] for r in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# --- moments and stretches in the recipe

def test_moments_may_be_shares_of_all_steps(prepared, monkeypatch):
    r = SMOKE.replace({"techniques.tread.start": 0.25, "techniques.tread.stop": 0.8})
    assert (routing(r).start, routing(r).stop) == (2, 6)
    assert in_steps(r).techniques.tread.stop == 6 and in_steps(r.replace("train.steps", 1000)).techniques.tread.start == 250
    assert in_steps(SMOKE) == SMOKE, "steps stay steps"
    tread, = build(r, prepared, CPU)
    assert isinstance(tread, TREAD) and [tread.acts(i) for i in range(8)] == [False] * 2 + [True] * 4 + [False] * 2
    monkeypatch.setattr(TREAD, "of", classmethod(lambda cls, recipe, *more: recipe))
    given, = build(r, prepared, CPU)
    assert (given.techniques.tread.start, given.techniques.tread.stop) == (2, 6) and given.diff(r).keys() == {"techniques.tread.start", "techniques.tread.stop"}
    repa = Recipe().replace({"techniques.repa.weight": 0.5, "techniques.repa.stop": 0.5})
    assert in_steps(repa).techniques.repa.stop == 500 and repa.techniques.repa.stop == 0.5
    assert Recipe.model_validate_json(r.model_dump_json()) == r and r.replace("techniques.tread.stop", 6.0).techniques.tread.stop == 6


@pytest.mark.parametrize("change, says", [
    ({"techniques.tread.stop": 1.5}, "'techniques.tread.stop' = 1.5: should be a step (0, 1, 2, ...), or a share of all steps between 0 and 1"),
    ({"techniques.tread.start": -1}, "'techniques.tread.start' = -1"), ({"techniques.repa.stop": "soon"}, "'techniques.repa.stop' = 'soon'"),
    ({"techniques.tread.stop": True}, "= True"), ({"techniques.tread.start": None}, "= None"), ({"techniques.tread.stop": float("nan")}, "a share"),
    ({"techniques.tread.start": 7, "techniques.tread.stop": 0.5}, "techniques.tread: stop = 0.5 does not come after start = 7 in train.steps = 8"),
    ({"techniques.perceptual.stop": 0}, "techniques.perceptual: stop = 0 does not come after start = 0"),
    ({"techniques.tread.first": 2}, "techniques.tread: first = 2, last = None: blocks are numbered 0 to 1"),
    ({"techniques.tread.last": 0}, "first = 1, last = 0"), ({"techniques.tread.rate": 1.0}, "techniques.tread.rate"),
    ({"denoiser.fusion": (1, 1)}, "fusion changes them"),
    ({"techniques.tread.rate": 0.0, "sample.guide": "route"}, "sample.guide = 'route' needs a network that is trained with routes"),
    ({"sample.guide": "both", "captions.dropout": 0.0}, "captions.dropout = 0"),
], ids=str)
def test_one_clear_error(change, says):
    with pytest.raises(RecipeError) as error:
        SMOKE.replace(change)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_technique_alone_refuses_a_share_of_one():
    for rate in (1, -0.1):
        with pytest.raises(ValueError, match=f"rate = {rate}"):
            TREAD(rate)


# --- cost

@pytest.mark.parametrize("change, first, last, stays", [
    ({"techniques.tread.rate": 0.5}, 1, 2, 32), ({"techniques.tread.rate": 0.75, "techniques.tread.first": 0, "techniques.tread.last": 3}, 0, 3, 16),
    ({"techniques.sprint.rate": 0.75, "denoiser.fusion": (1, None)}, 1, 2, 16), ({"techniques.sprint.rate": 0.4, "denoiser.fusion": (2, 3)}, 2, 3, 38)])
def test_cost_counts_the_route(change, first, last, stays):
    recipe = preset("cpu").replace({"train.batch": 2, "train.steps": 1000, "denoiser.hidden_size": 32, **change})
    keep = torch.arange(stays).expand(2, -1)
    forward, back = operations(recipe, Route(keep, first, last))
    assert flops_step(recipe) == forward + back and flops_parts(recipe, routed=True)[""] == forward
    dense = sum(operations(recipe, None))
    branch = "sprint" if "denoiser.fusion" in change else "tread"
    partly = recipe.replace({f"techniques.{branch}.start": 100, f"techniques.{branch}.stop": 0.7})
    assert flops_step(partly) == pytest.approx(0.6 * (forward + back) + 0.4 * dense, rel=1e-12) and forward + back < dense
    assert flops_step(recipe.replace({f"techniques.{branch}.start": 2000})) == dense, "it never acts"
    assert flops_parts(recipe)[""] == operations(recipe, None)[0]


def test_seconds_are_measured_in_turns(prepared):
    net, turns = new_state(SMOKE, CPU).model, []
    net.register_forward_pre_hook(lambda m, a, k: turns.append(k["route"]), with_kwargs=True)
    batch = add_noise(read_batch(prepared, SMOKE, 0), SMOKE, 0, CPU)
    few = Route(choose(batch.random("route", 16), 0.5), 1, 1)
    found = step_seconds(net, batch, FlowMatching(), {"dense": None, "routed": few}, 4)
    assert {k: len(v) for k, v in found.items()} == {"dense": 4, "routed": 4} and all(s > 0 for v in found.values() for s in v)
    assert turns == [few, None, None, few, few, None, None, few, few, None], "one turn to warm up, then four, each begun by the other"
    assert all(p.grad is None for p in net.parameters())


def test_fading_leaves_kept_patches_alone():
    images, keep = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([[0, 3], [1, 2]])
    out = fade(images, keep, 4)
    assert out[0, :, :4, :4].equal(images[0, :, :4, :4]) and out[0, :, 4:, 4:].equal(images[0, :, 4:, 4:])
    assert out[1, :, :4, :4].std() < 0.2 * images[1, :, :4, :4].std() and out[1, :, :4, 4:].equal(images[1, :, :4, 4:])


# --- guidance

GUIDED = SMOKE.replace({"sample.guide": "route", "sample.guidance": 2.5, "evaluate.batch": 3})
EMPTY = torch.zeros(1, 6, 384), torch.arange(6)[None] < 2


def words(n):
    return torch.randn(n, 6, 384, generator=stream(0, "words")), torch.arange(6) < torch.tensor([6, 3, 2, 5, 1])[torch.arange(n) % 5, None]


def network(recipe):
    net = PRX(**recipe.denoiser.model_dump())
    for p in net.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1, generator=stream(0, "w"))
    return net


def test_guidance_by_caption_is_what_it_was_bit_for_bit():
    "Written out as the sampler was before it knew routes."
    recipe = GUIDED.replace({"sample.guide": "caption", "evaluate.batch": 5})
    net, (text, mask), flow = network(recipe), words(5), FlowMatching()
    states, masks = torch.cat((EMPTY[0].expand(5, -1, -1), text)), torch.cat((EMPTY[1].expand(5, -1), mask))

    def velocity(x, t):
        without, with_ = net(x.repeat(2, 1, 1, 1), t.repeat(2), states, masks).prediction.chunk(2)
        return without + 2.5 * (with_ - without)
    with torch.no_grad():
        before = euler(velocity, noise(3, range(5), (3, 16, 16)), grid(recipe.sample.steps))
    assert draw(net, recipe, text, mask, *EMPTY, seed=3).equal(before)
    plain = GUIDED.replace({"sample.guide": "caption", "techniques.tread.rate": 0.0, "evaluate.batch": 5})
    assert draw(net, plain, text, mask, *EMPTY, seed=3).equal(before) and flow.flow.prediction == "v"


@pytest.mark.parametrize("guide", ["route", "both"])
@pytest.mark.parametrize("ask", ["v", "x", "eps"])
def test_guidance_by_a_route_is_that_written_out(guide, ask):
    "Patterns from streams named by seed, picture and stop."
    recipe = GUIDED.replace({"sample.guide": guide, "flow.prediction": ask, "flow.loss": ask})
    net, (text, mask), flow = network(recipe), words(2), FlowMatching(recipe.flow)
    times, x = grid(recipe.sample.steps), noise(3, range(2), (3, 16, 16))
    weak = (text, mask) if guide == "route" else (EMPTY[0].expand(2, -1, -1), EMPTY[1].expand(2, -1))
    clamp = 0.05 if ask == "eps" else 0.0
    with torch.no_grad():
        for i in range(recipe.sample.steps):
            keep = torch.stack([torch.rand(16, generator=stream(3, "guide", n, i)).argsort()[:8].sort().values for n in range(2)])
            t = times[i].expand(2)
            full, routed = net(x, t, text, mask).prediction, net(x, t, *weak, route=Route(keep, 1, 1)).prediction
            x = x + (times[i + 1] - times[i]) * flow.to("v", routed + 2.5 * (full - routed), x, t, clamp)
    torch.testing.assert_close(draw(net, recipe, text, mask, *EMPTY, seed=3), x, rtol=1e-3, atol=1e-3)


def test_patterns_of_guidance_are_the_same_for_every_run():
    times = grid(4)
    at = lambda recipe, numbers, stop: routes(recipe, numbers, 16, times)(times[stop].expand(len(numbers))).keep
    first = at(GUIDED, range(6), 1)
    assert first.equal(at(GUIDED.replace({"seed": 9, "train.batch": 4, "optimizer.lr": 1e-2}), range(6), 1))
    assert first[3:].equal(at(GUIDED, range(3, 6), 1)) and len(first.unique(dim=0)) == 6
    assert len({tuple(at(GUIDED, range(1), i)[0].tolist()) for i in range(4)}) == 4, "another at each stop"
    net, (text, mask) = network(GUIDED), words(5)
    torch.testing.assert_close(draw(net, GUIDED, text, mask, *EMPTY), draw(net, GUIDED.replace("evaluate.batch", 5), text, mask, *EMPTY), rtol=1e-3, atol=1e-4)


def test_guidance_one_asks_no_routed_pass():
    asked = []
    net, (text, mask) = network(GUIDED), words(2)
    net.register_forward_pre_hook(lambda m, a, k: asked.append(k.get("route")), with_kwargs=True)
    draw(net, GUIDED.replace("sample.guidance", 1.0), text, mask, *EMPTY)
    assert asked == [None] * GUIDED.sample.steps
    plain = guided(net, FlowMatching(), text, mask, text, mask, 1.0)
    x, t = noise(0, range(2), (3, 16, 16)), torch.full((2,), 0.5)
    assert plain(x, t).equal(net(x, t, text, mask).prediction)


def test_pipelines_cannot_be_guided_by_a_route():
    from prx_nb.core.interop import InteropError, pipeline_for
    with pytest.raises(InteropError, match="export with sample.guide = 'caption'"):
        pipeline_for(GUIDED)
    assert pipeline_for(GUIDED.replace("sample.guide", "caption")) == "PRXPipeline"
