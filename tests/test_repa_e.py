"REPA-E: who learns from what, two equal looks, the normalisation, resume, and drawing with the trained autoencoder."
import pytest
import torch
from runs import CPU, same, weights
from torch import nn

from prx_nb.core import autoencoder, latents
from prx_nb.core import train as training
from prx_nb.core.autoencoder import Settings, psnr
from prx_nb.core.checkpoint import technique_names, new_state
from prx_nb.core.flow import FlowMatching
from prx_nb.core.optimizers import by_rate, new_optimizer
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.seeds import stream
from prx_nb.core.batch import add_noise, prepare, read_batch
from prx_nb.core.technique import Technique, as_learnt, objective, build
from prx_nb.core.train import Run, optimise, train, validation_set
from prx_nb.lab import judge
from prx_nb.techniques.repa_e import REPAE, effective_dimension, held, radial_power, unit_normal

pytest.importorskip("diffusers")
pytestmark = pytest.mark.timeout(280)
SMOKE = preset("smoke")
SMALL = Settings(data=SMOKE.data, blocks=(8, 16, 16), channels=4, steps=30)


def load_techniques(state, named):
    "Put a checkpoint's weights into the techniques alone."
    for name, technique in zip(technique_names(state.techniques), state.techniques):
        technique.load_state_dict({k.removeprefix(f"techniques.{name}."): v for k, v in named.items() if k.startswith(f"techniques.{name}.")})


def recipe(**changes):
    return SMOKE.replace({"latents.autoencoder": str(autoencoder.made(SMALL, progress=False)), "latents.channels": 4, "latents.factor": 4,
                          "denoiser.in_channels": 4, "denoiser.patch_size": 1, "train.steps": 6, "train.checkpoint_every": 3, "train.validate_every": 3,
                          "techniques.repa.weight": 0.5, "techniques.repa_e.weight": 1.5, "techniques.repa_e.lr": 2e-3} | changes)


@pytest.fixture(scope="module")
def prepared():
    return prepare(recipe(), progress=False)


def state_of(r, prepared):
    "A state whose denoiser is not the identity, as a fresh one is."
    state = new_state(r, CPU, build(r, prepared, CPU))
    for k, p in state.model.named_parameters():
        if not p.any():
            nn.init.normal_(p, 0, 0.2, generator=stream(1, k))
    return state


def noisy(r, prepared, step=0):
    return add_noise(read_batch(prepared, r, step), r, step, CPU)


def losses_of(r, state, batch, step=0):
    return objective(state.model, batch, FlowMatching(r.flow), state.techniques, step)


def gradients(state):
    named = {f"denoiser.{k}": p for k, p in state.model.named_parameters()} | {f"{type(t).__name__}.{k}": p for t in state.techniques
                                                                                for k, p in t.named_parameters()}
    return {k: p.grad for k, p in named.items()}


@pytest.mark.parametrize("loss,learns", [("flow", ("denoiser.",)), ("REPA", ("denoiser.", "REPA.projector.")), ("REPAE", ("REPAE.autoencoder.",))])
def test_each_network_learns_from_its_own_losses_and_no_other(loss, learns, prepared):
    r = recipe()
    state = state_of(r, prepared)
    losses_of(r, state, noisy(r, prepared))[loss].backward()
    found = gradients(state)
    assert all(g is None for k, g in found.items() if not k.startswith(learns)), "not zero: none at all"
    arrived = {k for k, g in found.items() if g is not None and g.any()}
    for part in ("denoiser.blocks.0", "denoiser.final_layer", "REPA.projector", "REPAE.autoencoder.encoder.conv_in", "REPAE.autoencoder.encoder.conv_out",
                 "REPAE.autoencoder.quant_conv", "REPAE.autoencoder.post_quant_conv", "REPAE.autoencoder.decoder.conv_out"):
        wanted = f"{part}.".startswith(learns) and not (loss == "REPA" and "final_layer" in part)
        assert any(k.startswith(part) for k in arrived) == wanted, part


