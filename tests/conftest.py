"""Fixtures that tests of several files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def unchanged_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line silences its libraries for the whole process; undone after each test."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """This process as the only tensor-parallel rank."""
    from lirpa_megatron.parallel import runtime

    with runtime.session():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
