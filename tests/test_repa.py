"Alignment with a frozen teacher: the loss as the paper writes it, under routes, for a while, through checkpoints and in two processes."
import shutil

import pytest
import torch
import torch.nn.functional as F
from runs import CPU, Stops, plain, same, weights
from torch import nn

from prx_nb.core.checkpoint import new_state, read_checkpoint
from prx_nb.core.denoiser import PRX, Output, Route
from prx_nb.core.encoders import EncoderError, feature_maps
from prx_nb.core.flow import FlowMatching
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.batch import Batch, add_noise, read_batch
from prx_nb.core.technique import Needs, Step, Technique, objective
from prx_nb.core.train import optimise, train, validation_set
from prx_nb.techniques.repa import MLP, REPA, Watch, by_layer, middle, places, readable, redraw, tokens_of

PLAIN = preset("smoke").replace({"train.steps": 10, "train.checkpoint_every": 3, "train.validate_every": 5, "train.keep": 9})
SMOKE = PLAIN.replace("techniques.repa.weight", 0.5)
FLOW = FlowMatching()


def tapped(batch=6, count=12, width=20, channels=7, kept=None, grid=(3, 4), **more):
    "A REPA with a random teacher, and a step with random taps of block 3."
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(50, channels, *grid, generator=g) * 3 + 1
    tokens = torch.randn(batch, count, width, generator=g).requires_grad_()
    index = torch.randint(50, (batch,), generator=g)
    b = Batch(index, torch.zeros(batch, 3, 8, 8), *(torch.zeros(batch, 1),) * 3)
    repa = REPA(lambda i: maps[i], redraw(MLP(width, 16, channels), g), 3, 0.7, **more)
    return repa, Step(b, b.x0, Output(torch.zeros(0), {3: tokens}, kept), FLOW, 0), tokens, maps[index].flatten(2).transpose(1, 2)


def check(repa, step, tokens, projected, target):
    "Loss and gradients against minus the mean cosine, written with torch's."
    theirs = -0.7 * F.cosine_similarity(projected, target, dim=2).mean()
    ours = repa.loss(step)
    torch.testing.assert_close(ours, theirs)
    wrt = [tokens, *repa.parameters()]
    for a, b in zip(torch.autograd.grad(ours, wrt), torch.autograd.grad(theirs, wrt), strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


def by_hand(repa, x):
    first, second, third = (m for m in repa.projector.layers if isinstance(m, nn.Linear))
    return F.linear(F.silu(F.linear(F.silu(F.linear(x, first.weight, first.bias)), second.weight, second.bias)), third.weight, third.bias)


def test_loss_and_gradients_are_those_of_the_formula():
    repa, step, tokens, target = tapped()
    check(repa, step, tokens, by_hand(repa, tokens), target)
    assert repa.needs(step.batch, 0) == Needs((3,))


@pytest.mark.parametrize("one_in", [1, 2])
def test_kept_tokens_meet_the_teacher_at_their_places(one_in):
    kept = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:5] for i in range(6)])
    repa, step, tokens, target = tapped(count=5, kept=kept, one_in=one_in)
    there = torch.stack([target[i, kept[i]] for i in range(6)])
    check(repa, step, tokens, by_hand(repa, tokens)[::one_in], there[::one_in])


def test_a_tap_outside_the_route_holds_all_tokens():
    kept = torch.tensor([[3, 1, 2]]).expand(6, -1)
    repa, step, tokens, target = tapped(kept=kept)
    check(repa, step, tokens, by_hand(repa, tokens), target)


def test_one_image_in_three():
    repa, step, tokens, target = tapped(one_in=3)
    check(repa, step, tokens, by_hand(repa, tokens)[[0, 3]], target[[0, 3]])
    assert torch.autograd.grad(repa.loss(step), tokens)[0][[1, 2, 4, 5]].eq(0).all()


def test_the_teachers_maps_are_normalised_before_tokens_are_kept():
    kept = torch.tensor([[3, 1, 2]]).expand(6, -1)
    repa, step, tokens, target = tapped(count=3, kept=kept, normalise=lambda maps: maps - maps.mean((2, 3), keepdim=True))
    check(repa, step, tokens, by_hand(repa, tokens), (target - target.mean(1, keepdim=True))[:, [3, 1, 2]])