def test_all_together_give_each_network_the_gradient_of_its_own(prepared):
    r = recipe()
    apart = {}
    for loss in ("flow", "REPA", "REPAE"):
        state = state_of(r, prepared)
        losses_of(r, state, noisy(r, prepared))[loss].backward()
        for k, g in gradients(state).items():
            apart[k] = (apart.get(k, 0) + g) if g is not None else apart.get(k, 0)
    state = state_of(r, prepared)
    sum(losses_of(r, state, noisy(r, prepared)).values()).backward()
    for k, g in gradients(state).items():
        torch.testing.assert_close(torch.zeros(()).expand_as(apart[k]) if g is None else g, apart[k] if torch.is_tensor(apart[k]) else torch.zeros_like(g),
                                   rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("one_in", [1, 4])
def test_the_loss_and_its_gradient_are_the_formula_written_out(one_in, prepared):
    "Batch norm, mixing, cosine, painting and divergence by hand; denoiser and projector as plain functions of detached weights."
    r = recipe(**{"techniques.repa.one_in": one_in, "techniques.repa_e.kl": 0.3})
    state, batch = state_of(r, prepared), noisy(r, prepared)
    repa, repae = state.techniques
    losses_of(r, state, batch)["REPAE"].backward()
    ours = {k: p.grad.clone() for k, p in repae.autoencoder.named_parameters()}
    repae.zero_grad()
    images = prepared.images.batch(batch.index)
    found = repae.autoencoder.encode(images).latent_dist
    raw = found.mean + found.std * torch.special.ndtri(batch.random("repa_e", 4, 4, 4).clamp(1e-7, 1 - 1e-7))
    mean, var = raw.mean((0, 2, 3), keepdim=True), raw.var((0, 2, 3), keepdim=True, correction=0)
    z = (raw - mean) / (var + 1e-5).sqrt()
    x_t = (1 - batch.t.view(-1, 1, 1, 1)) * z + batch.t.view(-1, 1, 1, 1) * batch.noise
    fixed = lambda m: {k: v.detach() for k, v in m.state_dict().items()}
    tokens = torch.func.functional_call(state.model, fixed(state.model), (x_t, batch.t, batch.text, batch.mask), {"taps": (repa.layer,)}).taps[repa.layer]
    tokens = torch.func.functional_call(repa.projector, fixed(repa.projector), (tokens,))[::one_in]
    teacher = repa._teacher[0](batch.index[::one_in]).float().flatten(2).transpose(1, 2)
    cosine = (tokens / tokens.norm(dim=-1, keepdim=True) * teacher / teacher.norm(dim=-1, keepdim=True)).sum(-1).mean()
    painted = repae.autoencoder.decode(raw).sample
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(found.mean, found.std), torch.distributions.Normal(0.0, 1.0)).mean()
    want = -1.5 * cosine + (painted - images).abs().mean() + (painted - images).square().mean() + 0.3 * kl
    torch.testing.assert_close(losses_of(r, state_of(r, prepared), batch)["REPAE"], want, rtol=1e-4, atol=1e-5)
    want.backward()
    for k, p in repae.autoencoder.named_parameters():
        torch.testing.assert_close(ours[k], p.grad, rtol=2e-3, atol=2e-5)


def test_the_second_look_sees_what_the_first_saw(prepared):
    r = recipe()
    state, batch, seen = state_of(r, prepared), noisy(r, prepared), []
    repa, repae = state.techniques
    real = state.model.forward
    state.model.forward = lambda *a, **k: seen.append((a[0], real(*a, **k))) or seen[-1][1]
    losses = losses_of(r, state, batch)
    (first, a), (second, b) = seen
    assert first.equal(second) and not first.requires_grad and second.requires_grad
    assert a.taps[repa.layer].equal(b.taps[repa.layer])
    _, whole = repae._others
    assert whole.projector is repa.projector and repa.one_in == 1
    painted = losses["REPAE"] - 1.5 * losses["REPA"] / 0.5
    assert painted > 0, "the same cosine stands in both"


def test_what_is_held_takes_nothing_and_is_given_back_after_an_error():
    layer, x = nn.Linear(3, 2), torch.ones(4, 3, requires_grad=True)
    layer.bias.requires_grad_(False)
    with pytest.raises(KeyError), held(layer):
        raise KeyError
    assert layer.weight.requires_grad and not layer.bias.requires_grad
    with held(layer):
        out = layer(x).sum()
    out.backward()
    assert layer.weight.grad is None and x.grad.equal(layer.weight.sum(0).expand(4, 3))


