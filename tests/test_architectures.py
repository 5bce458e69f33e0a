"Four other networks behind the denoiser's signature: against diffusers' whole modules, trained, resumed, refused."
import copy

import pytest
import torch
import torch.nn.functional as F
from runs import Stops
from torch import nn

from prx_nb.choices import architectures as choice
from prx_nb.core import average, batch, interop, optimizers
from prx_nb.core import recipe as recipes
from prx_nb.core.checkpoint import new_state
from prx_nb.core.cost import flops_parts, flops_step, least_memory
from prx_nb.core.denoiser import KINDS, PRX, Network, Route, build_network, compile_blocks
from prx_nb.core.files import write_json
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.seeds import stream
from prx_nb.core.train import Run, train
from prx_nb.lab import ablations, explore, identity

NAMES = ("dit", "dit_air", "mmdit", "uvit")
TINY = dict(in_channels=3, patch_size=2, context_in_dim=24, hidden_size=32, num_heads=2, depth=5)
SMOKE = preset("smoke").replace({"denoiser.depth": 3, "denoiser.mlp_ratio": 4.0, "train.steps": 20,
                                 "train.checkpoint_every": 10, "train.validate_every": 10})


def asked(kind, **changes):
    return SMOKE.replace({"denoiser.kind": kind, **changes})


def wild(kind, seed=0, **sizes):
    "With weights that are not small."
    settings = TINY | sizes
    net = choice.UViT(7, 12, **settings) if kind == "uvit" else KINDS[kind](**settings)
    for p in net.parameters():
        nn.init.normal_(p, float(p.ndim == 1), 0.15, generator=stream(seed, "wild", p.numel()))
    return net


def inputs(seed=0, words=7):
    g = stream(seed, "in")
    return torch.randn(2, 3, 6, 8, generator=g), torch.rand(2, generator=g), torch.randn(2, words, 24, generator=g)


def qkv(theirs, ours, *names):
    for name, part in zip(names, zip(*(p.chunk(len(names)) for p in ours.parameters()))):
        for k, p in zip(("weight", "bias"), part):
            setattr(getattr(theirs, name), k, nn.Parameter(p))


def mlp(theirs, ours):
    theirs.net[0].proj, theirs.net[2] = ours.up_proj, ours.down_proj


def by_rows(linear):
    "Our patches run channel, row, column; theirs row, column, channel."
    moved = copy.deepcopy(linear)
    for p, q in zip(moved.parameters(), linear.parameters()):
        p.data = q.data.unflatten(0, (3, 2, 2)).movedim(0, 2).flatten(0, 2)
    return moved


def front(theirs, net):
    "Patches and time in; no added places on either side."
    theirs.pos_embed.proj.weight = nn.Parameter(net.img_in.weight.view(32, 3, 2, 2))
    theirs.pos_embed.proj.bias = net.img_in.bias
    theirs.pos_embed.pos_embed.zero_()


def timed(embedder, ours):
    embedder.linear_1, embedder.linear_2 = ours.in_layer, ours.out_layer