def test_in_float32_under_autocast_too():
    repa, step, tokens, target = tapped()
    half = Step(step.batch, step.x_t, Output(torch.zeros(0), {3: tokens.detach().bfloat16()}), FLOW, 0)
    want = -0.7 * F.cosine_similarity(by_hand(repa, tokens.detach().bfloat16().float()), target, dim=2).mean()
    with torch.autocast("cpu", torch.bfloat16):
        loss, low = repa.loss(half), by_hand(repa, tokens.detach())
    rough = -0.7 * F.cosine_similarity(low.float(), target, dim=2).mean()
    assert loss.dtype == torch.float32 and low.dtype == torch.bfloat16
    assert (loss - want).abs() < 1e-7 < (rough - want).abs(), "processors add up in different orders; bfloat16 is farther off"
    assert REPA(None, MLP(4, 4, 4).bfloat16(), 0).projector.layers[0].weight.dtype == torch.float32


def test_grids_that_do_not_fit_are_one_clear_error():
    repa, step, *_ = tapped(count=9)
    with pytest.raises(ValueError, match="the teacher has 12 places, but the tapped block holds 9 tokens"):
        repa.loss(step)
    shuffled = torch.arange(12).flip(0).expand(2, -1)
    with pytest.raises(ValueError, match="another order"):
        places(torch.zeros(2, 12, 3), shuffled, 12)
    assert places(torch.zeros(2, 12, 3), torch.arange(12).expand(2, -1), 12) is None


class Half(Technique):
    "Routes half of the tokens past block 0."

    def needs(self, batch, step):
        return Needs((), Route(batch.random("route", 16).argsort(1)[:, :8], 0, 0))


@pytest.mark.parametrize("layer,held", [(0, 8), (1, 16)])
def test_with_a_route_from_another_technique(prepared, layer, held):
    "Block 0 is inside the route and block 1 is not; through the real denoiser."
    recipe = SMOKE.replace("techniques.repa.layer", layer)
    repa, net = REPA.of(recipe, prepared), PRX(**recipe.denoiser.model_dump())
    batch = add_noise(read_batch(prepared, recipe, 0), recipe, 0, CPU)
    found = objective(net, batch, FLOW, [Half(), repa], 0)["REPA"]
    keep = batch.random("route", 16).argsort(1)[:, :8]
    out = net(FLOW.mix(batch.x0, batch.noise, batch.t), batch.t, batch.text, batch.mask, taps=(layer,), route=Route(keep, 0, 0))
    target = feature_maps("effnet-lite0", prepared.images, "tap4", (4, 4)).batch(batch.index).flatten(2).transpose(1, 2)
    target = torch.stack([t[k] for t, k in zip(target, keep)]) if held == 8 else target
    assert out.taps[layer].shape[1] == held
    torch.testing.assert_close(found, -0.5 * F.cosine_similarity(by_hand(repa, out.taps[layer]), target, dim=2).mean())


def test_alignment_is_learnt(prepared):
    recipe = SMOKE.replace({"optimizer.lr": 5e-3, "train.steps": 60})
    state = new_state(recipe, CPU, [REPA.of(recipe, prepared)])
    losses = []
    for step in range(60):
        found = objective(state.model, add_noise(read_batch(prepared, recipe, step), recipe, step, CPU), FLOW, state.techniques, step)
        optimise(state, found, recipe, step)
        losses.append(found["REPA"].item())
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.1


def test_a_killed_run_goes_on_bit_for_bit(whole, prepared, tmp_path):
    "As if it had been killed after its second checkpoint."
    shutil.copytree(whole.dir, tmp_path / "run")
    for path in sorted((tmp_path / "run/checkpoint").glob("*"))[2:]:
        path.unlink()
    (tmp_path / "run/record.json").unlink()
    same(train(SMOKE, tmp_path / "run", prepared=prepared, progress=False, device="cpu"), whole)


def test_what_a_checkpoint_holds(whole, prepared):
    own = {k: v for k, v in weights(whole).items() if k.startswith("techniques.")}
    assert {k.removeprefix("techniques.repa.projector.layers.") for k in own} == {f"{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")}, "no teacher"
    fresh = REPA.of(SMOKE, prepared).projector.layers[4].weight
    assert own["techniques.repa.projector.layers.4.weight"].shape == fresh.shape and not own["techniques.repa.projector.layers.4.weight"].equal(fresh)
    net = nn.Linear(3, 3)
    assert [n for n, _ in REPA(net, MLP(2, 2, 2), 0).named_parameters() if "projector" not in n] == [], "not even where the teacher is a network"


def test_first_weights_come_from_the_seed_alone(prepared):
    a, b, c = (REPA.of(r, prepared).projector.layers[0].weight for r in (SMOKE, SMOKE, SMOKE.replace("seed", 1)))
    assert a.equal(b) and not a.equal(c) and a.abs().max() <= SMOKE.denoiser.hidden_size**-0.5