def test_latents_are_normalised_by_the_batch_and_remembered(prepared):
    r = recipe()
    state = state_of(r, prepared)
    repae = state.techniques[1]
    assert not repae.norm.running_mean.any() and repae.norm.running_var.eq(1).all(), "of scale 1 and shift 0"
    batch = noisy(r, prepared)
    z = repae.needs(batch, 0).clean
    assert z.shape == batch.x0.shape and not z.requires_grad and not z.equal(batch.x0)
    assert z.mean((0, 2, 3)).abs().max() < 1e-5 and (z.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    raw = repae._seen[1]
    torch.testing.assert_close(repae.norm.running_mean, 0.1 * raw.mean((0, 2, 3)))
    torch.testing.assert_close(repae.norm.running_var, 0.9 + 0.1 * raw.var((0, 2, 3)))
    other = recipe(**{"latents.scale": 0.5, "latents.shift": 0.25})
    norm = build(other, prepared, CPU)[1].norm
    assert norm.running_mean.eq(0.25).all() and norm.running_var.eq(4).all()


def test_unit_normal_is_one_and_the_same_for_a_share_of_the_batch(prepared):
    from dataclasses import replace
    batch = noisy(recipe(), prepared)
    n = unit_normal(batch, "x", 5000)
    assert abs(n.mean()) < 0.02 and abs(n.std() - 1) < 0.02 and n.isfinite().all()
    half = replace(batch, x0=batch.x0[4:], part=slice(4, 8))
    assert unit_normal(half, "x", 5000).equal(n[4:])


def test_outside_its_time_the_autoencoder_stands_still_but_its_latents_stay(prepared):
    r = recipe(**{"techniques.repa_e.start": 1, "techniques.repa_e.stop": 3})
    state, kept, seen = state_of(r, prepared), [], []
    repae = state.techniques[1]
    for step in range(5):
        kept.append({k: v.clone() for k, v in repae.state_dict().items()})
        losses = losses_of(r, state, noisy(r, prepared, step), step)
        seen.append("REPAE" in losses)
        optimise(state, losses, r, step)
    kept.append(repae.state_dict())
    assert seen == [False, True, True, False, False]
    still = [all(a[k].equal(b[k]) for k in a) for a, b in zip(kept, kept[1:])]
    assert still == [True, False, False, True, True], "weights and statistics"
    batch = noisy(r, prepared, 4)
    z = repae.needs(batch, 4).clean
    assert not z.equal(batch.x0) and (z - repae.clean(batch)).abs().mean() < 0.5, "the trained space, under running statistics"
    seen, real = [], state.model.forward
    state.model.forward = lambda *a, **k: seen.append(a[0]) or real(*a, **k)
    losses_of(r, state, batch, 4)
    assert len(seen) == 1 and seen[0].equal(FlowMatching(r.flow).mix(z, batch.noise, batch.t)), "the flow learns them to the end, with one look"


def test_the_autoencoder_has_a_rate_of_its_own(prepared):
    r = recipe(**{"optimizer.warmup": 4, "techniques.repa_e.lr": 3e-4})
    for name in ("adamw", "muon"):
        rr = r.replace("optimizer.name", name)
        state = state_of(rr, prepared)
        own = set(state.techniques[1].parameters())
        rates = {}
        optimise(state, losses_of(rr, state, noisy(rr, prepared)), rr, 0)
        for g in state.optimizer.param_groups:
            for p in g["params"]:
                rates.setdefault(p in own, set()).add(g["lr"])
        assert rates[True] == {3e-4 / 4} and all(lr == 1e-3 / 4 for lr in rates[False] if name == "adamw")
    plain = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    assert len(by_rate(plain)) == 1 and "initial_lr" not in by_rate(plain)[0]
    plain[1].initial_lr = plain[2].initial_lr = 5e-4
    groups = by_rate(plain)
    assert [len(g["params"]) for g in groups] == [1, 2, 1] and [p for g in groups for p in g["params"]] == plain
    net = nn.Linear(2, 2)
    assert len(new_optimizer(SMOKE, net).param_groups) == 1


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    return train(recipe(), tmp_path_factory.mktemp("whole"), prepared=prepared, progress=False)


def test_it_trains_all_three_and_nothing_leaks_into_the_checkpoint(whole, prepared):
    named, fresh = weights(whole), state_of(recipe(), prepared).tensors()
    own = [k for k in named if k.startswith("techniques.repa_e.")]
    assert any("autoencoder.encoder" in k for k in own) and any("norm.running_var" in k for k in own)
    assert named.keys() - {k for k in named if k.startswith("optimizer.")} == fresh.keys() - {k for k in fresh if k.startswith("optimizer.")}
    assert not any("teacher" in k or "_others" in k or "techniques.repa_e.repa" in k for k in named)
    changed = [k for k in own if "num_batches" not in k and not named[k].equal(fresh[k])]
    assert len(changed) > 0.9 * len(own)
    names = set(whole.curves.name)
    assert {"loss flow", "loss REPA", "loss REPAE", "val"} <= names


def test_a_stopped_run_goes_on_bit_for_bit(whole, prepared, tmp_path, monkeypatch):
    real = training.optimise

    def stumble(state, losses, r, step, *more):
        if step == 4:
            raise KeyboardInterrupt
        return real(state, losses, r, step, *more)
    monkeypatch.setattr(training, "optimise", stumble)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path, prepared=prepared, progress=False)
    assert not (tmp_path / "autoencoder").exists(), "kept at the end only"
    monkeypatch.setattr(training, "optimise", real)
    run = train(recipe(), tmp_path, prepared=prepared, progress=False)
    same(run, whole)
    files = sorted(p.name for p in (whole.dir / "autoencoder").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert all((run.dir / "autoencoder" / n).read_bytes() == (whole.dir / "autoencoder" / n).read_bytes() for n in files)


def test_the_kept_autoencoder_is_the_trained_one_with_its_statistics(whole, prepared):
    state = state_of(recipe(), prepared)
    named = weights(whole)
    load_techniques(state, named)
    repae, space = state.techniques[1], whole.space
    batch = noisy(recipe(), prepared)
    images = prepared.images.batch(batch.index)
    raw = repae.autoencoder.encode(images).latent_dist.mean
    m, s = repae.norm.running_mean.view(1, -1, 1, 1), (repae.norm.running_var + repae.norm.eps).sqrt().view(1, -1, 1, 1)
    assert (m.abs() > 1e-3).any() and ((s - 1).abs() > 1e-3).any()
    torch.testing.assert_close(space.encode(images), (raw - m) / s, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(repae.clean(batch), (raw - m) / s, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(space.decode((raw - m) / s), repae.autoencoder.decode(raw).sample, atol=1e-4, rtol=1e-4)
    assert space.latents.scale == 1 and space.latents.shift == 0


def test_pictures_are_painted_by_the_trained_decoder(whole, prepared, monkeypatch):
    drawn = []
    real = judge.sampling.draw
    monkeypatch.setattr(judge.sampling, "draw", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    images = judge.draw(whole, prepared, judge.exam(prepared, whole.recipe))
    trained = latents.load_latents(latents.describe(str(whole.dir / "autoencoder"))).decode(drawn[0]).clamp(-1, 1)
    frozen = latents.load_latents(whole.recipe.latents).decode(drawn[0]).clamp(-1, 1)
    assert images.equal(trained) and not images.equal(frozen)
    again = Run.load(whole.dir)
    assert again.space.decode(drawn[0]).clamp(-1, 1).equal(images)


def test_a_run_without_its_autoencoder_does_not_paint_with_another(whole, tmp_path):
    from dataclasses import replace
    with pytest.raises(latents.LatentsError, match="no such folder"):
        _ = replace(whole, dir=tmp_path).space
    plain = replace(whole, recipe=whole.recipe.replace("techniques.repa_e.weight", 0.0), dir=tmp_path)
    assert plain.space.key == latents.load_latents(whole.recipe.latents).key


def test_a_finished_runs_autoencoder_can_be_named_in_another_recipe(whole, prepared, tmp_path):
    r = recipe(**{"techniques.repa_e.weight": 0.0, "latents.autoencoder": str(whole.dir / "autoencoder")})
    run = train(r, tmp_path, progress=False)
    assert run.space.key == whole.space.key and run.record["status"] == "done"


def test_validation_is_on_the_latents_that_were_learnt(whole, prepared):
    r = recipe()
    state = state_of(r, prepared)
    named = weights(whole)
    load_techniques(state, named)
    before = {k: v.clone() for k, v in state.techniques.state_dict().items()}
    fixed = validation_set(prepared, r, CPU)
    now = as_learnt(fixed, state.techniques)
    assert all(a.x0.equal(whole_x) for a, whole_x in zip(now, [state.techniques[1].clean(b) for b in fixed])) and not now[0].x0.requires_grad
    assert not now[0].x0.equal(fixed[0].x0) and now[0].noise.equal(fixed[0].noise)
    assert all(v.equal(before[k]) for k, v in state.techniques.state_dict().items()), "a look changes no statistics"
    value = training.validate(whole.model, now, FlowMatching(r.flow))["val"]
    assert value == pytest.approx(whole.curves[whole.curves.name == "val"].value.iloc[-1], rel=1e-4)
    assert as_learnt(fixed, [])[0] is fixed[0] and as_learnt(fixed, [Technique()])[0] is fixed[0]
    with pytest.raises(ValueError, match="2 techniques want to choose what is learnt"):
        as_learnt(fixed, [state.techniques[1], state.techniques[1]])


def test_the_autoencoder_stays_one_and_the_denoiser_sees_more(prepared):
    "Forty steps of its loss: it paints better than before, and a denoiser that stands still is aligned better."
    r = recipe()
    state = state_of(r, prepared)
    repa, repae = state.techniques
    held_out = prepared.images.batch(prepared.heldout)
    paints = lambda: psnr(repae.autoencoder.decode(repae.autoencoder.encode(held_out).latent_dist.mean).sample, held_out).mean().item()
    look = lambda step: losses_of(r, state, noisy(r, prepared, step), step)
    cosine = lambda: -sum(look(s)["REPA"].item() for s in range(50, 58))
    before = paints(), cosine()
    optimizer = torch.optim.AdamW(repae.parameters(), 1e-3)
    for step in range(40):
        optimizer.zero_grad()
        look(step)["REPAE"].backward()
        optimizer.step()
    assert paints() > before[0] and cosine() > before[1]


@pytest.mark.parametrize("changes,why", [
    ({"techniques.repa.weight": 0.0}, "needs techniques.repa.weight above 0"),
    ({"train.processes": 2}, "in one process"),
    ({"techniques.repa_e.weight": -1.0}, "techniques.repa_e.weight"),
    ({"techniques.repa_e.lr": 0.0}, "techniques.repa_e.lr"),
    ({"techniques.repa_e.start": 5, "techniques.repa_e.stop": 5}, "does not come after start")])
def test_recipes_that_cannot_be_are_refused(changes, why):
    with pytest.raises(RecipeError, match=why):
        recipe(**changes)


def test_pixels_and_other_autoencoders_are_refused(prepared, tmp_path):
    with pytest.raises(RecipeError, match="'pixels' has none"):
        SMOKE.replace({"techniques.repa.weight": 0.5, "techniques.repa_e.weight": 1.0})
    import diffusers
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
                              num_decoder_blocks=(1, 1, 1)).save_pretrained(tmp_path)
    r = recipe(**{"latents.autoencoder": str(tmp_path)})
    with pytest.raises(RecipeError, match="trains an AutoencoderKL, but .* is an AutoencoderTiny"):
        REPAE.of(r, prepared, CPU, None)


def test_spectra_are_what_they_say():
    z = torch.randn(3, 2, 6, 6, generator=stream(0, "z"))
    rings = torch.tensor([1, 8, 12, 15])                            # places in each ring of a 6 x 6 grid
    power = radial_power(z)
    total = (z.double() - z.double().mean((0, 2, 3), keepdim=True)).square().mean() * 36
    torch.testing.assert_close((power * rings).sum(), total)           # Parseval
    x = torch.randn(50, 4, generator=stream(0, "x")).double() * torch.tensor([3.0, 1.0, 0.5, 0.1])
    e = torch.linalg.eigvalsh(torch.cov(x.T))
    assert effective_dimension(x) == pytest.approx((e.sum() ** 2 / e.square().sum()).item(), rel=1e-6)

