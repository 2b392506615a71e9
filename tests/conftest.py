"""Fixtures. Tests run on a GPU of sm_80 or newer, or else on a CPU with Triton's interpreter."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before anything imports `kernels`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU of sm_80 or newer"))


@pytest.fixture(autouse=True)
def as_new() -> Iterator[None]:
    """Undoes what a training run in this process sets: signal handlers and TF32."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.backends.cuda.matmul.allow_tf32 = False
    if GPU:
        torch.cuda.empty_cache()  # parallel test workers share its memory


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, so that the test sees what a kernel forgets to write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def text() -> str:
    """About 60,000 characters with simple statistics, which a small model can learn."""
    words = "the king and queen of hearts went down to sea in a boat of ice".split()
    generator = np.random.default_rng(0)
    return "\n".join(" ".join(generator.choice(words, 8)) + "." for _ in range(1600))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """An empty folder as the working directory, with the text prepared by character as data/tiny."""
    from train.prepare import documents
    from train.prepare.encode import encode

    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "data" / "tiny", documents.text(text, "a text in memory"), "char", workers=1)
    return tmp_path
