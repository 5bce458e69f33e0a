"""The training loop: exact resume after real kills, checkpoints, validation, techniques, faults."""
import json
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from runs import CPU, plain, same, strike, weights

from prx_nb.core import captions
from prx_nb.core import train as training
from prx_nb.core.checkpoint import CheckpointError, find_checkpoint, new_state, read_checkpoint, restore, save_checkpoint
from prx_nb.core.denoiser import PRX, Route
from prx_nb.core.flow import FlowMatching
from prx_nb.core.recipe import preset
from prx_nb.core.text import TextError
from prx_nb.core.batch import add_noise, prepare, read_batch
from prx_nb.core.technique import Needs, Technique, objective
from prx_nb.core.train import NonFiniteLoss, Run, optimise, train, validate, validation_set

SMOKE = preset("smoke").replace({"train.steps": 10, "train.checkpoint_every": 3, "train.validate_every": 5, "captions.kind": "mixed"})


@pytest.mark.parametrize("at,when,sig", [(1, "before", signal.SIGKILL), (4, "after", signal.SIGKILL), (6, "before", signal.SIGINT)],
                         ids=["killed before the first checkpoint", "killed between checkpoints", "interrupted"])
def test_a_killed_run_goes_on_bit_for_bit(at, when, sig, whole, prepared, tmp_path):
    strike(SMOKE, tmp_path, at, when, sig)
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert (record["status"], record["cause"]) == (("interrupted", "KeyboardInterrupt") if sig == signal.SIGINT else ("running", None))
    if sig == signal.SIGINT:
        kept = pd.read_parquet(tmp_path / "run/curves.parquet")
        assert kept[kept.name == "loss flow"].step.tolist() == list(range(1, at + 1)), "every step before it"
    said = train(SMOKE, tmp_path / "run", prepared=prepared, progress=False)
    same(said, whole)
    assert said.record["status"] == "done" and said.record["cause"] is None


def test_killed_twice_at_any_moment(whole, prepared, tmp_path):
    "SIGKILL from outside, at moments nobody chose."
    SMOKE.save(tmp_path / "recipe.json")
    code = f"import sys, torch; torch.set_num_threads({torch.get_num_threads()})\n" \
           "from prx_nb.core import train as t; from prx_nb.core.recipe import load\n" \
           "print('go', flush=True); t.train(load(sys.argv[1]), sys.argv[2], progress=False)"
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "recipe.json", tmp_path / "run"], stdout=subprocess.PIPE)
        child.stdout.readline()
        before, until = set((tmp_path / "run").rglob("*")), time.time() + 60
        while set((tmp_path / "run").rglob("*")) == before and time.time() < until and child.poll() is None:
            time.sleep(0.02)
        time.sleep(0.1)
        child.kill(), child.wait()
    same(train(SMOKE, tmp_path / "run", prepared=prepared, progress=False), whole)


def test_resume_needs_every_part_of_the_state(whole, prepared, tmp_path):
    "If one tensor of the optimizer's memory is lost, the run ends elsewhere: the equality above would notice."
    state = new_state(SMOKE, CPU)
    tensors, _ = read_checkpoint(sorted((whole.dir / "checkpoint").glob("*"))[0])
    restore(state, tensors)
    assert all(v.equal(tensors[k]) for k, v in state.tensors().items()) and any("exp_avg_sq" in k for k in tensors)
    damaged = {k: v for k, v in tensors.items() if k != "model.img_in.weight"}
    with pytest.raises(RuntimeError, match="img_in.weight"):
        restore(new_state(SMOKE, CPU), damaged)


def test_finished_runs_are_not_trained_again(whole, prepared, monkeypatch):
    monkeypatch.setattr(training, "objective", lambda *a, **k: pytest.fail("trained again"))
    same(train(SMOKE, whole.dir, prepared=prepared, progress=False), whole)


