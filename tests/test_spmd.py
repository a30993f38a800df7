"""All ranks end together: an error, a disagreement, a dead rank never leave others waiting."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from forks import launch
from ranks import RankPool, pool
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize

BOUNDED_TIME = 60.0
"""Seconds within which every rank must have ended; gloo alone would wait for minutes."""


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(),
        nn.Linear(16, 3),
    )


def _ball(x, eps=0.1):
    return BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=eps))


def _input():
    return torch.linspace(-1, 1, 12).view(2, 6)


def _rank():
    from lirpa_megatron.parallel import runtime

    return runtime.tp_rank()


def _together(function, ranks=None):
    start = time.monotonic()
    outcomes = (ranks or pool(2)).outcomes(function, timeout=BOUNDED_TIME)
    assert time.monotonic() - start < BOUNDED_TIME
    return outcomes


def _be_on_several_machines():
    from lirpa_megatron.parallel import local_links

    local_links.connect = lambda *_: None


@pytest.fixture(scope="module")
def far_apart():
    """Two ranks that do not find each other's sockets, so that they talk over gloo."""
    ranks = RankPool(2)
    ranks.run(_be_on_several_machines)
    yield ranks
    ranks.close()


@pytest.fixture(params=["on one machine", "on several machines"])
def ranks(request):
    apart = request.param == "on several machines"
    return request.getfixturevalue("far_apart") if apart else pool(2)


def test_the_ranks_of_tests_order_sets_differently_as_torchruns_do():
    first, second = pool(2).run(hash, "a word")
    assert first != second


def _one_rank_raises_inside_a_pass():
    bounded = BoundedModule(parallelize(_net()), _input())
    relu = next(n for n in bounded._modules.values() if type(n).__name__ == "BoundRelu")
    if _rank() == 1:
        def broken(*args, **kwargs):
            raise MemoryError("rank 1 is out of memory")

        relu.bound_backward = broken
    bounded.compute_bounds(x=(_ball(_input()),), method="CROWN")


def test_an_error_on_one_rank_inside_a_pass_ends_all_ranks_with_its_message(ranks):
    first, second = _together(_one_rank_raises_inside_a_pass, ranks)
    assert second.error == "MemoryError"
    assert first.error == "RemoteRankError"
    assert "rank 1" in first.message and "rank 1 is out of memory" in first.message


def _one_rank_raises_while_a_collective_is_under_way():
    from lirpa_megatron.parallel import runtime, spmd
    from lirpa_megatron.parallel.collectives import Collectives

    tp = Collectives(runtime.tp_group())
    x = torch.full((2, 3), float(tp.rank))
    caught = ""
    try:
        with spmd.guard(tp.group, "a test"):
            received = tp.begin_gather_rows(x)
            if tp.rank == 1:
                raise MemoryError("rank 1 is out of memory")
            assert received()[2:].eq(1).all()  # what rank 1 gave its word for
            tp.reduce_from(x)
    except (MemoryError, RuntimeError) as error:
        caught = f"{type(error).__name__}: {error}"
    with spmd.guard(tp.group, "a test"):  # nothing is left over that the next one could meet
        later = tp.begin_reduce_to_rows(torch.ones(2 * tp.size, 3))
        tp.poll()
        total = tp.reduce_from(x)
        return caught, later().sum().item(), total.sum().item()


def test_an_error_while_a_collective_is_under_way_ends_all_ranks_and_leaves_nothing_behind(ranks):
    outcomes = _together(_one_rank_raises_while_a_collective_is_under_way, ranks)
    first, second = (outcome.value for outcome in outcomes)
    assert first[0].startswith("RemoteRankError") and "rank 1 is out of memory" in first[0]
    assert second[0].startswith("MemoryError")
    assert first[1:] == second[1:] == (12.0, 6.0)


def _one_rank_begins_another_collective():
    from lirpa_megatron.parallel import runtime, spmd
    from lirpa_megatron.parallel.collectives import Collectives

    tp = Collectives(runtime.tp_group())
    with spmd.guard(tp.group, "a test"):
        tp.begin_gather_rows(torch.ones(2 + tp.rank, 3))()


def test_ranks_that_begin_different_collectives_all_raise(ranks):
    for outcome in _together(_one_rank_begins_another_collective, ranks):
        assert outcome.error == "SPMDError" and "(2, 3)" in outcome.message


def _one_rank_raises_in_the_backward_of_autograd():
    from lirpa_megatron import guard

    bounded = BoundedModule(parallelize(_net()), _input()).train()
    with guard(bounded.context.collectives.group, "a training step"):
        lower, _ = bounded.compute_bounds(x=(_ball(_input()),), method="CROWN")
        if _rank() == 0:
            raise ValueError("loss is NaN at iteration 7")
        lower.sum().backward()


