"""Shared by all tests: no network, and tiny random models."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a test must never reach for the network

import pytest  # noqa: E402
import torch  # noqa: E402

from model import ModelArgs, Transformer  # noqa: E402

TINY = dict(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=97, max_seq_len=4096
)  # fmt: skip


INTERPRETED = "test_kernels_under_the_interpreter"


def waits(item) -> bool:
    """Whether a test waits for what `kernel_tests` or `programs` has started before the first."""
    return item.name == INTERPRETED or "runs" in item.fixturenames


def pytest_collection_modifyitems(items):
    """Those last."""
    items.sort(key=waits)


@pytest.fixture(scope="session", autouse=True)
def kernel_tests(request):
    """(process, file of its output): test_kernels.py under Triton's interpreter; None where it is not asked for.

    The interpreter is chosen for a whole process, when Triton is imported, and takes minutes of one core: it has the
    other one to itself while the tests here run.
    """
    if not any(item.name == INTERPRETED for item in request.session.items):
        yield None
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", Path(__file__).with_name("test_kernels.py")], env=environment,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield process, output
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session", autouse=True)
def programs(request, kernel_tests, tmp_path_factory):
    """A function of a name: how that run of test_tp.py's programs ended. They take minutes, and run one after another
    beside the tests here, once `kernel_tests` has left them a core; two at a time where it is not asked for."""
    if not any("runs" in item.fixturenames for item in request.session.items):
        yield None
        return
    from test_tp import program_runs

    pool = ThreadPoolExecutor(1 if kernel_tests else 2)
    try:
        if kernel_tests:
            pool.submit(kernel_tests[0].wait)
        jobs = program_runs(tmp_path_factory.mktemp("programs"))
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        yield lambda name: futures[name].result()
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def tiny():
    """A factory of random float32 models; keywords change ModelArgs, `seed` the weights.

    The weights are large enough that logits lie units apart, so that greedy decoding meets no near ties.
    """

    def make(seed: int = 0, **changes) -> Transformer:
        generator = torch.Generator().manual_seed(seed)
        model = Transformer(ModelArgs(**TINY | changes))
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
            else:
                std = 0.5 if name == "tok_embeddings.weight" else 2.0 * weight.shape[-1] ** -0.5
                weight.data = std * torch.randn(weight.shape, generator=generator)
        return model.requires_grad_(False).eval()

    return make


@pytest.fixture(scope="module")
def one_thread():
    """Threads wait for each other where cores are shared, and so small a model gains little from them."""
    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes of their own
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS")
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before
