"Latents next to diffusers itself: four classes of tiny random autoencoders, no network."
import json
import shutil
import time

import numpy as np
import pytest
import torch

from prx_nb.core import files, latents, recipe
from prx_nb.core.seeds import stream

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.timeout(120)

BLOCKS = dict(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1,
              down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
ARGS = {
    "AutoencoderKL": dict(BLOCKS, latent_channels=4, scaling_factor=0.36, shift_factor=0.12),
    "AutoencoderKLFlux2": dict(BLOCKS, latent_channels=4),
    "AutoencoderTiny": dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
                            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.7),
    "AutoencoderDC": dict(latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8, 8),
                          decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1),
                          decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((),) * 3,
                          decoder_qkv_multiscales=((),) * 3, scaling_factor=0.41),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with one autoencoder of each class."
    home = tmp_path_factory.mktemp("autoencoders")
    for kind, args in ARGS.items():
        torch.manual_seed(len(kind))
        model = getattr(diffusers, kind)(**args)
        if kind == "AutoencoderKLFlux2":                    # a batch norm that has seen something
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.5, 4)
        model.save_pretrained(home / kind)
    return home


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(n=5, size=32, name="x"):
    return torch.rand(n, 3, size, size, generator=stream(0, name)) * 2 - 1


def direct(kind, model, x, generator=None):
    "Encode and decode as diffusers' own pipelines do."
    if kind == "AutoencoderKLFlux2":
        from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
        posterior = model.encode(x).latent_dist
        z = Flux2Pipeline._patchify_latents(posterior.sample(generator) if generator else posterior.mode())
        mean = model.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
        return (z - mean) / std, lambda z: model.decode(Flux2Pipeline._unpatchify_latents(z * std + mean)).sample
    if kind == "AutoencoderKL":
        posterior = model.encode(x).latent_dist
        z = posterior.sample(generator) if generator else posterior.mode()
        return (z - 0.12) * 0.36, lambda z: model.decode(z / 0.36 + 0.12).sample
    if kind == "AutoencoderTiny":
        return model.encode(x).latents * 0.7, lambda z: model.decode(z / 0.7).sample
    return model.encode(x).latent * 0.41, lambda z: model.decode(z / 0.41).sample