def test_a_guard_around_user_code_covers_autograd_too():
    first, second = _together(_one_rank_raises_in_the_backward_of_autograd)
    assert first.error == "ValueError"
    assert second.error == "RemoteRankError" and "NaN at iteration 7" in second.message


def _inputs_differ():
    bounded = BoundedModule(parallelize(_net()), _input())
    bounded.compute_bounds(x=(_ball(_input() + 1e-7 * _rank()),), method="CROWN")


def _methods_differ():
    bounded = BoundedModule(parallelize(_net()), _input())
    bounded.compute_bounds(x=(_ball(_input()),), method=("CROWN", "IBP")[_rank()])


def _only_one_rank_goes_on():
    bounded = BoundedModule(parallelize(_net()), _input())
    bounded.compute_bounds(x=(_ball(_input()),), method=("auto", "CROWN")[_rank()])


def _radii_differ():
    bounded = BoundedModule(parallelize(_net()), _input())
    bounded.compute_bounds(x=(_ball(_input(), 0.1 + 0.1 * _rank()),), method="IBP")


def _replicated_parameters_differ():
    net = parallelize(_net())
    if _rank() == 1:
        net[2].bias.data[0] += 1e-3
    BoundedModule(net, _input())


def _modules_differ():
    net = _net()
    net[0].weight.data[0, 0] += _rank()
    parallelize(net)


def _chunks_differ():
    options = {"max_spec_rows": 3 + _rank(), "sparse_intermediate_bounds": False}
    bounded = BoundedModule(parallelize(_net()), _input(), options)
    bounded.compute_bounds(x=(_ball(_input()),), method="CROWN")


@pytest.mark.parametrize("function, named", [
    (_inputs_differ, "input 0"),
    (_methods_differ, "method"),
    (_only_one_rank_goes_on, "keyword argument"),
    (_radii_differ, "eps of input 0"),
    (_replicated_parameters_differ, "2.bias"),
    (_modules_differ, "0.weight"),
    (_chunks_differ, "disagree"),
])
def test_what_differs_between_ranks_is_named_on_every_rank(function, named, ranks):
    for outcome in _together(function, ranks):
        assert outcome.error == "SPMDError", outcome
        assert named in outcome.message and "\n" not in outcome.message


def _long_words():
    from lirpa_megatron.parallel import runtime, spmd

    word = str(_rank()) * 100_000
    return spmd.gather_objects(word, runtime.tp_group()) == ["0" * 100_000, "1" * 100_000]


def test_what_ranks_tell_each_other_may_be_long(ranks):
    assert [outcome.value for outcome in _together(_long_words, ranks)] == [True, True]


def _ranks_compute_after_an_error():
    bounded = BoundedModule(parallelize(_net()), _input())
    try:
        bounded.compute_bounds(x=(_ball(_input(), -0.1 if _rank() else 0.1),), method="CROWN")
    except Exception as error:
        message = str(error)
    lower, upper = bounded.compute_bounds(x=(_ball(_input()),), method="CROWN")
    return message, lower.detach(), upper.detach()


def test_after_an_error_that_all_ranks_caught_they_can_go_on():
    for message, lower, upper in pool(2).run(_ranks_compute_after_an_error):
        assert "eps of input 0" in message
        full = BoundedModule(_net(), _input())
        expected = full.compute_bounds(x=(_ball(_input()),), method="CROWN")
        assert torch.allclose(lower, expected[0], rtol=1e-5, atol=1e-6)  # float32 sums of 16
        assert torch.allclose(upper, expected[1], rtol=1e-5, atol=1e-6)


def _with_bias(value):
    """One rank's neurons get the bias: dead (very negative) or NaN."""
    net = parallelize(_net())
    if _rank() == 1:
        with torch.no_grad():
            net[0].bias.fill_(value)
            net[4].bias.fill_(value)
    results = {}
    for method in ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized"):
        opts = {"optimize_bound_args": {"iteration": 3}}
        bounded = BoundedModule(net, _input(), opts)
        lower, upper = bounded.compute_bounds(x=(_ball(_input()),), method=method)
        results[method] = lower.detach(), upper.detach()
    return results


def _full_with_bias(value):
    net = _net()
    with torch.no_grad():
        net[0].bias[8:] = value
        net[4].bias[8:] = value
    return net


