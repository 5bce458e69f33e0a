"Contrastive flow matching: who is whose negative, the loss against its formula, its optimum, training that goes on bit for bit."
from dataclasses import replace

import pytest
import torch
from runs import CPU, same, weights

from prx_nb.core.denoiser import Output
from prx_nb.core.flow import FlowMatching, coefficients
from prx_nb.core.recipe import Flow, RecipeError, preset
from prx_nb.core.seeds import stream
from prx_nb.core.batch import Batch, add_noise, read_batch
from prx_nb.core.technique import Step, objective
from prx_nb.core.train import train
from prx_nb.lab import ablations
from prx_nb.core.technique import build
from prx_nb.techniques.contrastive import Contrastive, caption_distance, other_caption, plain, rolled

SMOKE = preset("smoke").replace({"train.steps": 8, "train.checkpoint_every": 3, "techniques.contrastive.weight": 0.1, "captions.dropout": 0.3})
CAPTION = torch.tensor([4, 4, 0, 7, 9, 0, 7, 2])
DROPPED = CAPTION == 0


def step_of(flow, caption=CAPTION, seed=0, times=(0.0, 1.0)):
    g, n = stream(seed, "step"), len(caption)
    x0, noise, prediction = torch.randn(3, n, 3, 4, 4, generator=g, dtype=torch.float64)
    t = times[0] + (times[1] - times[0]) * torch.rand(n, generator=g, dtype=torch.float64)
    batch = Batch(torch.arange(n), x0, torch.zeros(n, 1, 1), torch.ones(n, 1).bool(), caption == 0, noise, t, caption, seed=seed)
    return Step(batch, flow.mix(x0, noise, t), Output(prediction.float().requires_grad_()), flow, 0)


@pytest.mark.parametrize("seed", range(20))
def test_negatives_have_another_caption_and_all_are_equally_likely(seed):
    g = stream(seed, "batch")
    caption = torch.randint(0, int(torch.randint(1, 9, (), generator=g)), (12,), generator=g)
    dropped = (caption == 0) & (torch.rand(12, generator=g) < 0.8)
    seen = [set() for _ in caption]
    for _ in range(400):
        for i, j in enumerate(other_caption(caption, dropped, torch.rand(12, generator=g)).tolist()):
            seen[i].add(j)
    for i in range(12):
        allowed = {j for j in range(12) if caption[j] != caption[i] and not dropped[i] and not dropped[j]} or {-1}
        assert seen[i] == allowed


def test_each_negative_is_drawn_as_often_as_the_others():
    many = torch.stack([other_caption(CAPTION, DROPPED, torch.full((8,), (k + 0.5) / 600)) for k in range(600)])
    found, times = many[:, 0].unique(return_counts=True)
    assert found.tolist() == [3, 4, 6, 7] and times.tolist() == [150] * 4
    ends = torch.stack([other_caption(CAPTION, DROPPED, torch.full((8,), v)) for v in (0.0, 1 - 2**-24)])
    assert ends[:, 0].tolist() == [3, 7], "both ends of [0, 1)"


def test_the_neighbour_is_that_of_the_public_code():
    values = torch.randn(8, 3)
    assert values[rolled(CAPTION)].equal(torch.roll(values, 1, 0))
    assert rolled(CAPTION[:1]).tolist() == [-1]


def in_loss_space(flow, said, x_t, alpha, sigma, dalpha, dsigma):
    "By hand: one sample's answer in the space of the loss."
    delta = alpha * dsigma - sigma * dalpha
    if (flow.prediction, flow.loss) == ("x", "v"):
        return (dsigma * x_t - delta * said) / sigma
    if (flow.prediction, flow.loss) == ("eps", "v"):
        return (dalpha * x_t + delta * said) / alpha
    if (flow.prediction, flow.loss) == ("v", "x"):
        return (dsigma * x_t - sigma * said) / delta
    assert flow.prediction == flow.loss
    return said


def written_out(step, other, weight):
    "Sample by sample: both the answer and the negative's velocity in the space of the loss, at this sample's time."
    flow, b, total = step.flow.flow, step.batch, 0
    for i, j in enumerate(other.tolist()):
        if j >= 0:
            path = [c[0] for c in coefficients(b.t[i:i + 1], flow.path)]
            target = {"x": b.x0[j], "eps": b.noise[j], "v": path[2] * b.x0[j] + path[3] * b.noise[j]}[flow.loss]
            answer = in_loss_space(flow, step.output.prediction[i], step.x_t[i], *path)
            total = total - weight * (answer - target).pow(2).mean()
    return total / len(b.t)


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("prediction,loss", [("v", "v"), ("x", "x"), ("eps", "eps"), ("x", "v"), ("eps", "v"), ("v", "x")])
@pytest.mark.parametrize("negatives", ["other_caption", "roll"])
def test_the_loss_is_its_formula_values_and_gradients(path, prediction, loss, negatives):
    step = step_of(FlowMatching(Flow(path=path, prediction=prediction, loss=loss, clamp=0.01)), seed=5, times=(0.1, 0.9))
    term = Contrastive(0.3, negatives)
    ours, theirs = term.loss(step), written_out(step, term.other(step.batch), 0.3)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(v, step.output.prediction, retain_graph=True)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    without = term.other(step.batch) < 0
    assert gradients[0][without].eq(0).all() and gradients[0][~without].ne(0).all()
    assert without.equal(DROPPED if negatives == "other_caption" else torch.zeros(8).bool())


