"Vision encoders against independent forward passes, finite differences, and what they refuse."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prx_nb.core import encoders, files

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def effnet():
    return encoders.load_vision_encoder("effnet-lite0", device="cpu")


@pytest.fixture(scope="module")
def vit():
    return encoders.load_vision_encoder("vit-s14", device="cpu")


def drawing(n=2, side=32, seed=0):
    "Smooth random images in [-1, 1]."
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(n, 3, 4, 4, generator=g) * 2 - 1, (side, side), mode="bilinear")


def functional_effnet(x):
    "The same network written a second time, straight from the file's own names; no folding, explicit padding."
    w = torch.load(files.fetch(encoders._EFFNET), map_location="cpu", weights_only=True)

    def conv(x, name, norm, stride=1, groups=1, rectify=True):
        k = w[f"{name}.weight"].shape[-1]
        out = [-(-n // stride) for n in x.shape[-2:]]
        pad = [max((o - 1) * stride + k - n, 0) for o, n in zip(out, x.shape[-2:])]
        x = F.pad(x, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
        x = F.conv2d(x, w[f"{name}.weight"], stride=stride, groups=groups)
        x = F.batch_norm(x, w[f"{norm}.running_mean"], w[f"{norm}.running_var"], w[f"{norm}.weight"], w[f"{norm}.bias"], eps=1e-3)
        return x.clamp(0, 6) if rectify else x

    x, maps = conv(x, "_conv_stem", "_bn0", 2), []
    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    for i in range(16):
        b, y, s = f"_blocks.{i}.", x, strides.get(i, 1)
        if f"{b}_expand_conv.weight" in w:
            y = conv(y, f"{b}_expand_conv", f"{b}_bn0")
        y = conv(y, f"{b}_depthwise_conv", f"{b}_bn1", s, y.shape[1])
        y = conv(y, f"{b}_project_conv", f"{b}_bn2", rectify=False)
        x = x + y if x.shape == y.shape else y
        maps.append(x)
    return maps, conv(x, "_conv_head", "_bn1").mean((2, 3))


def test_effnet_equals_a_second_writing(effnet):
    x = drawing(2, 128)
    with torch.no_grad():
        maps, pooled = functional_effnet((x * 127.5 + 0.5) / 128)          # bytes 0..255, mean 127, deviation 128
        ours = effnet.features(x, list(effnet.taps))
        got = effnet.pooled(x)
    for tap, block, stride in zip(effnet.taps, (0, 2, 4, 10, 15), (2, 4, 8, 16, 32)):
        assert ours[tap].shape == (2, effnet.taps[tap], 128 // stride, 128 // stride)
        torch.testing.assert_close(ours[tap], maps[block], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got, pooled, rtol=1e-3, atol=1e-3)


def test_vit_equals_a_second_writing(vit):
    "Against plain torch that reads the ONNX arrays by itself."
    import onnx
    graph = onnx.load(str(files.fetch(encoders._VIT))).graph
    arrays = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    matrix = {n.name: arrays[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays}
    p = "backbone.embeddings."
    x = F.interpolate(drawing(2), (126, 126), mode="bilinear", antialias=True)
    x = F.conv2d(((x + 1) / 2 - MEAN) / STD, arrays[p + "patch_embeddings.projection.weight"],
                 arrays[p + "patch_embeddings.projection.bias"], stride=14).flatten(2).transpose(1, 2)
    place = next(a for a in arrays.values() if a.shape == (1, 1369, 384)).view(1, 37, 37, 384).permute(0, 3, 1, 2)
    first = next(a for n, a in arrays.items() if a.shape == (1, 1, 384) and not n.startswith("backbone"))
    x = x + F.interpolate(place, (9, 9), mode="bicubic").flatten(2).transpose(1, 2)
    x = torch.cat([(arrays[p + "cls_token"] + first).expand(2, -1, -1), x], 1)
    norm = lambda v, n: F.layer_norm(v, (384,), arrays[n + ".weight"], arrays[n + ".bias"], 1e-6)
    for i in range(12):
        b, m = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/"
        lin = lambda v, n, b=b, m=m: v @ matrix[m + n + "/MatMul"] + arrays[b + n.replace("/", ".") + ".bias"]
        y = norm(x, b + "norm1")
        q, k, v = (lin(y, f"attention/attention/{n}").view(2, -1, 6, 64).transpose(1, 2) for n in ("query", "key", "value"))
        y = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + arrays[b + "layer_scale1.lambda1"] * lin(y, "attention/output/dense")
        y = lin(F.gelu(lin(norm(x, b + "norm2"), "mlp/fc1")), "mlp/fc2")
        x = x + arrays[b + "layer_scale2.lambda1"] * y
        if i == 8:
            ninth = norm(x, "backbone.layernorm")[:, 1:].transpose(1, 2).unflatten(2, (9, 9))
    last = norm(x, "backbone.layernorm")[:, 1:].transpose(1, 2).unflatten(2, (9, 9))
    with torch.no_grad():
        ours = vit.features(drawing(2), ["block9", "block12"])
    torch.testing.assert_close(ours["block9"], ninth, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours["block12"], last, rtol=1e-3, atol=1e-3)


def test_gradient_with_respect_to_the_image():
    encoder = encoders.load_vision_encoder("effnet-lite0", size=32, device="cpu")
    encoder.model.double()
    x = drawing(1, 16).double().requires_grad_()
    encoder.prepare = lambda im: (F.interpolate(im, (32, 32), mode="bilinear", antialias=True) * 127.5 + 0.5) / 128
    loss = lambda im: encoder.features(im, ["tap2"])["tap2"].square().mean() + encoder.pooled(im).mean()
    gradient, = torch.autograd.grad(loss(x), x)
    g = torch.Generator().manual_seed(3)
    for _ in range(4):
        way = torch.randn(x.shape, generator=g, dtype=torch.double)
        with torch.no_grad():
            slope = (loss(x + 1e-6 * way) - loss(x - 1e-6 * way)) / 2e-6
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-4, atol=1e-7)


def test_gradient_passes_the_preprocessing(effnet, vit):
    for encoder in (effnet, vit):
        x = drawing(1).requires_grad_()
        encoder.pooled(x).square().mean().backward()
        assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.9
        assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training


def test_images_in_the_wrong_range_show(effnet):
    "An inverted image is another image, and bytes do not get in."
    x = drawing(4)
    with torch.no_grad():
        a, b = effnet.pooled(x), effnet.pooled(-x)
    assert (F.cosine_similarity(a, b) < 0.9).all()
    for wrong in ((x * 127).byte(), x[:, :1], x[0]):
        with pytest.raises(encoders.EncoderError, match="floating point images"):
            effnet.pooled(wrong)
    with pytest.raises(encoders.EncoderError, match="no tap 'tap6'"):
        effnet.features(x, ["tap6"])


def test_means_and_maps_agree(effnet, vit):
    x = drawing(3)
    with torch.no_grad():
        for encoder, tap in ((effnet, "tap4"), (vit, "block5")):
            both = encoder.means(x, ("pooled", tap))
            torch.testing.assert_close(both["pooled"], encoder.pooled(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(both[tap], encoder.features(x, [tap])[tap].mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert both["pooled"].shape == (3, vit.dim)


def test_control_is_always_the_same(vit):
    a, b = (encoders.load_vision_encoder("random-vit-s14", device="cpu") for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    assert a.key == b.key != vit.key and a.taps == vit.taps
    assert encoders.load_vision_encoder("effnet-lite0", size=64).key != encoders.load_vision_encoder("effnet-lite0").key


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3", "vit"])
def test_any_vision_transformer(kind, tmp_path, monkeypatch):
    import transformers as tr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4, image_size=36)
    cls = {"dinov2": (tr.Dinov2Config, tr.Dinov2Model), "dinov3": (tr.DINOv3ViTConfig, tr.DINOv3ViTModel),
           "dinov2_with_registers": (tr.Dinov2WithRegistersConfig, tr.Dinov2WithRegistersModel), "vit": (tr.ViTConfig, tr.ViTModel)}
    config, model = cls[kind]
    model = model(config(**small)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    encoder = encoders.load_vision_encoder(str(tmp_path), device="cpu")
    assert encoder.taps == {"block1": 24, "block2": 24} and encoder.size == 36
    x = drawing(2, 36)
    with torch.no_grad():
        theirs = model(pixel_values=x / 2 / 0.25).last_hidden_state[:, -81:]
        torch.testing.assert_close(encoder.features(x, ["block2"])["block2"].flatten(2).mT, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.pooled(x), theirs.mean(1), rtol=1e-4, atol=1e-5)


def test_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, words in {"effnet": "did you mean 'effnet-lite0'", "nobody/nothing": "vision encoder 'nobody/nothing'",
                        str(tmp_path): "config.json"}.items():
        with pytest.raises(encoders.EncoderError, match=words):
            encoders.load_vision_encoder(name)


def test_a_text_model_is_refused(tmp_path):
    import transformers as tr
    tr.BertModel(tr.BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
                 ).save_pretrained(tmp_path)
    with pytest.raises(encoders.EncoderError, match="no plain vision transformer"):
        encoders.load_vision_encoder(str(tmp_path))


def test_features_are_kept(effnet, tmp_path, monkeypatch):
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path))

    class Few:
        key = "few"

        def batch(self, index):
            return drawing(8)[index]
    index = torch.tensor([5, 1, 3])
    first = encoders.pooled_features(effnet, Few(), index, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(first, effnet.pooled(drawing(8)[index]), rtol=1e-3, atol=1e-4)
    both = encoders.pooled_features(effnet, Few(), index, ("pooled", "tap5"))
    assert {k: v.shape for k, v in both.items()} == {"pooled": (3, 1280), "tap5": (3, 320)}
    monkeypatch.setattr(Few, "batch", lambda *_: pytest.fail("computed again"))
    assert torch.equal(encoders.pooled_features(effnet, Few(), index), first)
    monkeypatch.undo()
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path))
    for path in tmp_path.glob("features/*"):
        path.write_bytes(path.read_bytes()[:50])                       # damaged: computed again, not fatal
    assert np.allclose(encoders.pooled_features(effnet, Few(), index, batch=2), first, atol=1e-5)