def test_one_rank_with_all_dead_neurons_computes_the_same_bounds():
    full = _full_with_bias(-1e3)
    results = pool(2).run(_with_bias, -1e3)
    for method, (lower, upper) in results[0].items():
        opts = {"optimize_bound_args": {"iteration": 3}}
        expected = BoundedModule(full, _input(), opts).compute_bounds(
            x=(_ball(_input()),), method=method
        )
        # float32; with three alpha steps the same, for there is one minimum
        assert torch.allclose(lower, expected[0], rtol=1e-4, atol=1e-5), method
        assert torch.allclose(upper, expected[1], rtol=1e-4, atol=1e-5), method
        assert torch.equal(lower, results[1][method][0])


def test_one_rank_with_nan_gives_nan_or_infinite_bounds_on_all_ranks_and_no_hang():
    start = time.monotonic()
    outcomes = pool(2).outcomes(_with_bias, math.nan, timeout=BOUNDED_TIME)
    assert time.monotonic() - start < BOUNDED_TIME
    errors = {outcome.error for outcome in outcomes}
    if errors == {None}:
        for outcome in outcomes:
            for method, (lower, upper) in outcome.value.items():
                finite = torch.isfinite(lower) & torch.isfinite(upper)
                assert not finite.any(), f"{method} shows a finite bound of a NaN network"
    else:  # the host refuses NaN in places; then every rank must know
        assert "Hang" not in errors and "Died" not in errors and None not in errors


def _die():
    bounded = BoundedModule(parallelize(_net()), _input())
    if _rank() == 1:
        os._exit(3)
    bounded.compute_bounds(x=(_ball(_input()),), method="CROWN")


@pytest.mark.parametrize("apart", [False, True])
def test_a_rank_that_dies_without_a_word_ends_the_others(apart):
    mortal = RankPool(2)
    if apart:
        mortal.run(_be_on_several_machines)
    try:
        start = time.monotonic()
        outcomes = mortal.outcomes(_die, timeout=BOUNDED_TIME)
        assert time.monotonic() - start < BOUNDED_TIME
        assert outcomes[0].error == "RemoteRankError"
        assert "ended without a message" in outcomes[0].message
        assert outcomes[1].error == "Died"
    finally:
        mortal.close()


def test_the_cpu_shim_is_explicit_and_reversible():
    from lirpa_megatron.compat import megatron_cpu

    before = torch.cuda.current_device
    undo = megatron_cpu.install()
    if torch.cuda.is_available():
        assert torch.cuda.current_device is before
    else:
        assert torch.cuda.current_device() == torch.device("cpu")
    undo()
    assert torch.cuda.current_device is before and not megatron_cpu.is_installed()


def _without_shim():
    from lirpa_megatron.compat import megatron_cpu

    megatron_cpu.uninstall()
    try:
        bounded = BoundedModule(parallelize(_net()), _input())
        bounded.compute_bounds(x=(_ball(_input()),), method="CROWN")
    finally:
        megatron_cpu.install()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")
def test_a_program_that_never_shuts_down_ends_with_its_process_group_gone():
    """Else gloo's threads outlive the interpreter, which then sometimes aborts."""
    program = (
        "import atexit, torch.distributed as dist\n"
        "atexit.register(lambda: print('left' if dist.is_initialized() else 'gone'))\n"
        "from lirpa_megatron.parallel import runtime\n"
        "runtime.initialize()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                         timeout=BOUNDED_TIME, cwd=Path(__file__).parents[1])
    assert (run.returncode, run.stdout.split()) == (0, ["gone"]), run.stderr


def test_without_the_cpu_shim_the_error_says_what_to_call():
    for outcome in _together(_without_shim):
        assert outcome.error == "UserError" and "megatron_cpu.install()" in outcome.message


def _verify_with_a_broken_rank(*arguments):
    from lirpa_megatron.cli.commands import main
    from lirpa_megatron.verify.properties import instance

    def broken(*args, **kwargs):
        raise MemoryError("rank 1 is out of memory")

    if os.environ["RANK"] == "1":
        instance.find_candidates = broken
    return main(["verify", *arguments])


def test_an_error_on_one_rank_of_the_command_line_is_every_ranks_and_the_run_goes_on(tmp_path):
    digits = Path(__file__).resolve().parents[1] / "examples" / "digits"
    output = tmp_path / "results.jsonl"
    start = time.monotonic()
    process = launch(
        2, _verify_with_a_broken_rank, "--onnx", str(digits / "digits.onnx"), "--instances",
        str(digits / "instances.csv"), "--output", str(output),
    )
    assert time.monotonic() - start < 4 * BOUNDED_TIME  # on busy cores
    assert process.returncode != 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    words = Counter(result["result"] for result in results)
    assert words == {"unsat": 9, "error": 6}  # those that the attack looks at
    for result in results:
        if result["result"] == "error":
            assert "rank 1 is out of memory" in result["error"]
