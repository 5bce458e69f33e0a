"Export to diffusers' PRX pipelines and back: the same images from the same noise, offline."
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prx_nb.core import interop, latents, recipe, sample, text
from prx_nb.core.denoiser import PRX
from prx_nb.core.flow import FlowMatching
from prx_nb.core.seeds import stream

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(150)

WORDS = "a red blue circle big on white heart with the long , . ! ( ) caption that does not fit".split()
PROMPTS = ["red heart", "a long caption that does not fit on the white circle with a big red heart"]


def tokenizer(special=True):
    "A word-level tokenizer like BERT's, made here."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(WORDS)])}
    t = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
    if special:
        t.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64)


def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=64)
    return transformers.BertModel(config, add_pooling_layer=False)


@pytest.fixture(scope="module")
def encoder():
    return text.TextEncoder("tiny", "tiny", bert(), tokenizer())


def make(**changes):
    "A recipe and a random denoiser that is not zero anywhere."
    r = recipe.preset("smoke").replace({
        "data.size": 32, "text.encoder": "tiny", "text.tokens": 8, "denoiser.context_in_dim": 16, "denoiser.patch_size": 4,
        "denoiser.hidden_size": 32, "denoiser.num_heads": 2, "denoiser.depth": 2, "sample.grid": "diffusers",
        "sample.steps": 4, **changes})
    model = PRX(**r.denoiser.model_dump())
    g = stream(0, "weights")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.12 if p.ndim > 1 else 0.05) + (p.ndim == 1))
    return interop.Parts(model.eval(), r)


def noise(parts, n, height=32, width=32):
    f = parts.recipe.latents.factor
    return sample.noise(5, range(n), (parts.recipe.latents.channels, height // f, width // f)) * parts.recipe.flow.noise_scale


@torch.no_grad()
def ours(parts, encoder, prompts, start, guidance):
    "Our own sampler, with the pipelines' clamp."
    r, n = parts.recipe, len(prompts)
    states, mask = encoder.encode(prompts, r.text.tokens)
    null, null_mask = encoder.encode([""] * n, r.text.tokens)
    velocity = sample.guided(parts.model, FlowMatching(r.flow), states, mask, null, null_mask, guidance, clamp=0.05)
    return sample.euler(velocity, start, sample.grid(r.sample.steps, r.sample.shift, "diffusers"))


def theirs(pipe, parts, prompts, start, guidance, **more):
    "The pipeline. With guidance it takes one prompt a call (diffusers 0.42.1)."
    f, more = parts.recipe.latents.factor, {"output_type": "latent", **more}
    call = lambda p, x: pipe(p, latents=x, height=x.shape[2] * f, width=x.shape[3] * f, use_resolution_binning=False,
                             num_inference_steps=parts.recipe.sample.steps, guidance_scale=guidance, **more).images
    return call(prompts, start) if guidance == 1 else torch.cat([call(p, start[i:i + 1]) for i, p in enumerate(prompts)])


def load(folder, cls=None):
    pipe = (cls or diffusers.DiffusionPipeline).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: (_ for _ in ()).throw(OSError("no network in this test")))


X_PIXELS = {"flow.prediction": "x"}
V_PIXELS = {"flow.prediction": "v"}


@pytest.mark.parametrize("changes", [
    X_PIXELS, {**X_PIXELS, "flow.noise_scale": 2.0, "sample.shift": 3.0},
    {**X_PIXELS, "denoiser.bottleneck_size": 8, "denoiser.resolution_embeds": True, "denoiser.axes_dim": (4, 12)},
    V_PIXELS, {**V_PIXELS, "sample.shift": 3.0}], ids=str)
@pytest.mark.parametrize("guidance", [1, 4.0])
def test_same_images_in_pixels(tmp_path, encoder, changes, guidance):
    parts = make(**changes)
    interop.to_diffusers(parts, tmp_path / "out", encoder)
    pipe = load(tmp_path / "out", getattr(diffusers, "PRXPixelPipeline" if changes["flow.prediction"] == "x" else "PRXPipeline"))
    for height, width in ((32, 32), (32, 48)):
        start = noise(parts, 2, height, width)
        mine = ours(parts, encoder, PROMPTS, start, guidance)
        assert mine.std() > 0.1 and (mine[0] - mine[1]).abs().max() > 0.1
        assert (mine - theirs(pipe, parts, PROMPTS, start, guidance)).abs().max() < 1e-3
        if changes["flow.prediction"] == "v":         # through the identity autoencoder
            images = theirs(pipe, parts, PROMPTS, start, guidance, output_type="pt")
            assert (images - (mine / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3


KL = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
          up_block_types=("UpDecoderBlock2D",) * 2)
AUTOENCODERS = {
    "AutoencoderKL": (dict(KL, latent_channels=4), 0.3611, 0.1159),
    "AutoencoderTiny": (dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                             num_decoder_blocks=(1, 1)), 0.8, 0.2),
    "AutoencoderDC": (dict(latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8),
                           decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                           encoder_qkv_multiscales=((),) * 2, decoder_qkv_multiscales=((),) * 2), 0.41, 0.0),
}