@pytest.mark.parametrize("prediction,loss", [("v", "v"), ("x", "v"), ("eps", "v"), ("x", "x"), ("v", "eps")])
def test_with_oneself_as_the_negative_it_is_minus_the_flow_loss_also_where_the_divisor_is_clamped(prediction, loss):
    flow = FlowMatching(Flow(prediction=prediction, loss=loss, clamp=0.3))
    step, term = step_of(flow), Contrastive(0.3)
    term.other = lambda batch: torch.arange(8)
    assert (step.batch.t < 0.3).any() and (step.batch.t > 0.7).any()
    own = flow.loss(step.output.prediction, step.batch.x0, step.batch.noise, step.batch.t).mean()
    torch.testing.assert_close(term.loss(step).double(), -0.3 * own.double(), rtol=1e-5, atol=1e-6)


def test_for_x_prediction_it_is_the_public_codes_term_where_nothing_is_clamped():
    "There: prediction and target as (x_t - x) / max(t, 0.05), the targets rolled by one, one mean over everything."
    step = step_of(FlowMatching(Flow(prediction="x", loss="v")), times=(0.06, 1.0))
    t = step.batch.t.clamp_min(0.05).view(-1, 1, 1, 1)
    velocity = lambda x: (step.x_t - x) / t
    public = -0.05 * (velocity(step.output.prediction) - torch.roll(velocity(step.batch.x0), 1, 0)).square().mean()
    torch.testing.assert_close(Contrastive(0.05, "roll").loss(step).double(), public, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.05, 0.5, 0.9])
