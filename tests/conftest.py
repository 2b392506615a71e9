"""The device of the tests: a GPU of sm_80 or newer if there is one, else a CPU and the interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before anything imports `kernels`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU of sm_80 or newer"))


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every tensor that is allocated and not written holds NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