def in_latents(folder, kind, **changes):
    args, scale, shift = AUTOENCODERS[kind]
    torch.manual_seed(2)
    getattr(diffusers, kind)(**args).save_pretrained(folder / kind)
    return make(**{"latents.autoencoder": str(folder / kind), "latents.channels": 4, "latents.factor": 2, "latents.scale": scale,
                   "latents.shift": shift, "denoiser.in_channels": 4, "denoiser.patch_size": 2, **changes})


@pytest.mark.parametrize("kind", AUTOENCODERS)
@pytest.mark.parametrize("guidance", [1, 3.0])
def test_same_images_in_latents(tmp_path, encoder, kind, guidance):
    parts = in_latents(tmp_path, kind)
    interop.to_diffusers(parts, tmp_path / "out", encoder)
    pipe, start = load(tmp_path / "out"), noise(parts, 2)
    assert type(pipe).__name__ == "PRXPipeline"
    mine = ours(parts, encoder, PROMPTS, start, guidance)
    assert (mine - theirs(pipe, parts, PROMPTS, start, guidance)).abs().max() < 1e-3
    images = latents.load_latents(parts.recipe.latents).decode(mine)
    got = theirs(pipe, parts, PROMPTS, start, guidance, output_type="pt")
    assert (got - (images / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3
    back = interop.from_diffusers(tmp_path / "out")
    for name in ("channels", "factor", "scale", "shift"):
        assert getattr(back.recipe.latents, name) == getattr(parts.recipe.latents, name)
    same = latents.load_latents(back.recipe.latents)
    torch.testing.assert_close(same.decode(mine), images)


@pytest.mark.parametrize("how,gain", [("channel", 5.0), ("scalar", 0.5), (None, 5.0)])
def test_same_images_in_normalised_latents(tmp_path, encoder, how, gain):
    parts = in_latents(tmp_path, "AutoencoderKL")
    x = torch.rand(6, 3, 16, 16, generator=stream(0, "few")) * 2 - 1
    own = latents.with_statistics(parts.recipe.latents.autoencoder, x, tmp_path / "own")
    change = {"latents.autoencoder": str(own), "latents.normalize": how, "latents.gain": gain}
    change |= {"latents.scale": 1.0, "latents.shift": 0.0} if how else {}
    parts = interop.Parts(parts.model, parts.recipe.replace(change))
    interop.to_diffusers(parts, tmp_path / "out", encoder)
    pipe, start = load(tmp_path / "out"), noise(parts, 2)
    mine = latents.load_latents(parts.recipe.latents).decode(ours(parts, encoder, PROMPTS, start, 1))
    got = theirs(pipe, parts, PROMPTS, start, 1, output_type="pt")
    assert (got - (mine / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3
    back = interop.from_diffusers(tmp_path / "out").recipe
    assert (back.latents.normalize, back.latents.gain) == (None, 1.0)
    there = latents.load_latents(back.latents)
    torch.testing.assert_close(there.encode(x), latents.load_latents(parts.recipe.latents).encode(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind,how", [("AutoencoderKL", "whitened"), ("AutoencoderDC", "channel")])
def test_normalisation_without_a_place_is_refused(tmp_path, encoder, kind, how):
    parts = in_latents(tmp_path, kind)
    x = torch.rand(6, 3, 16, 16, generator=stream(0, "few")) * 2 - 1
    own = latents.with_statistics(parts.recipe.latents.autoencoder, x, tmp_path / "own")
    change = {"latents.autoencoder": str(own), "latents.normalize": how, "latents.scale": 1.0, "latents.shift": 0.0}
    with pytest.raises(interop.InteropError, match=f"normalize = '{how}' of an {kind} cannot be exported.*train with 'scalar'"):
        interop.to_diffusers(interop.Parts(parts.model, parts.recipe.replace(change)), tmp_path / "out", encoder)
    assert not (tmp_path / "out").exists()


def test_identity_autoencoder_changes_nothing():
    model = interop.identity_autoencoder()
    x = torch.randn(2, 3, 20, 12, generator=stream(0, "x")) * 3
    with torch.no_grad():
        torch.testing.assert_close(model.decode(x).sample, x, atol=5e-6, rtol=1e-6)
        torch.testing.assert_close(model.encode(x).latent_dist.sample(), x, atol=5e-6, rtol=1e-6)
        flat = torch.full((1, 3, 8, 8), -0.37)
        torch.testing.assert_close(model.decode(flat).sample, flat, atol=1e-6, rtol=1e-6)


def test_static_encoder(tmp_path):
    table = torch.randn(40, 16, generator=stream(0, "table"))
    encoder = text.TextEncoder("static", "static", text.Static(table), tokenizer())
    parts = make(**X_PIXELS)
    interop.to_diffusers(parts, tmp_path / "out", encoder)
    pipe, start = load(tmp_path / "out"), noise(parts, 2)
    assert type(pipe.text_encoder).__name__ == "T5EncoderModel"
    for guidance in (1, 3.0):
        mine = ours(parts, encoder, PROMPTS, start, guidance)
        assert (mine - theirs(pipe, parts, PROMPTS, start, guidance)).abs().max() < 1e-3


def test_prompt_cleaning(tmp_path, encoder):
    parts = make(**V_PIXELS)
    interop.to_diffusers(parts, tmp_path / "out", encoder)
    pipe, start, awkward = load(tmp_path / "out"), noise(parts, 1), ["a Red (big) heart"]
    mine = ours(parts, encoder, awkward, start, 3.0)
    assert (mine - theirs(pipe, parts, awkward, start, 3.0, skip_text_cleaning=True)).abs().max() < 1e-3
    assert (mine - theirs(pipe, parts, awkward, start, 3.0)).abs().max() > 1e-2        # the default changes the prompt
    cleaned = [pipe.text_preprocessor.clean_text(awkward[0])]
    assert cleaned == ["a red big heart"]
    assert (ours(parts, encoder, cleaned, start, 3.0) - theirs(pipe, parts, awkward, start, 3.0)).abs().max() < 1e-3
    plain = ["a red heart on white"]
    assert (ours(parts, encoder, plain, start, 3.0) - theirs(pipe, parts, plain, start, 3.0)).abs().max() < 1e-3


def test_pipeline_draws_its_own_noise_at_the_recipes_scale(tmp_path, encoder):
    for changes in ({**X_PIXELS, "flow.noise_scale": 2.0}, X_PIXELS, V_PIXELS):
        parts = make(**changes)
        pipe = load(interop.to_diffusers(parts, tmp_path / "out", encoder))
        options = dict(num_inference_steps=4, guidance_scale=1.0, output_type="latent", use_resolution_binning=False)
        got = pipe(PROMPTS, generator=torch.Generator().manual_seed(1), **options).images      # the default size, too
        start = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * parts.recipe.flow.noise_scale
        assert (ours(parts, encoder, PROMPTS, start, 1) - got).abs().max() < 1e-3


def test_tokenizer_that_pads_on_the_left_or_not_at_all(tmp_path):
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]",
                                                 padding_side="left", model_max_length=64)
    encoder, parts = text.TextEncoder("left", "left", bert(), words), make(**X_PIXELS)
    pipe, start = load(interop.to_diffusers(parts, tmp_path / "out", encoder)), noise(parts, 2)
    mine = ours(parts, encoder, PROMPTS, start, 1)
    assert (mine - theirs(pipe, parts, PROMPTS, start, 1)).abs().max() < 1e-3
    assert words.padding_side == "left" and words.pad_token is None and words.model_max_length == 64    # not written to


def test_denoiser_is_diffusers_own(tmp_path, encoder):
    parts = make(**V_PIXELS)
    interop.to_diffusers(parts, tmp_path / "out", encoder)
    other = diffusers.PRXTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    other.load_state_dict(parts.model.state_dict(), strict=True)
    assert dict(other.config)["axes_dim"] == [8, 8]
    with open(tmp_path / "out" / "transformer" / "config.json") as f:
        assert not {"bottleneck_size", "resolution_embeds"} & set(json.load(f))
    assert {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md", ".txt"}


def test_readme_works_as_written(tmp_path, encoder):
    for changes in (X_PIXELS, V_PIXELS):
        interop.to_diffusers(make(**changes), tmp_path / "out", encoder)
        card = (tmp_path / "out" / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("path/of/this/folder", str(tmp_path / "out"))
        names = {}
        exec(code, names)
        assert names["image"].size == (32, 32) and len(code.strip().splitlines()) == 3


@pytest.mark.parametrize("changes", [X_PIXELS, V_PIXELS, {**X_PIXELS, "flow.noise_scale": 2.0}], ids=str)
def test_back_again(tmp_path, encoder, changes):
    parts = make(**changes)
    out = interop.to_diffusers(parts, tmp_path / "out", encoder)
    back = interop.from_diffusers(out)
    assert back.recipe == parts.recipe.replace("text.encoder", str(out / "text_encoder"))
    assert all(v.equal(back.model.state_dict()[k]) for k, v in parts.model.state_dict().items())
    again = text.load_text_encoder(back.recipe.text.encoder, "cpu")             # the recipe can be trained from
    states, mask = again.encode(PROMPTS, 8)
    want, want_mask = encoder.encode(PROMPTS, 8)
    assert mask.equal(want_mask) and torch.allclose(states, want, atol=1e-5)


@pytest.mark.parametrize("pixel", [True, False])
def test_a_strangers_folder(tmp_path, encoder, pixel):
    "Written by diffusers itself, in several weight files, without our recipe."
    torch.manual_seed(3)
    transformer = diffusers.PRXTransformer2DModel(in_channels=3 if pixel else 4, patch_size=2, context_in_dim=16, hidden_size=32,
                                                  num_heads=2, depth=2, axes_dim=[4, 12], mlp_ratio=2.0)
    words = tokenizer()
    words.model_max_length = 20
    common = dict(transformer=transformer, text_encoder=bert(), tokenizer=words, default_sample_size=64,
                  scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    if pixel:
        pipe = diffusers.PRXPixelPipeline(**common, prompt_max_tokens=12, noise_scale=1.5)
    else:
        pipe = diffusers.PRXPipeline(**common, vae=diffusers.AutoencoderKL(**KL, latent_channels=4, scaling_factor=0.3, shift_factor=0.1))
    pipe.save_pretrained(tmp_path / "p", max_shard_size="40KB")
    assert len(list((tmp_path / "p" / "transformer").glob("*.safetensors"))) > 1
    parts = interop.from_diffusers(tmp_path / "p")
    r = parts.recipe
    assert r.flow.prediction == ("x" if pixel else "v") and r.sample.shift == 3.0 and r.data.size == 64
    assert r.text.tokens == (12 if pixel else 20) and r.flow.noise_scale == (1.5 if pixel else 1.0)
    assert r.denoiser.axes_dim == (4, 12) and r.denoiser.mlp_ratio == 2.0
    assert (r.latents.scale, r.latents.shift, r.latents.factor) == ((1.0, 0.0, 1) if pixel else (0.3, 0.1, 2))
    x, t = torch.randn(2, r.latents.channels, 8, 12, generator=stream(0, "x")), torch.tensor([0.3, 0.9])
    states, mask = interop.load_encoder(tmp_path / "p").encode(PROMPTS, 12)
    with torch.no_grad():
        want = transformer(x, t, states, attention_mask=mask).sample
        assert (parts.model(x, t, states, mask).prediction - want).abs().max() < 1e-4


def test_identity_is_recognised_in_a_strangers_folder(tmp_path, encoder):
    out = interop.to_diffusers(make(**V_PIXELS), tmp_path / "out", encoder)
    (out / "prx_nb.json").unlink()
    r = interop.from_diffusers(out).recipe
    assert r.latents == recipe.Latents() and r.flow.prediction == "v"


def test_research_names_round_trip():
    model = make(**{"denoiser.bottleneck_size": 8, "denoiser.resolution_embeds": True}).model
    state = model.state_dict()
    there = interop.to_research(state)
    changed = {k for k in there if k not in state}
    assert changed == {f"blocks.{i}.{n}" for i in range(2) for n in (
        "img_qkv_proj.weight", "txt_kv_proj.weight", "qk_norm.query_norm.scale", "qk_norm.key_norm.scale", "k_norm.scale",
        "attn_out.weight")}
    for prefix in ("state.model.denoiser.", "denoiser.", ""):
        checkpoint = {prefix + k: v for k, v in there.items()}
        checkpoint |= {prefix + k: torch.zeros(1) for k in ("sprint_fuse.weight", "sprint_mask_token")}
        checkpoint |= {"state.model.ema_denoiser.model." + k: torch.zeros(1) for k in there}
        checkpoint |= {"state.model.repa_loss.projector.weight": torch.zeros(1)}
        back = interop.from_research(checkpoint)
        assert back.keys() == state.keys() and all(back[k] is state[k] or back[k].equal(state[k]) for k in state)
        PRX(**model.config).load_state_dict(back, strict=True)


@pytest.mark.parametrize("changes,says", [
    ({"flow.prediction": "eps"}, "'eps' cannot be exported"),
    ({"flow.path": "vp"}, "linear path only"),
    ({**X_PIXELS, "flow.clamp": 0.1}, r"flow.clamp = 0.1 .*max\(t, 0.05\)"),
    ({**V_PIXELS, "flow.noise_scale": 2.0}, "flow.noise_scale = 2.0"),
    ({**X_PIXELS, "latents.autoencoder": "a/b", "latents.factor": 8}, "in the latents of 'a/b'")])
def test_what_no_pipeline_can_sample_is_refused(tmp_path, changes, says):
    r = make().recipe.replace(changes)
    with pytest.raises(interop.InteropError, match=says):
        interop.to_diffusers(SimpleNamespace(recipe=r), tmp_path / "out")          # before the model is looked at
    assert not list(tmp_path.iterdir())


def test_refusals_leave_nothing_behind(tmp_path, encoder):
    parts = make(**X_PIXELS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(interop.InteropError, match="not an earlier export"):
        interop.to_diffusers(parts, tmp_path / "full", encoder)
    with pytest.raises(interop.InteropError, match="not an earlier export"):
        interop.to_diffusers(parts, tmp_path / "full" / "thesis.txt", encoder)
    parts.model.fuse = torch.nn.Linear(2, 2)
    with pytest.raises(interop.InteropError, match="no place for: fuse.weight"):
        interop.to_diffusers(parts, tmp_path / "out", encoder)
    wide = text.TextEncoder("wide", "wide", text.Static(torch.randn(40, 24)), tokenizer())
    with pytest.raises(interop.InteropError, match="gives 24 numbers a token, the denoiser takes 16"):
        interop.to_diffusers(make(**X_PIXELS), tmp_path / "out", wide)
    silent = text.TextEncoder("silent", "silent", bert(), tokenizer(special=False))
    with pytest.raises(interop.InteropError, match="no token of the empty prompt"):
        interop.to_diffusers(make(**X_PIXELS), tmp_path / "out", silent)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "thesis.txt"]


def test_flux2_and_shifted_dc_are_refused(tmp_path, encoder):
    diffusers.AutoencoderKLFlux2(**KL, latent_channels=1).save_pretrained(tmp_path / "ae")
    r = {"latents.autoencoder": str(tmp_path / "ae"), "latents.channels": 4, "latents.factor": 4, "denoiser.in_channels": 4}
    with pytest.raises(interop.InteropError, match="batch norm"):
        interop.to_diffusers(make(**r), tmp_path / "out", encoder)
    with pytest.raises(interop.InteropError, match="latents.shift = 0.3.*no place"):
        interop.to_diffusers(in_latents(tmp_path, "AutoencoderDC", **{"latents.shift": 0.3}), tmp_path / "out", encoder)


def test_interrupted_export_keeps_the_earlier_one(tmp_path, encoder, monkeypatch):
    out = interop.to_diffusers(make(**X_PIXELS), tmp_path / "out", encoder)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    monkeypatch.setattr(interop, "_write_text", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        interop.to_diffusers(make(**V_PIXELS), tmp_path / "out", encoder)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    monkeypatch.undo()
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda p, to: rename(p, to) if not p.name.endswith("part") else 1 / 0)
    with pytest.raises(ZeroDivisionError):                     # stopped between the two moves
        interop.to_diffusers(make(**V_PIXELS), tmp_path / "out", encoder)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bad_folders_are_one_clear_error(tmp_path, encoder):
    says = lambda match: pytest.raises(interop.InteropError, match=match)
    with says("no such folder"):
        interop.from_diffusers(tmp_path / "nowhere")
    with says("hub cannot give it"):
        interop.from_diffusers("no-such-owner/no-such-name")
    (tmp_path / "empty").mkdir()
    with says("not a pipeline's folder"):
        interop.from_diffusers(tmp_path / "empty")
    out = interop.to_diffusers(make(**X_PIXELS), tmp_path / "out", encoder)
    config, index = out / "transformer" / "config.json", out / "model_index.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "depth": 3}))
    with says("different denoisers"):
        interop.from_diffusers(out)
    (out / "prx_nb.json").unlink()
    with says("weights do not fit"):
        interop.from_diffusers(out)
    config.write_text(json.dumps({**told, "wings": 2}))
    with says("wings"):
        interop.from_diffusers(out)
    config.write_text(json.dumps({**told, "_class_name": "FluxTransformer2DModel"}))
    with says("FluxTransformer2DModel"):
        interop.from_diffusers(out)
    config.write_text(json.dumps(told))
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with says("cannot be read"):
        interop.from_diffusers(out)
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    with says("FluxPipeline"):
        interop.from_diffusers(out)


@pytest.mark.parametrize("kind", ["t5", "t5gemma", "clip"])
def test_other_text_encoders(tmp_path, kind):
    "Tiny random ones of the classes that hubs carry."
    torch.manual_seed(4)
    small = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    if kind == "t5":
        model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    elif kind == "clip":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, max_position_embeddings=64, eos_token_id=3))
    else:
        half = transformers.T5GemmaModuleConfig(**small, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8)
        model = transformers.T5GemmaEncoderModel(transformers.T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False))
    encoder = text.TextEncoder(kind, kind, model, tokenizer())
    parts = make(**X_PIXELS)
    interop.to_diffusers(parts, tmp_path / "out", encoder)
    pipe, start = load(tmp_path / "out"), noise(parts, 2)
    mine = ours(parts, encoder, PROMPTS, start, 3.0)
    assert (mine - theirs(pipe, parts, PROMPTS, start, 3.0)).abs().max() < 1e-3


def test_importing_does_not_import_diffusers():
    import subprocess
    import sys
    code = "import sys, prx_nb.core.interop; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