@pytest.mark.parametrize("kind", ARGS)
@pytest.mark.parametrize("slice", [2, 32])
def test_same_as_diffusers(home, kind, slice):
    model = getattr(diffusers, kind).from_pretrained(home / kind).eval()
    space = latents.load_latents(latents.describe(str(home / kind)), slice=slice)
    x = images()
    with torch.no_grad():
        for generator in (None, stream(3, "draw")):
            z, decode = direct(kind, model, x, generator)
            ours = space.encode(x, None if generator is None else stream(3, "draw"))
            torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(space.decode(ours), decode(z), atol=1e-5, rtol=1e-5)
    assert ours.shape == (5, space.channels, 32 // space.factor, 32 // space.factor)
    assert (space.channels, space.factor) == ((16, 8) if kind == "AutoencoderKLFlux2" else (4, 4))


@pytest.mark.parametrize("kind", ARGS)
def test_decoder_hands_gradients_through(home, kind):
    space = latents.load_latents(latents.describe(str(home / kind)))
    z = torch.randn(2, space.channels, 4, 4, generator=stream(0, "z"), requires_grad=True)
    space.decode(z).square().mean().backward()
    assert z.grad.abs().max() > 0 and all(p.grad is None for p in space.model.parameters())
    assert not space.model.training


def test_sample_differs_from_mean_by_the_posterior(home):
    space = latents.load_latents(latents.describe(str(home / "AutoencoderKL")))
    x = images(64)
    mean, deviation = space.moments(x)
    z = (space.draw(mean, deviation, stream(0, "a")) - mean) / deviation
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    assert not space.encode(x, stream(0, "a")).equal(space.encode(x, stream(0, "b")))
    assert space.encode(x).equal(space.encode(x))


def test_subfolder_vae_and_absent_shift(home, tmp_path):
    model = diffusers.AutoencoderKL(**dict(ARGS["AutoencoderKL"], shift_factor=None))
    model.save_pretrained(tmp_path / "pipe" / "vae")
    there = latents.describe(str(tmp_path / "pipe"))
    assert (there.scale, there.shift, there.channels, there.factor) == (0.36, 0.0, 4, 4)
    assert latents.load_latents(there).key == latents.load_latents(latents.describe(str(tmp_path / "pipe" / "vae"))).key


def test_recipe_decides_scale_and_shift(home):
    there = latents.describe(str(home / "AutoencoderKL"))
    raw = latents.load_latents(there.model_copy(update={"scale": 1.0, "shift": 0.0})).encode(images())
    other = latents.load_latents(there.model_copy(update={"scale": 2.0, "shift": 0.5}))
    torch.testing.assert_close(other.encode(images()), (raw - 0.5) * 2)
    torch.testing.assert_close(other.decode(other.encode(images())), latents.load_latents(there).decode((raw - 0.12) * 0.36))


def test_bad_input_is_one_clear_error(home, tmp_path, monkeypatch):
    fits = latents.describe(str(home / "AutoencoderKL"))
    monkeypatch.setattr(latents, "_read", lambda *a: pytest.fail("weights were read first"))
    with pytest.raises(latents.LatentsError, match="channels = 16.*has channels 4"):
        latents.load_latents(fits.model_copy(update={"channels": 16}))
    with pytest.raises(latents.LatentsError, match="factor = 8.*has factor 4"):
        latents.load_latents(fits.model_copy(update={"factor": 8}))
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere"):
        with pytest.raises(latents.LatentsError, match="no such folder"):
            latents.describe(name)
    (tmp_path / "vae").mkdir()
    with pytest.raises(latents.LatentsError, match="holds neither"):
        latents.describe(str(tmp_path))
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "VQModel", "latent_channels": 3, "block_out_channels": [8]}))
    with pytest.raises(latents.LatentsError, match="VQModel.*AutoencoderKL, "):
        latents.describe(str(tmp_path))
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(latents.LatentsError, match="not valid JSON"):
        latents.describe(str(tmp_path))


def test_hub_id_that_is_not_there_fails_fast(monkeypatch, tmp_path):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *a, **k: "http://127.0.0.1:9/x")
    start = time.monotonic()
    with pytest.raises(latents.LatentsError, match="no-such-owner/no-such-name.*cannot be reached"):
        latents.describe("no-such-owner/no-such-name")
    assert time.monotonic() - start < 20        # the hub client alone retries for longer


def test_missing_or_broken_weights(home, tmp_path):
    shutil.copytree(home / "AutoencoderKL", tmp_path / "ae")
    there = latents.describe(str(tmp_path / "ae"))
    weights = tmp_path / "ae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(latents.LatentsError, match="weights cannot be read"):
        latents.load_latents(there)
    weights.unlink()
    with pytest.raises(latents.LatentsError, match="weights cannot be read"):
        latents.load_latents(there)


def test_odd_images_are_refused(home):
    space = latents.load_latents(latents.describe(str(home / "AutoencoderKL")))
    for shape in ((1, 3, 30, 32), (1, 4, 32, 32)):
        with pytest.raises(latents.LatentsError, match="multiples of 4"):
            space.encode(torch.zeros(shape))