def test_another_recipe_in_the_folder_is_refused_and_nothing_lost(whole, prepared):
    before = {p: p.read_bytes() for p in whole.dir.rglob("*") if p.is_file()}
    assert len(before) == 6
    with pytest.raises(CheckpointError, match=r"optimizer.lr: 0.001 there, 0.002 asked for") as error:
        train(SMOKE.replace("optimizer.lr", 2e-3), whole.dir, prepared=prepared, progress=False)
    assert str(whole.dir) in str(error.value)
    assert {p: p.read_bytes() for p in whole.dir.rglob("*") if p.is_file()} == before


DAMAGE = {"truncated": lambda raw: raw[:len(raw) // 2], "empty": lambda raw: b"", "header": lambda raw: b"\xff" * 16 + raw[16:],
          "one bit": lambda raw: raw[:-1000] + bytes([raw[-1000] ^ 1]) + raw[-999:]}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(damage, whole, prepared, tmp_path, capsys):
    shutil.copytree(whole.dir, tmp_path / "run")
    last = sorted((tmp_path / "run/checkpoint").glob("*"))[-1]
    last.write_bytes(DAMAGE[damage](last.read_bytes()))
    run = train(SMOKE, tmp_path / "run", prepared=prepared, progress=False)
    same(run, whole)
    said = capsys.readouterr().out
    assert "WARNING" in said and str(last) in said and "going on from step-0000009" in said
    assert run.record["broken_checkpoints"] == [f"{last.name}.broken"] and (last.parent / f"{last.name}.broken").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_where_every_checkpoint_is_damaged_training_begins_again(damage, whole, prepared, tmp_path, capsys):
    shutil.copytree(whole.dir, tmp_path / "run")
    paths = sorted((tmp_path / "run/checkpoint").glob("*"))
    for path in paths:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Run.load(tmp_path / "run")
    assert sorted((tmp_path / "run/checkpoint").glob("*")) == paths, "who only looks changes nothing"
    run = train(SMOKE, tmp_path / "run", prepared=prepared, progress=False)
    same(run, whole)
    assert capsys.readouterr().out.count("training begins again") == len(paths) > 1
    assert run.record["broken_checkpoints"] == [f"{p.name}.broken" for p in paths] and run.record["status"] == "done"
    same(Run.load(tmp_path / "run"), whole)


def test_any_error_keeps_the_curve_and_the_cause(whole, prepared, tmp_path):
    class Fails(Technique):
        observes = True

        def loss(self, step):
            if step.number == 7:
                raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        train(SMOKE, tmp_path, prepared=prepared, progress=False, techniques=[Fails()])
    record, kept = json.loads((tmp_path / "record.json").read_text()), pd.read_parquet(tmp_path / "curves.parquet")
    assert record["status"] == "failed" and record["cause"].startswith("OSError: ") and "No space left" in record["cause"]
    first = plain(whole)
    assert kept[kept.name != "seconds"].reset_index(drop=True).equals(first[first.step <= 7].reset_index(drop=True))


def test_a_full_disk_does_not_hide_what_went_wrong(prepared, tmp_path, monkeypatch):
    class Fails(Technique):
        observes = True

        def loss(self, step):
            raise ValueError("the cause")

    def full(self):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(training.Curves, "save", full)
    with pytest.raises(ValueError, match="the cause"):
        train(SMOKE, tmp_path, prepared=prepared, progress=False, techniques=[Fails()])


def test_progress_and_seconds_are_told(whole, prepared, tmp_path, monkeypatch):
    told = json.loads((whole.dir / "progress.json").read_text())
    assert (told["step"], told["steps"]) == (10, 10) and told["seconds"] > 0 and told["at"]
    seconds = whole.curves[whole.curves.name == "seconds"]
    assert seconds.step.tolist() == [5, 10] and 0 < seconds.value.iloc[0] < seconds.value.iloc[1]
    assert seconds.value.iloc[1] <= whole.record["cost"]["train_seconds"]

    def refuse(*a):
        raise OSError("no")
    monkeypatch.setattr("prx_nb.core.record.os.replace", refuse)
    from prx_nb.core.record import Progress
    Progress(tmp_path, 5).tell(1, 0.1)
    assert not (tmp_path / "progress.json").exists()


def test_a_checkpoint_without_a_recipe_is_damaged_and_one_of_a_newer_version_is_refused(prepared, tmp_path):
    from safetensors.torch import save_file
    state = new_state(SMOKE, CPU)
    save_file({"a": torch.zeros(2)}, tmp_path / "step-0000001.safetensors")
    with pytest.raises(CheckpointError, match="no step, seconds and recipe"):
        find_checkpoint(tmp_path, SMOKE)
    path = save_checkpoint(tmp_path, 2, state, SMOKE, 1.0)
    tensors, header = read_checkpoint(path)
    tree = json.loads(header["recipe"]) | {"unheard_of": {"x": 1}}
    save_file(tensors, path, header | {"recipe": json.dumps(tree)})
    with pytest.raises(CheckpointError, match="does not know"):
        find_checkpoint(tmp_path, SMOKE, mend=True)
    assert path.exists()


def test_an_output_folder_that_cannot_be_written_is_noticed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda *a, **k: pytest.fail("prepared first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the folder"):
        train(SMOKE, tmp_path / "file" / "run", progress=False)


def test_a_text_encoder_of_another_width_is_one_clear_error():
    recipe = SMOKE.replace("denoiser.context_in_dim", 100)
    with pytest.raises(TextError, match="gives 384 numbers a token, but denoiser.context_in_dim = 100"):
        prepare(recipe, progress=False)


def test_loss_that_is_not_finite_stops_the_run(prepared, tmp_path):
    recipe = SMOKE.replace({"optimizer.lr": 1e18, "optimizer.clip": 1e18, "optimizer.warmup": 0, "train.checkpoint_every": 1})
    with pytest.raises(NonFiniteLoss, match=rf"at step \d+ of recipe {recipe.key}"):
        train(recipe, tmp_path, prepared=prepared, progress=False)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "failed" and "not finite" in record["cause"]
    assert len(pd.read_parquet(tmp_path / "curves.parquet")), "the curve up to there is kept"


def test_a_step_equals_one_written_out_with_torch(prepared):
    "Loss, gradients, clipping, AdamW and the average of three steps, without the loop."
    recipe, flow = SMOKE.replace({"ema.decay": 0.7, "optimizer.clip": 0.05}), FlowMatching(SMOKE.flow)
    state = new_state(recipe, CPU)
    net = PRX(**recipe.denoiser.model_dump())
    net.load_state_dict(state.model.state_dict())
    peer, average = torch.optim.AdamW(net.parameters(), recipe.optimizer.lr, recipe.optimizer.betas, recipe.optimizer.eps, weight_decay=0), None
    for step in range(3):
        batch = add_noise(read_batch(prepared, recipe, step), recipe, step, CPU)
        optimise(state, objective(state.model, batch, flow, number=step), recipe, step)
        x_t = (1 - batch.t.view(-1, 1, 1, 1)) * batch.x0 + batch.t.view(-1, 1, 1, 1) * batch.noise
        loss = (net(x_t, batch.t, batch.text, batch.mask).prediction - (batch.noise - batch.x0)).square().mean()
        peer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        for p in net.parameters():
            p.grad *= min(1, 0.05 / (norm + 1e-6))
        peer.param_groups[0]["lr"] = recipe.optimizer.lr * (step + 1) / recipe.optimizer.warmup
        peer.step()
        now = [p.detach().clone() for p in net.parameters()]
        average = now if average is None else [0.7 * a + 0.3 * n for a, n in zip(average, now)]
    for a, b, c, d in zip(state.model.parameters(), net.parameters(), state.ema.module.parameters(), average):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(c, d, rtol=1e-4, atol=1e-6)


def test_without_an_average_the_run_samples_from_the_weights(prepared, tmp_path):
    run = train(SMOKE.replace({"ema.decay": 0.0, "train.steps": 3}), tmp_path, prepared=prepared, progress=False)
    assert not any(k.startswith("ema.") for k in weights(run))
    assert run.model.img_in.weight.equal(weights(run)["model.img_in.weight"])


def test_overfitting_one_batch_never_erodes_its_captions(prepared):
    "The public code writes the empty caption into the caller's batch."
    batch = read_batch(prepared, SMOKE, 0)
    before = [v.clone() for v in (batch.x0, batch.text, batch.mask)]
    net = new_state(SMOKE, CPU).model
    for step in range(5):
        noisy = add_noise(batch, SMOKE, step, CPU)
        objective(net, noisy, FlowMatching(SMOKE.flow))["flow"].backward()
    assert all(a.equal(b) for a, b in zip(before, (batch.x0, batch.text, batch.mask)))


def test_dropped_captions_are_the_encoded_empty_one(prepared):
    recipe = SMOKE.replace("captions.dropout", 0.5)
    batch = read_batch(prepared, recipe, 1)
    null, null_mask = prepared.states.null(1)
    assert 0 < batch.dropped.sum() < len(batch.dropped)
    for i, dropped in enumerate(batch.dropped):
        assert (batch.text[i].equal(null[0]) and batch.mask[i].equal(null_mask[0])) == bool(dropped)
    assert null_mask.any() and null.abs().sum() > 0, "not zeros, and not fully masked"


def test_every_step_and_seed_has_its_own_randomness(prepared):
    batches = [add_noise(read_batch(prepared, r, step), r, step, CPU) for r in (SMOKE, SMOKE.replace("seed", 1)) for step in (0, 1)]
    for part in ("index", "noise", "t"):
        values = [getattr(b, part) for b in batches]
        assert not any(a.equal(b) for i, a in enumerate(values) for b in values[:i]), part
    dropped = torch.stack([read_batch(prepared, SMOKE.replace("captions.dropout", 0.5), s).dropped for s in range(8)])
    assert dropped.any(0).all() and not dropped.all(0).any()


def test_mixed_captions_use_every_kind(prepared):
    kinds = prepared.rows.shape[1]
    assert kinds == 3
    wanted = {tuple(prepared.texts[i]) for i in read_batch(prepared, SMOKE, 0).index.tolist()}
    assert all(len(set(texts)) == 3 for texts in wanted)


@pytest.mark.parametrize("kind", ["short", "long", "mixed"])
def test_questions_are_the_same_whatever_was_trained_on(kind, prepared):
    "A run trained on short captions is validated on the same prompts as one trained on dense ones; their states are there."
    other, recipe = prepare(SMOKE.replace("captions.kind", kind), progress=False), SMOKE.replace("captions.kind", kind)
    assert other.asked == prepared.asked == [captions.caption(i, "dense") for i in prepared.images.items]
    for a, b in zip(validation_set(prepared, SMOKE, CPU), validation_set(other, recipe, CPU)):
        assert all(getattr(a, k).equal(getattr(b, k)) for k in ("index", "x0", "text", "mask", "noise", "t"))
    states, mask = other.states.lookup([other.asked[i] for i in other.heldout])
    assert mask.any(1).all()
    b = validation_set(other, recipe, CPU)[0]
    assert b.text.equal(other.states.lookup([other.asked[i] for i in b.index])[0])
    assert prepare(recipe.replace("evaluate.captions", "short"), progress=False).asked == [i.label for i in prepared.images.items]


def test_validation_is_fixed_and_in_the_space_of_v(prepared):
    net = PRX(**SMOKE.denoiser.model_dump())
    x = SMOKE.replace({"flow.prediction": "x", "flow.loss": "x", "seed": 5})
    first, second = validation_set(prepared, SMOKE, CPU), validation_set(prepared, x, CPU)
    assert all(a.noise.equal(b.noise) and a.t.equal(b.t) for a, b in zip(first, second))
    zero = torch.cat([(b.x0 / b.t.clamp_min(0.05).view(-1, 1, 1, 1)).square().flatten(1).mean(1) for b in second])   # it answers 0
    assert validate(net, second, FlowMatching(x.flow))["val"] == pytest.approx(zero.mean().item(), rel=1e-5)
    held = set(prepared.heldout.tolist())
    assert all(i in held for b in first for i in b.index.tolist()) and held.isdisjoint(prepared.split.train.tolist())


class Shrink(Technique):
    "A technique with a weight of its own, a tap, and a time to act."
    start, stop = 2, 8

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(SMOKE.denoiser.hidden_size, 1)
        torch.nn.init.ones_(self.head.weight), torch.nn.init.zeros_(self.head.bias)

    def needs(self, batch, step):
        keep = torch.arange(8).expand(len(batch.t), -1)
        return Needs((1,), Route(keep, 1, 1))

    def loss(self, step):
        assert step.output.taps[1].shape[1] == step.output.kept.shape[1] == 8
        return 0.1 * self.head(step.output.taps[1]).square().mean()


def test_techniques_are_trained_scheduled_checkpointed_and_resumed(prepared, tmp_path, whole):
    a = train(SMOKE, tmp_path / "a", prepared=prepared, progress=False, techniques=[Shrink()])
    steps = a.curves[a.curves.name == "loss Shrink"].step.tolist()
    assert steps == [3, 4, 5, 6, 7, 8], "numbered from 1 in curves, from 0 in schedules"
    assert not weights(a)["techniques.Shrink.head.weight"].equal(torch.ones(1, SMOKE.denoiser.hidden_size))

    class Stumble(Shrink):
        def loss(self, step):
            if step.number == 7:
                raise KeyboardInterrupt
            return super().loss(step)
    Stumble.__name__ = Stumble.__qualname__ = "Shrink"          # the same in a recipe
    with pytest.raises(KeyboardInterrupt):
        train(SMOKE, tmp_path / "b", prepared=prepared, progress=False, techniques=[Stumble()])
    same(train(SMOKE, tmp_path / "b", prepared=prepared, progress=False, techniques=[Shrink()]), a)


def test_two_routes_are_refused(prepared):
    batch = add_noise(read_batch(prepared, SMOKE, 3), SMOKE, 3, CPU)
    with pytest.raises(ValueError, match="only one can"):
        objective(new_state(SMOKE, CPU).model, batch, FlowMatching(), [Shrink(), Shrink()], 3)


def test_trackers_get_the_numbers(prepared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = train(SMOKE, tmp_path, prepared=prepared, progress=False, trackers=["tensorboard"])
    files = [p for p in tmp_path.rglob("events.out.*")]
    seen = {}
    for f in files:
        events = EventAccumulator(str(f)).Reload()
        seen |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    val = run.curves[run.curves.name == "val"]
    assert [s for s, _ in seen["val"]] == val.step.tolist() == [5, 10]
    assert [v for _, v in seen["val"]] == pytest.approx(val.value.tolist())
    loss = run.curves[run.curves.name == "loss flow"].set_index("step").value
    assert [v for _, v in seen["loss flow"]] == pytest.approx([loss[5], loss[10]])


def test_plain_lines_when_not_on_a_terminal(prepared, tmp_path, capfd):
    train(SMOKE, tmp_path, prepared=prepared, progress=True)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 10 and "loss flow" in lines[-1] and "10/10" in lines[-1] and "\r" not in "".join(lines)


def test_a_run_without_weights_or_recipe_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="recipe.json"):
        Run.load(tmp_path)
    SMOKE.save(tmp_path / "recipe.json")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Run.load(tmp_path)


def test_record_says_what_it_took(whole):
    record = whole.record
    assert record["recipe_key"] == SMOKE.key and record["hardware"] and record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["deterministic"] is True, "a CPU always is"
    cost = record["cost"]
    assert cost["images_seen"] == SMOKE.train.steps * SMOKE.train.batch and cost["parameters"] == sum(p.numel() for p in whole.model.parameters())
    assert cost["train_seconds"] > 0 and cost["peak_memory_mb"] > 50
    assert cost["flops_step"] > 0 and (cost["energy_joules"] is None) == (cost["energy_source"] is None)
    assert record["metrics"]["val"] == whole.curves[whole.curves.name == "val"].value.iloc[-1]


def test_peak_memory_sees_a_block_of_240_megabytes():
    code = "import numpy as np, torch; from prx_nb.core.train import peak_memory; a = peak_memory(torch.device('cpu')); " \
           "b = np.ones(30_000_000); print(peak_memory(torch.device('cpu')) - a)"
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 200 < grown < 300
