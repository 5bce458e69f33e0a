"Small trainings, and what the tests of many rooms do with them."
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from prx_nb.core.checkpoint import find_checkpoint
from prx_nb.core.denoiser import PRX, Route
from prx_nb.core.recipe import Recipe
from prx_nb.core.seeds import stream
from prx_nb.core.technique import Technique
from prx_nb.core.train import Run

CPU = torch.device("cpu")
TECHNIQUES = {                   # what a recipe says to have one technique or choice on, smoke-sized
    "repa": {"techniques.repa.weight": 0.5},
    "irepa": {"techniques.repa.weight": 0.5, "techniques.repa.projector": "conv", "techniques.repa.spatial_norm": "scalar"},
    "contrastive": {"techniques.contrastive.weight": 0.05},
    "x": {"flow.prediction": "x", "denoiser.bottleneck_size": 16},
    "tread": {"techniques.tread.rate": 0.5},
    "sprint": {"techniques.sprint.rate": 0.75, "denoiser.fusion": [1, None]},
    "perceptual": {"techniques.perceptual.weight": 0.1, "techniques.perceptual.size": 32},
    "p_dino": {"techniques.p_dino.weight": 0.01, "techniques.p_dino.encoder": "effnet-lite0", "techniques.p_dino.taps": ["tap5"],
               "techniques.p_dino.size": 32, "techniques.p_dino.one_in": 2},
    "muon": {"optimizer.name": "muon"},
    "bf16": {"train.weights": "bf16"},
    "augment_label": {"data.augment": ["flip", "crop"], "techniques.augment_label.words": 1},
    "average": {"ema.decay": None, "ema.half_life": 3.0, "ema.also": [1.0, 8.0]},
}


def weights(run: Run) -> dict[str, torch.Tensor]:
    "Everything in the last checkpoint: weights, average, optimizer, techniques."
    return find_checkpoint(run.dir / "checkpoint", run.recipe)[0]


def plain(run: Run) -> pd.DataFrame:
    "The curves without the seconds they took."
    return run.curves[run.curves.name != "seconds"].reset_index(drop=True)


def same(a: Run, b: Run) -> None:
    "To the last bit."
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [k for k in first if not first[k].equal(second[k])] == []
    assert plain(a).equals(plain(b))


CHILD = """
import os, signal, sys, torch
torch.set_num_threads({threads})
from prx_nb.core import train as t
from prx_nb.core.recipe import load
real = t.optimise
def optimise(state, losses, recipe, step, *more):
    if step == {at} and {when!r} == "before": os.kill(os.getpid(), {sig})
    norm = real(state, losses, recipe, step, *more)
    if step == {at} and {when!r} == "after": os.kill(os.getpid(), {sig})
    return norm
t.optimise = optimise
t.train(load(sys.argv[1]), sys.argv[2], progress=False)
"""


def strike(recipe: Recipe, folder: Path, at: int, when: str = "before", sig: int = signal.SIGKILL) -> Path:
    "Train in a process of its own that gets a signal at a step; the folder it leaves."
    recipe.save(folder / "recipe.json")
    code = CHILD.format(threads=torch.get_num_threads(), at=at, when=when, sig=int(sig))
    done = subprocess.run([sys.executable, "-c", code, folder / "recipe.json", folder / "run"], capture_output=True, text=True, timeout=120)
    assert done.returncode == -sig if sig == signal.SIGKILL else done.returncode != 0, done.stderr
    return folder / "run"


class Stops(Technique):
    "Interrupts a training at a step."
    observes = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def loss(self, step):
        if step.number == self.at:
            raise KeyboardInterrupt


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    "Weights of which none is zero or one, as some of a fresh network are."
    for i, p in enumerate(net.parameters()):
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.7 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1, generator=stream(seed, "p", i))
    return net


def inputs(h: int = 16, w: int = 24) -> tuple[torch.Tensor, ...]:
    "Random image, time, text and mask for a denoiser of 3 channels that reads states of 24 numbers; captions of 7, 3 and 1 tokens."
    g = stream(0, "inputs")
    x, t, text = torch.randn(3, 3, h, w, generator=g), torch.rand(3, generator=g), torch.randn(3, 7, 24, generator=g)
    return x, t, text, torch.arange(7) < torch.tensor([7, 3, 1])[:, None]


def operations(recipe: Recipe, route: Route | None = None) -> tuple[float, float]:
    "Forward and backward operations of a real pass on the processor: linear layers by hooks, attention from its shapes."
    model, total = PRX(**recipe.denoiser.model_dump()), [0, 0]

    def linear(layer, args, out):
        work = 2 * out.numel() * layer.in_features
        total[0] += work
        total[1] += work * (1 + args[0].requires_grad)

    def attention(layer, args, out):
        x, text = args[:2]
        work = 2 * 2 * x.shape[0] * x.shape[1] * (x.shape[1] + text.shape[1]) * x.shape[2]
        total[0] += work
        total[1] += 2 * work

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(linear)
    for block in model.blocks:
        block.attention.register_forward_hook(attention)
    b, side, tokens = recipe.train.batch, recipe.data.size, recipe.text.tokens
    model(torch.randn(b, 3, side, side), torch.rand(b), torch.randn(b, tokens, recipe.denoiser.context_in_dim), torch.ones(b, tokens).bool(), route=route)
    return tuple(total)