@pytest.mark.parametrize("kind", ARGS)
def test_measure_proposes_what_normalises(home, kind):
    there = latents.describe(str(home / kind)).model_copy(update={"scale": 3.0, "shift": 9.0})   # must not matter
    space = latents.load_latents(there)
    x = images(12)
    m = latents.measure(space, x.split(5))
    proposal = {k.split(".")[1]: v for k, v in m.proposal.items()}
    z = latents.load_latents(there.model_copy(update=proposal)).encode(x)
    assert abs(z.mean()) < 1e-2 and abs(z.std() - 1) < 1e-2 and m.images == 12
    raw = space.draw(*space.moments(x))
    np.testing.assert_allclose(m.channel_mean, raw.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(m.channel_deviation, raw.transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-3)


class Few:
    "The part of data.Images that is used."
    def __init__(self, pixels, key):
        self.pixels, self.key, self.asked, self.fail_at = pixels, key, 0, None

    def __len__(self):
        return len(self.pixels)

    def batch(self, index):
        self.asked += len(index)
        if self.fail_at is not None and self.asked > self.fail_at:
            raise KeyboardInterrupt
        return self.pixels[index]


@pytest.mark.parametrize("kind", ARGS)
@pytest.mark.parametrize("dtype,close", [("float32", 1e-5), ("float16", 5e-3)])
def test_cached_latents_equal_fresh_ones(home, cache, kind, dtype, close):
    few, there = Few(images(10), "few"), latents.describe(str(home / kind))
    stored = latents.latents_of(few, there, dtype=dtype, deviation=True, shard=4, slice=3, progress=False)
    index = torch.tensor([9, 0, 4, 4])
    space = latents.load_latents(there)
    torch.testing.assert_close(stored.batch(index), space.encode(few.pixels[index]), atol=close, rtol=close)
    fresh = space.encode(few.pixels[index], stream(1, "s"))
    torch.testing.assert_close(stored.batch(index, stream(1, "s")), fresh, atol=close, rtol=close)
    np.testing.assert_array_equal(stored[index.numpy()], stored.batch(index))
    assert len(stored) == 10 and isinstance(stored.shards.files[0], np.memmap)


@pytest.mark.parametrize("kind", ARGS)
@pytest.mark.parametrize("how", ["scalar", "channel", "whitened"])
def test_normalised_latents_are_what_they_say_and_come_back(home, tmp_path, cache, kind, how):
    x = images(40)
    own = latents.with_statistics(str(home / kind), x.split(9), tmp_path / "own")
    given = latents.describe(str(own)).model_copy(update={"scale": 1.0, "shift": 0.0})
    asked = given.model_copy(update={"normalize": how, "gain": 5.0})
    space, raw = latents.load_latents(asked), latents.load_latents(given).encode(x)
    z = space.encode(x)
    torch.testing.assert_close(space.denormalise(z), raw, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(space.decode(z), latents.load_latents(given).decode(raw), atol=1e-4, rtol=1e-4)
    cov = np.cov(z.double().transpose(0, 1).flatten(1), bias=True) / 25
    if how == "scalar":
        torch.testing.assert_close(z, 5 * (raw - raw.mean()) / raw.std(correction=0), atol=1e-3, rtol=1e-3)
    if how == "channel":
        torch.testing.assert_close(z, 5 * torch.nn.InstanceNorm1d(len(cov), eps=1e-12)(
            raw.transpose(0, 1).flatten(1)[None])[0].view(raw.shape[1], len(x), *raw.shape[2:]).transpose(0, 1), atol=1e-3, rtol=1e-3)
    if how == "whitened":
        np.testing.assert_allclose(cov, np.eye(len(cov)), atol=5e-3)
    stored = latents.latents_of(Few(x, f"few {kind}"), asked, dtype="float32", progress=False)
    torch.testing.assert_close(stored.batch(torch.tensor([7, 0])), z[[7, 0]], atol=1e-4, rtol=1e-4)


def test_normalisations_share_a_cache_and_are_told_apart_by_the_recipe(home, tmp_path, cache):
    few = Few(images(12), "few")
    own = latents.with_statistics(str(home / "AutoencoderKL"), few.pixels, tmp_path / "own")
    plain = recipe.preset("smoke").replace({"latents.autoencoder": str(own), "latents.channels": 4, "latents.factor": 4,
                                            "denoiser.in_channels": 4, "denoiser.patch_size": 1})
    assert "normalize" not in recipe.counted(plain)["latents"] and "gain" not in recipe.counted(plain)["latents"]
    several = [plain.replace(change) for change in ({}, {"latents.normalize": "channel"}, {"latents.normalize": "whitened"}, {"latents.gain": 5.0})]
    assert len({r.key for r in several}) == 4
    seen = [latents.latents_of(few, r.latents, progress=False).batch(torch.arange(12)) for r in several]
    assert few.asked == 12 and all(not torch.allclose(seen[0], other, atol=0.05) for other in seen[1:])


def test_statistics_that_are_missing_damaged_or_of_another_are_refused(home, tmp_path, monkeypatch):
    here = tmp_path / "AutoencoderKL"
    shutil.copytree(home / "AutoencoderKL", here)
    asked = latents.describe(str(here)).model_copy(update={"scale": 1.0, "shift": 0.0, "normalize": "channel"})
    monkeypatch.setattr(latents, "_read", lambda name: pytest.fail("weights were read first"))
    with pytest.raises(latents.LatentsError, match="no statistics.json beside its config.*with_statistics"):
        latents.load_latents(asked)
    for text in ("{}", "[1]", "nonsense"):
        (here / "statistics.json").write_text(text)
        with pytest.raises(latents.LatentsError, match="holds no statistics of latents.*delete it"):
            latents.load_latents(asked)
    monkeypatch.undo()
    other = latents.Moments(1, 0.0, 1.0, (0.0,) * 3, (1.0,) * 3, ((1.0,) * 3,) * 3)
    with pytest.raises(latents.LatentsError, match="needs statistics of 4 channels; there are 3"):
        latents.Autoencoder(latents._read(str(here)), asked, statistics=other)


def test_cache_is_keyed_by_content(home, cache):
    few, there = Few(images(6), "few"), latents.describe(str(home / "AutoencoderKL"))
    latents.latents_of(few, there, progress=False)
    assert few.asked == 6
    latents.latents_of(few, there.model_copy(update={"scale": 1.7}), progress=False)      # applied when read
    assert few.asked == 6
    latents.latents_of(Few(images(6, name="y"), "other"), there, progress=False)
    assert len(list((cache / "latents").iterdir())) == 2
    torch.manual_seed(99)
    diffusers.AutoencoderKL(**ARGS["AutoencoderKL"]).save_pretrained(cache / "retrained")
    latents.latents_of(few, latents.describe(str(cache / "retrained")), progress=False)   # same settings, other weights
    assert few.asked == 12


def test_interrupt_loses_one_shard_at_most(home, cache):
    few, there = Few(images(10), "few"), latents.describe(str(home / "AutoencoderTiny"))
    few.fail_at = 9
    with pytest.raises(KeyboardInterrupt):
        latents.latents_of(few, there, shard=4, progress=False)
    assert sorted(p.name for p in (cache / "latents").rglob("*.*")) == ["00000000.npy", "00000004.npy"]
    few.fail_at, few.asked = None, 0
    stored = latents.latents_of(few, there, shard=4, dtype="float16", progress=False)
    assert few.asked == 2
    torch.testing.assert_close(stored.batch(torch.arange(10)), latents.load_latents(there).encode(few.pixels), atol=5e-3, rtol=5e-3)


def test_cache_of_pixels_is_the_images(cache):
    few = Few(images(), "few")
    assert latents.latents_of(few, recipe.Latents()) is few and not few.asked and not cache.exists()


def test_overflow_is_named_and_not_kept(home, cache):
    few, there = Few(images(4), "few"), latents.describe(str(home / "AutoencoderKL"))
    few.pixels[2, 0, 0, 0] = float("nan")
    with pytest.raises(latents.LatentsError, match="image 2 .*not finite"):
        latents.latents_of(few, there, progress=False)
    assert not list((cache / "latents").rglob("*.npy"))
    with pytest.raises(latents.LatentsError, match="float16 or float32"):
        latents.latents_of(few, there, dtype="int8")
    only_mean = latents.latents_of(Few(images(4), "x"), there, progress=False)
    with pytest.raises(latents.LatentsError, match="deviation=True"):
        only_mean.batch(torch.tensor([0]), stream(0, "s"))


def test_damaged_shard_is_named(home, cache):
    few, there = Few(images(4), "few"), latents.describe(str(home / "AutoencoderTiny"))
    latents.latents_of(few, there, progress=False)
    path = next((cache / "latents").rglob("*.npy"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(latents.LatentsError, match="delete"):
        latents.latents_of(few, there, progress=False)


def test_importing_does_not_import_diffusers():
    import subprocess
    import sys
    code = "import sys, prx_nb.core.latents; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_cache_folder_is_made_by_files(cache):
    assert files.cache_dir("latents").is_relative_to(cache)
