"""Fixtures that tests of several files use."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from forks import share_cores

HEAVIEST = (
    "test_exactness", "test_transformers", "test_stages", "test_cli", "test_packaging",
    "test_stage_job", "test_forward", "test_transformer_soundness", "test_sentence_soundness",
    "test_adapters", "test_transformer_gradients", "test_soundness",
    "test_language_model_checkpoints", "test_hybrid_models", "test_activation_ops",
    "test_onnx_transformers", "test_complete_sharded", "test_complete", "test_transformer_ops",
    "test_unstable", "test_hugging_face", "test_planes", "test_specifications", "test_complete_job",
    "test_function_networks", "test_forward_sharded", "test_product_op", "test_job",
    "test_rounding_language", "test_spmd", "test_layers", "test_stage_networks",
    "test_gpt2_example", "test_job_resume", "test_wide_transformers", "test_gradients",
    "test_plain_modules", "test_mnist_fc", "test_forward_stages", "test_host_operators",
    "test_onnx_operators", "test_functions", "test_perturbed_tokens", "test_same_radius",
    "test_rounding_curves", "test_rounding", "test_input_splits", "test_split_jobs",
    "test_bridge_checkpoints", "test_training", "test_onnx_normalisation", "test_live_megatron",
    "test_language_margins", "test_traffic",
)
"""Files of more than 3 s of processor time, the heaviest first: the two workers of `make test` then
end at about the same time."""


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would begin with the files that have the most tests.
    config.option.loadscopereorder = False
    share_cores()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    # All libraries are imported here. The collector would go through them again and again, and has
    # nothing to find in them later.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


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


@pytest.fixture
def double() -> Iterator[None]:
    """float64 by default, and the same random numbers in every run."""
    import torch

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