def test_burn_in(prepared, whole, tmp_path):
    "Until it stops the run is that of one that does not; then the projector rests and the flow goes on alone."
    run = train(SMOKE.replace("techniques.repa.stop", 6), tmp_path, prepared=prepared, progress=False, device="cpu")
    mine, theirs = plain(run), plain(whole)
    assert mine[mine.name == "loss REPA"].step.tolist() == [1, 2, 3, 4, 5, 6]
    assert mine[mine.step <= 6].equals(theirs[theirs.step <= 6]) and not mine[mine.step > 8].equals(theirs[theirs.step > 8])
    at = {int(p.stem[5:]): read_checkpoint(p)[0] for p in (tmp_path / "checkpoint").glob("*")}
    for key in at[6]:
        if key.startswith("techniques."):
            assert at[6][key].equal(at[10][key]) and not at[3][key].equal(at[6][key]), key
    assert not at[6]["model.img_in.weight"].equal(at[10]["model.img_in.weight"])


def test_a_late_start(prepared, tmp_path):
    run = train(SMOKE.replace({"techniques.repa.start": 7}), tmp_path, prepared=prepared, progress=False, device="cpu")
    assert run.curves[run.curves.name == "loss REPA"].step.tolist() == [8, 9, 10]
    shutil.copytree(tmp_path, tmp_path.with_name("again"))
    for path in sorted((tmp_path.with_name("again") / "checkpoint").glob("*"))[1:]:
        path.unlink()                                              # what is left knows nothing of the projector's optimizer
    same(train(run.recipe, tmp_path.with_name("again"), prepared=prepared, progress=False, device="cpu"), run)


@pytest.mark.parametrize("more", [{}, {"projector": "conv", "spatial_norm": "scalar", "one_in": 2, "stop": 4}], ids=["repa", "irepa for a while"])
def test_two_processes_with_half_the_batch_equal_one(more, prepared, tmp_path):
    recipe = SMOKE.replace({"optimizer.eps": 1e-4, "optimizer.clip": 0.1} | {f"techniques.repa.{k}": v for k, v in more.items()})
    one = train(recipe, tmp_path / "one", prepared=prepared, progress=False, device="cpu")
    two = train(recipe.replace("train.processes", 2), tmp_path / "two", progress=False, device="cpu")
    a, b = (plain(r).set_index(["step", "name"]).value.sort_index() for r in (one, two))
    assert a.index.equals(b.index) and (a - b).abs().max() < 1e-5
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and any(k.startswith("techniques.") for k in first)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_grid_is_that_of_the_tokens_in_latents_too(prepared, monkeypatch):
    "The teacher sees the images, whatever space the denoiser works in."
    recipe = SMOKE.replace({"latents.autoencoder": "a-folder", "latents.channels": 5, "latents.factor": 4, "denoiser.in_channels": 5,
                            "denoiser.patch_size": 2})
    asked = []
    real = feature_maps
    monkeypatch.setattr("prx_nb.techniques.repa.feature_maps", lambda *a, **k: asked.append(a) or real(*a, **k))
    repa = REPA.of(recipe, prepared)
    assert asked[0][1] is prepared.images and asked[0][3] == (2, 2)
    net, g = PRX(**recipe.denoiser.model_dump()), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 8, 5, 4, 4, generator=g)
    batch = Batch(torch.arange(8), x0, torch.randn(8, 3, 384), torch.ones(8, 3), torch.zeros(8), noise, torch.rand(8, generator=g))
    assert objective(net, batch, FLOW, [repa])["REPA"].abs() <= 0.5