@pytest.fixture
def unturned(monkeypatch):
    "Rotary places are ours, added ones theirs: without either both must answer the same."
    monkeypatch.setattr(choice.Architecture, "turns", lambda self, *place: None)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_dit_is_diffusers_pixart(unturned, masked):
    from diffusers import PixArtTransformer2DModel
    net, (x, t, text) = wild("dit"), inputs()
    x = x[..., :6]                                                       # theirs is square
    peer = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, num_layers=5,
                                    cross_attention_dim=32, sample_size=6, caption_channels=24, use_additional_conditions=False).eval()
    front(peer, net)
    timed(peer.adaln_single.emb.timestep_embedder, net.time_in)
    peer.adaln_single.linear, peer.scale_shift_table = net.modulation, nn.Parameter(net.table.view(2, 32))
    peer.caption_projection.linear_1, peer.caption_projection.linear_2 = net.txt_in[0], net.txt_in[2]
    peer.proj_out = by_rows(net.proj_out)
    for theirs, ours in zip(peer.transformer_blocks, net.blocks):
        qkv(theirs.attn1, ours.attention.qkv_proj, "to_q", "to_k", "to_v")
        qkv(theirs.attn2, ours.cross.q_proj, "to_q")
        qkv(theirs.attn2, ours.cross.kv_proj, "to_k", "to_v")
        for a, b in ((theirs.attn1, ours.attention), (theirs.attn2, ours.cross)):
            a.norm_q, a.norm_k, a.to_out[0] = b.norm_q, b.norm_k, b.to_out
        mlp(theirs.ff, ours.mlp)
        theirs.scale_shift_table = nn.Parameter(ours.table.view(6, 32))
    mask = torch.arange(7) < torch.tensor([[7], [3]]) if masked else None
    found = peer(x, encoder_hidden_states=text, timestep=1000 * t, encoder_attention_mask=None if mask is None else mask.float()).sample
    torch.testing.assert_close(net(x, t, text, mask).prediction, found, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1


@torch.no_grad()
def test_mmdit_is_diffusers_stable_diffusion_3(unturned):
    from diffusers import SD3Transformer2DModel
    net, (x, t, text) = wild("mmdit"), inputs()
    x = x[..., :6]
    peer = SD3Transformer2DModel(sample_size=6, patch_size=2, in_channels=3, num_layers=5, attention_head_dim=16, num_attention_heads=2,
                                 joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=8, out_channels=3,
                                 pos_embed_max_size=3, qk_norm="rms_norm").eval()
    front(peer, net)
    timed(peer.time_text_embed.timestep_embedder, net.time_in)
    for p in peer.time_text_embed.text_embedder.parameters():
        p.zero_()                                                        # their pooled caption, which ours has not
    peer.context_embedder, peer.proj_out = net.txt_in, by_rows(net.final_layer.linear)
    swapped = lambda linear, like: [nn.Parameter(torch.cat(p.chunk(2)[::-1])) for p in linear.parameters()]
    peer.norm_out.linear.weight, peer.norm_out.linear.bias = swapped(net.final_layer.adaLN_modulation[1], peer)
    for theirs, ours in zip(peer.transformer_blocks, net.blocks):
        a, i, w = theirs.attn, ours.image, ours.text
        qkv(a, i.attention.qkv_proj, "to_q", "to_k", "to_v")
        a.norm_q, a.norm_k, a.to_out[0] = i.attention.norm_q, i.attention.norm_k, i.attention.to_out
        theirs.norm1.linear = i.modulation.lin
        mlp(theirs.ff, i.mlp)
        if ours.last:
            qkv(a, w.kv_proj, "add_k_proj", "add_v_proj")
            a.norm_added_k = w.norm_k
            theirs.norm1_context.linear.weight, theirs.norm1_context.linear.bias = swapped(w.modulation, peer)
            continue
        qkv(a, w.attention.qkv_proj, "add_q_proj", "add_k_proj", "add_v_proj")
        a.norm_added_q, a.norm_added_k, a.to_add_out = w.attention.norm_q, w.attention.norm_k, w.attention.to_out
        theirs.norm1_context.linear = w.modulation.lin
        mlp(theirs.ff_context, w.mlp)
    found = peer(x, encoder_hidden_states=text, pooled_projections=torch.zeros(2, 8), timestep=1000 * t).sample
    torch.testing.assert_close(net(x, t, text).prediction, found, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1


@torch.no_grad()
def test_the_trunk_of_uvit_is_diffusers(monkeypatch):
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel
    net, (x, t, text) = wild("uvit"), inputs()
    peer = UTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=3, num_layers=4, sample_size=8, activation_fn="gelu",
                               block_type="plain", pre_layer_norm=True).eval()
    blocks = [*peer.transformer_in_blocks, peer.transformer_mid_block, *(b["block"] for b in peer.transformer_out_blocks)]
    for theirs, ours in zip(blocks, net.blocks, strict=True):
        qkv(theirs.attn1, ours.attention.qkv_proj, "to_q", "to_k", "to_v")
        a = theirs.attn1
        a.norm_q, a.norm_k, a.to_out[0] = ours.attention.norm_q, ours.attention.norm_k, ours.attention.to_out
        mlp(theirs.ff, ours.mlp)
        theirs.norm1, theirs.norm3 = ours.norm1, ours.norm2
    for theirs, ours in zip(peer.transformer_out_blocks, net.blocks[3:]):
        theirs["skip"].skip_linear, theirs["skip"].norm = ours.skip_linear, nn.Identity()        # UniDiffuser's own
    peer.norm_out, seen = net.norm_out, []
    net.proj_out.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    net(x, t, text)
    row, _ = net.lay(net.img_in(F.unfold(x, 2, stride=2).mT), net.txt_in(text), net.time(t))
    found = peer(row, hidden_states_is_embedding=True, unpatchify=False, return_dict=False)[0]
    torch.testing.assert_close(seen[0], found[:, 8:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dit_air_is_mmdit_with_the_same_weights_for_both_streams():
    air, (x, t, text) = wild("dit_air", depth=2), inputs()
    two = wild("mmdit", depth=2)
    two.blocks[1] = choice.JointBlock(32, 2, 4.0)                        # a last block like the others
    for name in ("img_in", "txt_in", "time_in", "final_layer"):
        setattr(two, name, getattr(air, name))
    for ours, theirs in zip(air.blocks, two.blocks):
        for s in (theirs.image, theirs.text):
            s.attention, s.mlp, s.modulation.lin = ours.attention, ours.mlp, air.modulation
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    torch.testing.assert_close(air(x, t, text, mask).prediction, two(x, t, text, mask).prediction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NAMES)
def test_every_weight_hears_of_the_loss_and_every_word_of_the_mask(kind):
    net, (x, t, text) = wild(kind), inputs()
    mask, text = torch.arange(7) < torch.tensor([[7], [3]]), text.requires_grad_()
    for net.checkpointing in (False, True):
        net.zero_grad(), setattr(text, "grad", None)
        net(x, t, text, mask).prediction.square().mean().backward()
        still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert still == [] and text.grad[~mask].eq(0).all() and text.grad[mask].abs().sum(1).gt(0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("start,end", [(0, 3), (1, 1), (1, 3), (2, 3), (0, 4)])
def test_a_token_off_the_route_does_not_touch_those_on_it(kind, start, end):
    net, (x, t, text) = wild(kind), inputs()
    keep = torch.tensor([[0, 3, 5], [1, 2, 11]])
    all_of_them = net(x, t, text, route=Route(torch.arange(12).expand(2, -1), start, end)).prediction
    torch.testing.assert_close(all_of_them, net(x, t, text).prediction, rtol=1e-4, atol=1e-4)
    routed = lambda images: net(images, t, text, route=Route(keep, start, end), taps=tuple(range(5)))
    out, gone = routed(x), torch.ones(2, 12, dtype=torch.bool).scatter(1, keep, False)
    assert [out.taps[i].shape[1] for i in range(5)] == [3 if start <= i <= end else 12 for i in range(5)]
    patches = F.unfold(x, 2, stride=2).mT
    moved = F.fold(torch.where(gone[..., None], patches + 1, patches).mT, (6, 8), 2, stride=2)
    same = routed(moved).taps[end].allclose(out.taps[end], atol=1e-5)
    assert same == (start == 0), "from the first block on nobody on the route ever saw them"
    nobody = net(x, t, text, route=Route(keep[:, :0], start, end), taps=(start,))
    assert nobody.taps[start].shape[1] == 0 and nobody.prediction.isfinite().all()


@pytest.mark.parametrize("kind", NAMES)
def test_compiled_blocks_answer_as_plain_ones(kind):
    net, given = wild(kind), inputs()
    quick = compile_blocks(copy.deepcopy(net), backend="eager")
    keep = torch.tensor([[0, 3, 5], [1, 2, 11]])
    for more in ({}, {"route": Route(keep, 1, 3), "taps": (2,)}):
        a, b = net(*given, **more), quick(*given, **more)
        torch.testing.assert_close(b.prediction, a.prediction, rtol=1e-4, atol=1e-5)
        assert a.taps.keys() == b.taps.keys()
    assert quick.compiled and not copy.deepcopy(quick).compiled


@pytest.mark.parametrize("kind", NAMES)
def test_it_trains_goes_on_to_the_bit_and_draws(kind, prepared, tmp_path):
    more = {"techniques.tread.rate": 0.5, "techniques.tread.first": 1} if kind in ("dit", "uvit") else {}
    r = asked(kind, **more, **({"optimizer.name": "muon"} if kind in ("mmdit", "uvit") else {}))
    run = train(r, tmp_path / "whole", progress=False, prepared=prepared, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(r, tmp_path / "halves", progress=False, prepared=prepared, device="cpu", techniques=[Stops(15)])
    halves = train(r, tmp_path / "halves", progress=False, prepared=prepared, device="cpu")
    assert all(v.equal(run.model.state_dict()[k]) for k, v in halves.model.state_dict().items())
    fresh = build_network(r).initialise(stream(r.seed, "weights")).state_dict()
    assert [k for k, v in run.model.state_dict().items() if v.equal(fresh[k])] == [], "every weight was trained"
    opened = Run.load(run.dir)
    assert type(opened.model) is KINDS[kind] and opened.recipe == r
    drawn = opened.sample(["a red apple", ""]).images
    assert drawn.equal(run.sample(["a red apple", ""]).images) and drawn.isfinite().all() and drawn.std() > 0.01


@pytest.fixture(scope="module")
def prepared():
    return batch.prepare(SMOKE, progress=False)


@pytest.mark.parametrize("kind", NAMES)
def test_muon_takes_the_matrices_of_blocks_and_the_average_all(kind):
    r = asked(kind, **{"optimizer.name": "muon", "optimizer.muon.split_qkv": True})
    state = new_state(r, torch.device("cpu"))
    muon, adamw = state.optimizer.optimizers
    taken = {id(p) for g in muon.param_groups for p in g["params"]}
    linear = {id(m.weight) for block in state.model.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    assert taken == linear and sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups) == len(list(state.model.parameters()))
    for name, p in optimizers.matrices(state.model).items():
        stacked = p.shape[0] // p.shape[1] if "kv_proj" in name else 1
        assert optimizers.maps(name) == stacked, name
    mean = average.new_average(state.model, 0.5)
    assert set(mean.module.state_dict()) == set(state.model.state_dict())


@pytest.mark.parametrize("name", recipes.PRESETS)
@pytest.mark.parametrize("kind", NAMES)
def test_the_declared_sizes_are_equal_in_parameters_and_in_operations(kind, name):
    a, prx = ablations.get("architectures"), preset(name)
    same, cost = (ablations.recipe(a, v, name) for v in (kind, f"{kind}_cost"))
    assert abs(choice.parameters(same) / choice.parameters(prx) - 1) < 0.05
    assert abs(choice.operations(cost) / choice.operations(prx) - 1) < 0.05
    for r in (same, cost):
        d = r.denoiser
        assert d.kind == kind and d.depth - prx.denoiser.depth == (kind == "uvit" and prx.denoiser.depth % 2 == 0)
        assert d.hidden_size % ((8 if name in ("gpu", "paper") else 4) * d.num_heads) == 0 and d.num_heads == prx.denoiser.num_heads


def test_sizes_follow_the_readers_own_settings_and_stand_in_files():
    a = ablations.get("architectures")
    own = {"denoiser.hidden_size": 128, "denoiser.num_heads": 4}
    r = ablations.recipe(a, "mmdit", "cpu", overrides=own)
    assert abs(choice.parameters(r) / choice.parameters(preset("cpu").replace(own)) - 1) < 0.05
    with pytest.raises(ablations.AblationError, match="'denoiser.kind' is what the ablation 'architectures' sets itself"):
        ablations.recipe(a, "mmdit", "cpu", overrides={"denoiser.kind": "dit"})
    back = ablations.from_data(ablations.as_data(a), "job.json")
    assert all(ablations.recipe(back, v, "smoke") == ablations.recipe(a, v, "smoke") for v in a.variants)


@pytest.mark.parametrize("kind", NAMES)
def test_operations_are_those_that_are_counted(kind):
    from torch.utils.flop_counter import FlopCounterMode
    r = asked(kind, **{"train.batch": 2})
    net, side = build_network(r), r.data.size
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        given = torch.randn(2, 3, side, side), torch.rand(2), torch.randn(2, r.text.tokens, 384), torch.ones(2, r.text.tokens).bool()
        net(*given).prediction.mean().backward()
    assert counter.get_total_flops() == flops_step(r) == 2 * choice.operations(r)
    parts = flops_parts(r)
    assert sum(v for k, v in parts.items() if k.count(".") == k.startswith("blocks.") and k) == parts[""] and "blocks.2" in parts
    routed = r.replace({"techniques.tread.rate": 0.5, "techniques.tread.first": 1, "techniques.tread.last": 1})
    assert flops_step(routed) < flops_step(r) and least_memory(r) < 2 * choice.kept_bytes(r) + 16 * choice.parameters(r)


@pytest.mark.parametrize("kind", NAMES)
def test_what_only_prx_has_is_refused_in_one_line(kind, tmp_path):
    r = asked(kind)
    for name, value in (("fusion", (1, None)), ("bottleneck_size", 8), ("resolution_embeds", True)):
        with pytest.raises(RecipeError, match=rf"denoiser.{name} = .* with denoiser.kind = '{kind}': only PRX has it"):
            r.replace(f"denoiser.{name}", value)
    with pytest.raises(RecipeError, match="needs denoiser.fusion"):
        r.replace("techniques.sprint.rate", 0.5)
    with pytest.raises(interop.InteropError, match=f"denoiser.kind = '{kind}' cannot be exported"):
        interop.to_diffusers(interop.Parts(build_network(r), r), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(interop.InteropError, match=f"denoiser.kind = '{kind}' cannot be exported"):
        interop.denoiser_config(r.denoiser)
    with pytest.raises(ValueError, match="only the attention of PRX is shown"):
        explore.word_maps(Run(tmp_path, r, build_network(r), {}), "a fox", torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"build_network\(recipe\) makes any"):
        PRX(**r.denoiser.model_dump())


def test_other_refusals(prepared, tmp_path):
    with pytest.raises(RecipeError, match="should be 'prx', 'dit', 'dit_air', 'mmdit' or 'uvit'.*did you mean 'mmdit'"):
        SMOKE.replace("denoiser.kind", "mmdti")
    with pytest.raises(RecipeError, match="denoiser.depth = 2 with denoiser.kind = 'uvit': a long skip needs at least 3 blocks"):
        asked("uvit", **{"denoiser.depth": 2})
    with pytest.raises(RecipeError, match="init does not fit the recipe's denoiser: blocks.0.attention.img_qkv_proj.weight"):
        train(asked("dit"), tmp_path, prepared=prepared, progress=False, init=build_network(SMOKE))
    net = build_network(asked("uvit"))
    with pytest.raises(ValueError, match="64 patches: this U-ViT has learnt the places of 16"):
        net(torch.randn(1, 3, 32, 32), torch.rand(1), torch.randn(1, 4, 384))
    with pytest.raises(ValueError, match="blocks are numbered 0 to 2"):
        net(torch.randn(1, 3, 16, 16), torch.rand(1), torch.randn(1, 4, 384), taps=(3,))


def test_prx_is_named_by_default_and_no_key_is_another():
    assert preset("cpu").key == preset("cpu").replace("denoiser.kind", "prx").key == "7078dfd2b967"
    assert len({asked(k).key for k in ("prx", *NAMES)}) == 5
    whole, changed = identity.training(asked("dit")), identity.training(SMOKE)
    assert whole != changed and identity._architecture(asked("dit")) == ["prx_nb.choices.architectures"]


OWN = '''
import torch
from prx_nb.core.denoiser import KINDS, Network, Output


@KINDS.register("affine")
class Affine(Network):
    "Answers the image, scaled and moved."
    def __init__(self, **settings):
        super().__init__()
        self.config, self.blocks = settings, torch.nn.ModuleList([torch.nn.Conv2d(3, 3, 1)])

    def initialise(self, generator):
        return self

    def forward(self, x_t, t, text, text_mask=None, *, route=None, taps=()):
        return Output(self.blocks[0](x_t))
'''


def test_a_readers_own_network_is_named_in_uses(prepared, tmp_path):
    (tmp_path / "affine.py").write_text(OWN)
    with pytest.raises(RecipeError, match="should be 'prx'"):
        SMOKE.replace("denoiser.kind", "affine")
    try:
        r = SMOKE.replace({"uses": [str(tmp_path / "affine.py")], "denoiser.kind": "affine", "train.steps": 3})
        run = train(r, tmp_path / "run", prepared=prepared, progress=False, device="cpu")
        assert isinstance(run.model, Network) and run.sample("a fox").images.isfinite().all()
        write_json(tmp_path / "r.json", r.model_dump(mode="json"))
        assert recipes.load(tmp_path / "r.json").key == r.key != SMOKE.key
    finally:
        KINDS.pop("affine", None)
