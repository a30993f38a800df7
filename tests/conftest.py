"""Fixtures that tests of several files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

HEAVIEST = (
    "test_exactness", "test_gradients", "test_cli", "test_packaging", "test_sentence_soundness",
    "test_adapters", "test_language_model_checkpoints", "test_transformers", "test_product_op",
    "test_activation_ops", "test_planes", "test_rounding_language", "test_hostile_checkpoints",
    "test_function_networks", "test_layers", "test_perturbed_tokens", "test_bad_input",
)
"""Files to begin with: none is left to one of the two workers of `make test` at the end."""


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would begin with the files that have the most tests.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(HEAVIEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


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
