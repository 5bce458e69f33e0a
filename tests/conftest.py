"Settings for all tests, made before torch or a tokenizer is imported."
import os
import signal

import pytest

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
for name, value in {
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

# Tests mean the processor: a GPU, and other results, are for those in tests/gpu, which `make test-gpu` runs.
REHEARSE = os.environ.get("PRX_NB_TEST_GPU") == "rehearse"      # tests/gpu on the processor, to see that they run
GPU = REHEARSE or os.environ.get("PRX_NB_TEST_GPU") == "1"
if (REHEARSE or not GPU) and os.path.exists("/dev/nvidiactl"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Started in the background, a shell has this process ignore Ctrl-C, and its children inherit that. Tests send it for real.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    "Threads are shared among the workers, who inherit this: two workers of two threads on two cores wait for each other."
    workers = int(getattr(config.option, "numprocesses", None) or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // workers)))


@pytest.fixture(scope="module")
def prepared(request):
    "The data of a test file's own recipe, `SMOKE`."
    from prx_nb.core.batch import prepare
    return prepare(request.module.SMOKE, progress=False)


@pytest.fixture(scope="module")
def whole(request, prepared, tmp_path_factory):
    "That recipe trained without a disturbance, on the processor."
    from prx_nb.core.train import train
    return train(request.module.SMOKE, tmp_path_factory.mktemp("whole"), prepared=prepared, progress=False, device="cpu")


def pytest_collection_modifyitems(items):
    "What needs a card is skipped with a word where there is none; with one, nothing else is run beside it."
    import torch
    there = REHEARSE or GPU and torch.cuda.is_available()
    why = "there is no GPU here" if GPU else "needs a GPU: make test-gpu"
    for item in items:
        if item.get_closest_marker("gpu") and not there:
            item.add_marker(pytest.mark.skip(reason=why))
        elif GPU and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="means the processor: make test"))