def test_its_optimum_is_the_stretched_and_shifted_velocity(weight):
    "At (v - weight * mean) / (1 - weight) the gradient vanishes, the curvature is that of (1 - weight) squares, and it can be taken back."
    flow, n, ids = FlowMatching(), 6, torch.arange(1, 7)
    step, term = step_of(flow, ids), Contrastive(weight)
    b = step.batch
    v = (b.noise - b.x0).float()
    mean = (v.sum(0) - v) / (n - 1)
    best = ((v - weight * mean) / (1 - weight)).requires_grad_()

    def expected(answer):
        at, losses = replace(step, output=Output(answer)), [flow.loss(answer, b.x0, b.noise, b.t).mean()]
        for k in range(1, n):
            term.other = lambda batch, k=k: torch.arange(n).roll(k)
            losses.append(term.loss(at) / (n - 1))
        return sum(losses)
    slope = torch.autograd.grad(expected(best), best, create_graph=True)[0]
    assert slope.abs().max() < 1e-6
    curve = torch.autograd.grad((slope * torch.ones_like(slope)).sum(), best)[0]
    torch.testing.assert_close(curve, torch.full_like(curve, 2 * (1 - weight) / v.numel()), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(plain(best.detach(), mean, weight), v, rtol=1e-4, atol=1e-4)
    assert expected(best) < expected(v) and expected(best) < expected(best + 0.1)


@pytest.mark.parametrize("caption", [torch.zeros(4).long(), torch.full((4,), 3), torch.tensor([5])], ids=["all dropped", "one caption", "one sample"])
@pytest.mark.parametrize("negatives", ["other_caption", "roll"])
def test_without_negatives_it_adds_nothing(caption, negatives):
    step = step_of(FlowMatching(), caption)
    loss = Contrastive(0.5, negatives).loss(step)
    gradient = torch.autograd.grad(loss, step.output.prediction)[0]
    nothing = negatives == "other_caption" or len(caption) == 1
    assert bool(loss == 0) == bool((gradient == 0).all()) == nothing


def test_bad_settings_are_one_clear_error():
    for arguments in ((1.0,), (-0.1,), (float("nan"),), (0.1, "nearest")):
        with pytest.raises(ValueError, match="a weight from 0 to below 1.*negatives one of other_caption, roll"):
            Contrastive(*arguments)
    with pytest.raises(RecipeError, match="techniques.contrastive.weight' = 1.0: should be less than 1"):
        SMOKE.replace("techniques.contrastive.weight", 1.0)
    with pytest.raises(RecipeError, match="techniques.contrastive.negatives' = 'nearest': should be 'other_caption' or 'roll'"):
        SMOKE.replace("techniques.contrastive.negatives", "nearest")
    with pytest.raises(ValueError, match="needs batch.caption"):
        Contrastive(0.1).loss(replace(step_of(FlowMatching()), batch=replace(step_of(FlowMatching()).batch, caption=None)))


def test_the_recipe_builds_it():
    term, = build(SMOKE.replace({"techniques.contrastive.negatives": "roll", "techniques.contrastive.start": 2, "techniques.contrastive.stop": 5}), None)
    assert (term.weight, term.negatives, [term.acts(i) for i in (1, 2, 4, 5)]) == (0.1, "roll", [False, True, True, False])
    assert build(SMOKE.replace("techniques.contrastive.weight", 0.0), None) == []


def test_in_a_real_step_it_acts_on_the_batch_and_writes_nothing_into_it(prepared):  # noqa: F811
    batch = add_noise(read_batch(prepared, SMOKE, 3), SMOKE, 3, CPU)
    before = {k: v.clone() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}

    class Net(torch.nn.Module):
        def forward(self, x_t, t, text, mask, **more):
            return Output(x_t * 0.5)
    term = Contrastive(0.1)
    losses = objective(Net(), batch, FlowMatching(SMOKE.flow), [term], 3)
    other = term.other(batch)
    assert (other < 0).equal(batch.dropped) and (batch.caption[other] != batch.caption)[other >= 0].all()
    step = Step(batch, FlowMatching(SMOKE.flow).mix(batch.x0, batch.noise, batch.t), None, FlowMatching(SMOKE.flow), 3)
    theirs = written_out(replace(step, output=Output(step.x_t * 0.5)), other, 0.1)
    torch.testing.assert_close(losses["Contrastive"], theirs)
    assert all(v.equal(before[k]) for k, v in vars(batch).items() if isinstance(v, torch.Tensor))
    later = term.other(replace(batch, step=4))
    assert not later.equal(other) and term.other(batch).equal(other), "drawn anew each step, and the same when the step is repeated"


def test_training_goes_on_bit_for_bit(prepared, tmp_path, monkeypatch):  # noqa: F811
    whole = train(SMOKE, tmp_path / "whole", prepared=prepared, progress=False)
    assert (whole.curves[whole.curves.name == "loss Contrastive"].value < 0).all()
    assert not weights(whole)["model.img_in.weight"].equal(
        weights(train(SMOKE.replace("techniques.contrastive.weight", 0.0), tmp_path / "plain", prepared=prepared, progress=False))["model.img_in.weight"])
    real = Contrastive.loss

    def stumble(self, step):
        if step.number == 5:
            raise KeyboardInterrupt
        return real(self, step)
    with monkeypatch.context() as patch:
        patch.setattr(Contrastive, "loss", stumble)
        with pytest.raises(KeyboardInterrupt):
            train(SMOKE, tmp_path / "again", prepared=prepared, progress=False)
    same(train(SMOKE, tmp_path / "again", prepared=prepared, progress=False), whole)


def test_caption_distance_of_a_network_that_obeys_and_one_that_does_not(prepared):  # noqa: F811
    batch = add_noise(read_batch(prepared, SMOKE, 0), SMOKE, 0, CPU)
    other = other_caption(batch.caption, batch.dropped, batch.random("x"))

    def net(obeys):
        return lambda x, t, text, mask: Output(x + (text.mean((1, 2)).view(-1, 1, 1, 1) if obeys else 0))
    flow = FlowMatching(SMOKE.flow)
    found = caption_distance(net(True), batch, other, flow)
    said = batch.text.mean((1, 2))
    own = flow.mix(batch.x0, batch.noise, batch.t) + said.view(-1, 1, 1, 1)
    expected = (said - said[other]).abs() * own[0].numel() ** 0.5 / own.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, expected.masked_fill(other < 0, float("nan")), equal_nan=True, rtol=1e-4, atol=1e-6)
    assert caption_distance(net(False), batch, other, flow).nan_to_num().eq(0).all() and (found[other >= 0] > 0).all()


@pytest.mark.parametrize("size", ["smoke", "cpu", "gpu"])
def test_the_ablations_variants_are_the_technique_at_its_weights(size):
    ablation = ablations.get("contrastive")
    branch = {v: ablations.recipe(ablation, v, size).techniques.contrastive for v in ablation.variants}
    assert {v: (c.weight, c.negatives) for v, c in branch.items()} == {
        "plain": (0.0, "other_caption"), "contrastive": (0.05, "other_caption"), "strong": (0.2, "other_caption"), "roll": (0.05, "roll")}