@pytest.mark.parametrize("changes,error,said", [
    ({"teacher": "effnet-lite"}, EncoderError, "effnet-lite"),
    ({"teacher": "/nowhere/at/all", "tap": "block3"}, EncoderError, "/nowhere/at/all"),
    ({"one_in": 3}, RecipeError, "techniques.repa.one_in = 3 does not divide the 8 images"),
])
def test_what_is_not_there_is_noticed_before_training(changes, error, said, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("prx_nb.core.train.objective", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(error, match=said):
        train(PLAIN.replace({"techniques.repa.weight": 0.5, "techniques.repa.tap": "block3" if "teacher" in changes else "tap4"}
                            | {f"techniques.repa.{k}": v for k, v in changes.items()}), tmp_path, prepared=prepared, progress=False)
    assert not list(tmp_path.glob("checkpoint/*"))


@pytest.mark.parametrize("changes,said", [
    ({"tap": "tap6"}, "techniques.repa.tap = 'tap6': teacher 'effnet-lite0' has tap1 to tap5"),
    ({"tap": "tap0"}, "tap1 to tap5"), ({"tap": "head"}, "tap1 to tap5"), ({"tap": "block9"}, "tap1 to tap5"),
    ({"teacher": "vit-s14"}, "techniques.repa.tap = 'tap4': teacher 'vit-s14' has block1 to block12"),
    ({"teacher": "random-vit-s14", "tap": "block13"}, "block1 to block12"),
    ({"teacher": "facebook/dinov2-small"}, "has block1 to blockN, its last"),
    ({"layer": 2}, "techniques.repa.layer = 2: blocks are numbered 0 to 1"),
    ({"one_in": 0}, "techniques.repa.one_in"), ({"hidden": 4}, "techniques.repa.hidden"), ({"projector": "linear"}, "techniques.repa.projector"),
])
def test_a_wrong_setting_is_one_clear_error(changes, said):
    with pytest.raises(RecipeError) as error:
        SMOKE.replace({f"techniques.repa.{k}": v for k, v in changes.items()})
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_projector_is_as_wide_as_the_teacher_unless_told(prepared):
    "As in the public code; a denoiser's width of 32 is no bottleneck for 112 channels."
    shapes = lambda recipe: [tuple(m.weight.shape) for m in REPA.of(recipe, prepared).projector.layers if isinstance(m, nn.Linear)]
    assert shapes(SMOKE) == [(112, 32), (112, 112), (112, 112)]
    assert shapes(SMOKE.replace("techniques.repa.hidden", 32)) == [(32, 32), (32, 32), (112, 32)]


def test_any_block_of_a_hub_teacher_may_be_named():
    for tap in ("block1", "block24"):
        assert SMOKE.replace({"techniques.repa.teacher": "facebook/dinov3-vitl16-pretrain-lvd1689m", "techniques.repa.tap": tap})
    assert [middle(d) for d in (1, 2, 4, 6, 16)] == [0, 0, 1, 2, 7]


def test_a_teacher_from_a_folder(prepared, tmp_path):
    "Any vision transformer that transformers loads, by its folder or hub id; here a small DINOv2 with random weights."
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)).save_pretrained(tmp_path)
    named = {"techniques.repa.teacher": str(tmp_path), "techniques.repa.tap": "block2"}
    repa = REPA.of(SMOKE.replace(named), prepared)
    assert repa.projector.layers[4].out_features == 24 and repa._teacher[0](torch.arange(3)).shape == (3, 24, 4, 4)
    with pytest.raises(EncoderError, match="has no tap 'block4'; it has block1, block2, block3"):
        REPA.of(SMOKE.replace(named | {"techniques.repa.tap": "block4"}), prepared)


def test_readable_is_ridge_regression_on_the_other_half():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 10, 4, generator=g), torch.randn(6, 10, 3, generator=g)
    y = y + torch.cat((x[..., :2], x[..., :1]), 2)
    a, b = x[::2].reshape(-1, 4), y[::2].reshape(-1, 3)
    mx, my = a.mean(0), b.mean(0)
    ridge = 1e-3 * (a - mx).square().sum(0).mean()
    stacked = torch.cat((a - mx, ridge.sqrt() * torch.eye(4))), torch.cat((b - my, torch.zeros(4, 3)))
    w = torch.linalg.lstsq(*stacked).solution
    assert readable(x, y) == pytest.approx(F.cosine_similarity((x[1::2] - mx) @ w, y[1::2] - my, dim=2).mean().item(), abs=1e-5)
    assert readable(x, x @ torch.randn(4, 3, generator=g) + 9) > 0.999


def test_a_watch_changes_nothing_and_survives_an_interruption(prepared, whole, tmp_path):
    fixed = validation_set(prepared, SMOKE, CPU)
    seen = tokens_of(feature_maps("effnet-lite0", prepared.images, "tap4", (4, 4)).batch(torch.cat([b.index for b in fixed])))

    make = lambda: Watch(fixed, seen, 2, (0, 4, 9))
    watch, second = make(), make()
    run = train(SMOKE, tmp_path / "a", prepared=prepared, progress=False, device="cpu", techniques=[watch])
    assert plain(run).equals(plain(whole)) and all(v.equal(weights(run)[k]) for k, v in weights(whole).items())
    assert watch.found.isfinite().all() and watch.found[2].tolist() != watch.found[0].tolist()
    with pytest.raises(KeyboardInterrupt):
        train(SMOKE, tmp_path / "b", prepared=prepared, progress=False, device="cpu", techniques=[make(), Stops(7)])
    train(SMOKE, tmp_path / "b", prepared=prepared, progress=False, device="cpu", techniques=[second])
    assert second.found.equal(watch.found), "what was seen before is in the checkpoint"
    fresh = PRX(**SMOKE.denoiser.model_dump())
    assert by_layer(fresh, FLOW, fixed, seen, 2, 0.1)[0] > by_layer(fresh, FLOW, fixed, seen, 2, 0.9)[0], "noise hides it"
