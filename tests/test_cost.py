"Counting a step's operations and reading energy counters."
import sys
import threading
import time
import types

import pytest
import torch
from runs import operations

from prx_nb.core import recipe as recipes
from prx_nb.core.cost import Energy, flops_parts, flops_step
from prx_nb.core.denoiser import PRX

SMALL = {"data.size": 16, "denoiser.patch_size": 2, "denoiser.hidden_size": 24, "denoiser.num_heads": 2, "denoiser.depth": 3, "denoiser.axes_dim": (4, 8),
         "denoiser.mlp_ratio": 2.5, "denoiser.context_in_dim": 10, "text.tokens": 7, "train.batch": 3}


@pytest.mark.parametrize("change", [{}, {"denoiser.bottleneck_size": 5}, {"denoiser.resolution_embeds": True}, {"train.batch": 5, "text.tokens": 4}])
def test_count_is_that_of_the_layers_that_run(change):
    recipe = recipes.Recipe().replace(SMALL | change)
    forward, back = operations(recipe)
    assert flops_parts(recipe)[""] == forward
    assert flops_step(recipe) == forward + back
    assert forward * 2.5 < flops_step(recipe) < forward * 3


def test_count_follows_shapes():
    recipe = recipes.Recipe().replace(SMALL)
    assert flops_step(recipe.replace("train.batch", 6)) == 2 * flops_step(recipe)
    assert flops_step(recipe, text_tokens=9) == flops_step(recipe.replace("text.tokens", 9)) > flops_step(recipe)
    latents = {"latents.autoencoder": "some/autoencoder", "latents.factor": 8, "latents.channels": 4, "denoiser.in_channels": 4}
    assert flops_step(recipe.replace(latents | {"data.size": 128})) == flops_step(recipe.replace(latents | {"data.size": 64, "latents.factor": 4}))
    assert flops_step(recipe.replace("flow.prediction", "x")) == flops_step(recipe)


def test_count_leaves_the_world_as_it_was():
    recipe, state = recipes.Recipe().replace(SMALL), torch.get_rng_state()
    before = flops_step(recipe)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() and torch.zeros(1).device.type == "cpu"
    with torch.no_grad():
        assert flops_step(recipe) == before
    assert PRX(**recipe.denoiser.model_dump())(torch.randn(1, 3, 16, 16), torch.rand(1), torch.randn(1, 4, 10)).prediction.isfinite().all()


# --- energy

def zone(root, path, name, energy, turn=999):
    folder = root / path
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", turn)):
        (folder / "part").write_text(f"{value}\n")
        (folder / "part").replace(folder / file)                   # a real counter is never seen half written


def test_packages_and_memory_count_once(tmp_path):
    def draw(a, b, d):
        zone(tmp_path, "intel-rapl:0", "package-0", a)
        zone(tmp_path, "intel-rapl:1", "package-1", b)
        zone(tmp_path, "intel-rapl:0:2", "dram", d)
        zone(tmp_path, "intel-rapl:0:0", "core", a)
        zone(tmp_path, "intel-rapl:0:1", "uncore", b)
        zone(tmp_path, "intel-rapl:2", "psys", a + b + d)
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", a)
    draw(10, 20, 30)
    with Energy("cpu", tmp_path) as meter:
        assert meter.joules == 0 and meter.source == "rapl"
        draw(110, 220, 330)
        assert meter.joules == pytest.approx(600e-6)
        draw(111, 220, 330)
    draw(500, 500, 500)                                            # after the end
    assert meter.joules == pytest.approx(601e-6) and meter.source == "rapl"


def test_a_counter_that_turns_over_several_times(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 900)
    with Energy("cpu", tmp_path, look=0.01) as meter:
        for value in (400, 901, 399, 399):                         # 500, 501, 498 (of a range of 1000), 0
            zone(tmp_path, "intel-rapl:0", "package-0", value)
            meter.joules                                           # noqa: B018  a look
    assert meter.joules == pytest.approx(1499e-6)


def test_someone_looks_while_nobody_asks(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = Energy("cpu", tmp_path, look=0.01).start()
    try:
        for value in (600, 100):                                   # unseen, this would be 100
            (tmp_path / "part").write_text(str(value))
            (tmp_path / "part").replace(tmp_path / "intel-rapl:0" / "energy_uj")
            until = time.monotonic() + 20
            while meter._counter.last != [value] and time.monotonic() < until:
                time.sleep(0.005)
        assert meter._counter.total == 1100
    finally:
        assert meter.stop() == pytest.approx(1100e-6)
    until = time.monotonic() + 20
    while any(t.name == "energy" for t in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.005)
    assert not any(t.name == "energy" for t in threading.enumerate())


def test_no_counter_is_none_and_costs_nothing(tmp_path):
    for root in (tmp_path / "none", tmp_path):
        with Energy("cpu", root) as meter:
            pass
        assert meter.joules is None and meter.source is None
    zone(tmp_path, "intel-rapl:0", "package-0", "not a number")
    with Energy("cpu", tmp_path) as meter:
        pass
    assert meter.joules is None and meter.source is None
    assert Energy("cpu", tmp_path).joules is None                  # never started


def test_a_counter_that_goes_away_is_none(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with Energy("cpu", tmp_path) as meter:
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.joules is None and meter.source is None


def test_an_error_inside_passes_through(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with pytest.raises(KeyError), Energy("cpu", tmp_path) as meter:
        zone(tmp_path, "intel-rapl:0", "package-0", 9)
        raise KeyError
    assert meter.joules == pytest.approx(4e-6)


@pytest.mark.parametrize("uuid", ["1234-ab", "GPU-1234-ab"])
def test_gpu_by_its_uuid(monkeypatch, uuid):
    "A pretend NVML whose first GPU is CUDA's second."
    energy = {"GPU-1234-ab": 5_000, "GPU-other": 77}
    fake = types.SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda u: u if u in energy else 1 / 0,
                                 nvmlDeviceGetTotalEnergyConsumption=energy.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(uuid=uuid))
    with Energy("cuda:1") as meter:
        energy["GPU-1234-ab"] += 2_500
    energy["GPU-1234-ab"] += 2_500
    assert meter.joules == 2.5 and meter.source == "nvml"


def test_gpu_without_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)               # the import fails
    with Energy("cuda") as meter:
        pass
    assert meter.joules is None and meter.source is None


def test_the_real_binding_has_these_names():
    pynvml = pytest.importorskip("pynvml")
    assert all(callable(getattr(pynvml, n)) for n in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"))
    with Energy("cpu") as meter:                                   # whatever this machine has
        pass
    assert (meter.joules is None) == (meter.source is None)
