"The small autoencoder that is trained here: folding, determinism, the cache, its name in a recipe."
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from prx_nb.core import autoencoder, data, latents, recipe
from prx_nb.core.autoencoder import Settings, channel_moments, error, fit, fresh, made, posterior, psnr, standardised
from prx_nb.core.seeds import stream

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.timeout(280)

TINY = Settings(data=recipe.Data(size=16, limit=256), blocks=(8, 8), channels=3, steps=6, batch=4)


@pytest.fixture(scope="module")
def drawings():
    images = data.load(TINY.data, progress=False)
    return images, data.split(images, TINY.data)


@pytest.fixture()
def cache(tmp_path, monkeypatch, drawings):
    "An empty cache, with the drawings already in memory."
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autoencoder.data, "load", lambda *a, **k: drawings[0])
    return tmp_path / "cache"


def pictures(n=4, size=16, name="x"):
    return torch.rand(n, 3, size, size, generator=stream(0, name)) * 2 - 1


def messy(**more):
    "An autoencoder whose every weight matters."
    torch.manual_seed(3)
    model = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, latent_channels=3, shift_factor=0.7, scaling_factor=0.3,
                                    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("convs", [True, False], ids=["with quant convs", "without"])
@torch.no_grad()
def test_standardised_is_the_same_autoencoder_in_other_units(convs):
    model, mean, deviation = messy(use_quant_conv=convs, use_post_quant_conv=convs), torch.tensor([0.5, -3.0, 0.0]), torch.tensor([0.05, 4.0, 1.0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other, x = standardised(model, mean, deviation), pictures()
    a, b = model.encode(x).latent_dist, other.encode(x).latent_dist
    torch.testing.assert_close(b.mean, (a.mean - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b.std, a.std / deviation.view(-1, 1, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.decode(b.mean).sample, model.decode(a.mean).sample, atol=1e-4, rtol=1e-4)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items()), "the one that came in is left alone"
    assert other.config.scaling_factor == 1 and other.config.shift_factor is None and not other.training


def test_the_losses_are_those_of_torch():
    model, x, noise = messy(), pictures(), torch.randn(4, 3, 8, 8, generator=stream(0, "n"))
    z, divergence = posterior(model, x, noise)
    found = model.encode(x).latent_dist
    normal = torch.distributions.Normal(found.mean, found.std)
    torch.testing.assert_close(z, normal.mean + normal.stddev * noise)
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean(), rtol=1e-4, atol=1e-5)
    painted = model.decode(z).sample
    torch.testing.assert_close(error(painted, x), torch.nn.functional.l1_loss(painted, x) + torch.nn.functional.mse_loss(painted, x))
    from torchmetrics.functional.image import peak_signal_noise_ratio
    want = torch.stack([peak_signal_noise_ratio(p.clamp(-1, 1), i, data_range=2.0) for p, i in zip(painted, x)])
    torch.testing.assert_close(psnr(painted * 3, x), torch.stack([peak_signal_noise_ratio((3 * p).clamp(-1, 1), i, data_range=2.0)
                                                                  for p, i in zip(painted, x)]))
    torch.testing.assert_close(psnr(painted, x), want)


def test_fit_is_one_written_out_with_torch(drawings):
    images, parts = drawings
    model, theirs = fit(TINY, images, parts.train, progress=False), fresh(TINY)
    peer = torch.optim.AdamW(theirs.parameters(), TINY.lr, (0.9, 0.95), weight_decay=0)
    from prx_nb.core.seeds import order
    for step in range(TINY.steps):
        x = images.batch(parts.train[order(0, step, 4, len(parts.train))])
        found = theirs.encode(x).latent_dist
        z = found.mean + found.std * torch.randn(found.mean.shape, generator=stream(0, "posterior", step))
        y = theirs.decode(z).sample
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(found.mean, found.std), torch.distributions.Normal(0.0, 1.0)).mean()
        peer.zero_grad()
        ((y - x).abs().mean() + (y - x).square().mean() + TINY.kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        peer.param_groups[0]["lr"] = TINY.lr * min((step + 1) / 20, (TINY.steps - step) / (0.5 * TINY.steps), 1)
        peer.step()
    for a, b in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_the_same_settings_give_the_same_weights_whatever_went_before(drawings):
    images, parts = drawings
    first = fit(TINY, images, parts.train, progress=False).state_dict()
    torch.manual_seed(77)
    state = torch.random.get_rng_state()
    again = fit(TINY, images, parts.train, progress=False).state_dict()
    assert torch.random.get_rng_state().equal(state), "torch's own stream is left alone"
    other = fit(TINY.model_copy(update={"seed": 1}), images, parts.train, progress=False).state_dict()
    assert all(v.equal(again[k]) for k, v in first.items()) and not any(v.equal(other[k]) for k, v in first.items() if "conv_in.weight" in k)


def test_the_folder_is_standard_and_its_latents_are_standardised(cache, drawings):
    images, parts = drawings
    folder = made(TINY, progress=False)
    space = latents.load_latents(latents.describe(str(folder)))
    assert (space.channels, space.factor, space.latents.scale, space.latents.shift) == (3, 2, 1.0, 0.0)
    m = latents.measure(space, images.batch(parts.train))
    assert max(map(abs, m.channel_mean)) < 1e-4 and all(abs(d - 1) < 1e-3 for d in m.channel_deviation)
    raw = fit(TINY, images, parts.train, progress=False)
    mean, deviation = channel_moments(raw, images, parts.train)
    z = raw.encode(images.batch(parts.train)).latent_dist.mean
    torch.testing.assert_close(mean, z.double().mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(deviation, z.double().std((0, 2, 3), correction=0), atol=1e-6, rtol=1e-5)
    about = json.loads((folder / "about.json").read_text())
    held = images.batch(torch.cat((parts.concepts, parts.pairs)))
    assert about["PSNR"] == pytest.approx(psnr(space.decode(space.encode(held)), held).mean().item(), abs=1e-3)
    assert (about["trained on"], about["held out"], about["settings"]["steps"]) == (len(parts.train), len(held), 6)


def test_it_looks_at_training_images_only(cache, drawings, monkeypatch):
    images, parts = drawings
    asked = []
    monkeypatch.setattr(autoencoder, "fit", lambda s, i, rows, p: asked.append(rows) or fresh(s).eval())
    made(TINY, progress=False)
    assert asked[0].equal(parts.train) and set(asked[0].tolist()).isdisjoint(torch.cat((parts.concepts, parts.pairs)).tolist())


def test_it_is_trained_once_and_keyed_by_content(cache, drawings, monkeypatch):
    folder, count, real = made(TINY, progress=False), [], autoencoder.fit
    monkeypatch.setattr(autoencoder, "fit", lambda *a: count.append(1) or real(*a))
    assert made(TINY, progress=False) == folder and not count
    keys = {s.key(drawings[0]) for s in (TINY, *(TINY.model_copy(update=u) for u in (
        {"seed": 1}, {"steps": 7}, {"kl": 0.0}, {"lr": 1e-4}, {"batch": 5}, {"blocks": (8, 16)}, {"channels": 4})))}
    class Others:
        key = "others"
    assert len(keys) == 8 and TINY.key(Others) not in keys
    shutil.rmtree(folder)
    weights = load_file(made(TINY, progress=False) / "diffusion_pytorch_model.safetensors")
    assert count == [1] and weights.keys() == fresh(TINY).state_dict().keys()


def test_an_interrupted_training_leaves_nothing_that_looks_whole(cache, drawings, monkeypatch):
    def stop(*a):
        raise KeyboardInterrupt
    monkeypatch.setattr(autoencoder, "write_json", stop)                 # after the weights, before the move
    with pytest.raises(KeyboardInterrupt):
        made(TINY, progress=False)
    home = cache / "autoencoders" / TINY.key(drawings[0])
    assert [p.name for p in home.iterdir()] == ["lock"]


def test_two_processes_at_once_train_one(tmp_path):
    code = f"""
from prx_nb.core import autoencoder as a
real = a.fit
def fit(*args):
    print("trained", flush=True)
    return real(*args)
a.fit = fit
s = a.Settings.model_validate_json({TINY.model_dump_json()!r})
print(a.made(s, progress=False))
"""
    images = data.load(TINY.data, progress=False)
    home = autoencoder.cache_dir("autoencoders", TINY.model_copy(update={"seed": 987}).key(images))
    shutil.rmtree(home)
    code = code.replace("print(a.made(s", "s = s.model_copy(update={'seed': 987})\nprint(a.made(s")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    said = [p.communicate(timeout=200)[0] for p in both]
    assert "".join(said).count("trained") == 1 and all(str(home / "model") in s for s in said)
    shutil.rmtree(home)


def test_a_name_is_described_and_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(autoencoder, "made", lambda *a: pytest.fail("trained first"))
    for name, settings in autoencoder.NAMED.items():
        there = latents.describe(name)
        assert (there.channels, there.factor, there.scale, there.shift) == (settings.channels, settings.factor, 1.0, 0.0)
        with pytest.raises(latents.LatentsError, match=f"channels = 4, but the autoencoder '{name}' has channels {settings.channels}"):
            latents.load_latents(there.model_copy(update={"channels": 4}))
    with pytest.raises(latents.LatentsError, match="no such folder.*or emoji-kl-f4"):
        latents.describe("emoji-kl-f5")


def test_as_trained_is_the_standardised_one_taken_back_and_trained_once(cache, drawings, monkeypatch):
    images, parts = drawings
    trained, once = [], autoencoder.fit
    monkeypatch.setattr(autoencoder, "fit", lambda *a: trained.append(1) or once(*a))
    plain = TINY.model_copy(update={"standardise": False})
    folders = [made(s, progress=False) for s in (plain, TINY, plain)]
    assert trained == [1] and folders[0] == folders[2] != folders[1]
    raw, standard = (diffusers.AutoencoderKL.from_pretrained(f).eval() for f in folders[:2])
    about, x = json.loads((folders[1] / "about.json").read_text()), pictures()
    fresh_one = once(TINY, images, parts.train, False)
    with torch.no_grad():
        a, b, c = (m.encode(x).latent_dist for m in (raw, standard, fresh_one))
        torch.testing.assert_close(a.mean, c.mean, atol=1e-4, rtol=1e-4)
        mean, deviation = (torch.tensor(about[k]).view(-1, 1, 1) for k in ("mean", "deviation"))
        torch.testing.assert_close((a.mean - mean) / deviation, b.mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(raw.decode(a.mean).sample, standard.decode(b.mean).sample, atol=1e-4, rtol=1e-4)


def test_a_named_one_measures_its_own_drawings_once(cache, monkeypatch):
    monkeypatch.setattr(autoencoder, "NAMED", {"toy": TINY.model_copy(update={"standardise": False})})
    asked = latents.describe("toy").model_copy(update={"normalize": "channel"})
    z = latents.load_latents(asked).encode(autoencoder.data.load().batch(torch.arange(64)))
    assert (z.mean((0, 2, 3)).abs() < 0.3).all() and ((z.transpose(0, 1).flatten(1).std(1) - 1).abs() < 0.3).all()
    monkeypatch.setattr(latents, "measure", lambda *a: pytest.fail("measured twice"))
    latents.load_latents(asked)


def test_a_named_one_is_found_loaded_and_mended(cache, monkeypatch):
    monkeypatch.setattr(autoencoder, "NAMED", {"toy": TINY})
    there = latents.describe("toy")
    space = latents.load_latents(there)
    same = latents.load_latents(latents.describe(str(made(TINY))))
    assert space.key == same.key and latents.find("toy") == made(TINY) / "config.json"
    weights = made(TINY) / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(latents.LatentsError, match="weights cannot be read.*delete .*model and it is made again"):
        latents.load_latents(there)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"blocks": ()}, {"lr": 0.0}, {"width": 3}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
