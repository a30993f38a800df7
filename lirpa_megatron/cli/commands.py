"""The command line: `lirpa-megatron`, `python -m lirpa_megatron`, or either under torchrun.

Every process runs the same program; rank 0 alone checks the arguments, writes files and prints.
Heavy imports happen inside functions, after their warnings have been silenced.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from lirpa_megatron.cli.arguments import parse_arguments
from lirpa_megatron.cli.capabilities import CAPABILITIES
from lirpa_megatron.cli.terminal import launched_as_rank0, print_error
from lirpa_megatron.compat import requirements
from lirpa_megatron.errors import SPMDError, UserError


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        exit status: 0 done, 1 an instance errored, 2 bad usage.
    """
    _silence_libraries()
    from lirpa_megatron import __version__

    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv, __version__)
        if arguments["command"] == "report":
            return _report(arguments)
        if arguments["command"] == "supports":
            if launched_as_rank0():
                print("\n".join(CAPABILITIES[arguments["capability"]]()))
            return 0
        _load_libraries()
    except (ImportError, UserError) as error:
        print_error(str(error))
        _meet_other_ranks()
        return 2
    return _run(arguments)


def _run(arguments: dict[str, Any]) -> int:
    """Runs the command in its process groups; what this sets up is taken down at the end.

    Errors are printed before that: torchrun ends the other processes soon after the first one.
    """
    import torch.distributed as dist

    from lirpa_megatron.parallel import runtime

    is_ours = not dist.is_initialized()
    try:
        runtime.initialize(
            arguments.get("tensor_parallel_size"),
            pipeline_parallel_size=arguments.get("pipeline_parallel_size", 1),
        )
        if "data" not in arguments:
            _check_world(may_have_replicas=arguments.get("complete", False))
        return _COMMANDS[arguments.pop("command")](arguments)
    except UserError as error:
        print_error(str(error))
        return 2
    except SPMDError as error:
        print_error(str(error))
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    finally:
        if is_ours:
            runtime.shutdown()


def _check_world(may_have_replicas: bool) -> None:
    """Only runs over sentences and branch and bound have replicas."""
    import torch.distributed as dist

    from lirpa_megatron.parallel import runtime

    tp, stages, world = runtime.tp_size(), runtime.pp_size(), dist.get_world_size()
    if tp * stages != world and not (may_have_replicas and stages == 1):
        sizes = f"--tensor-parallel-size {tp}"
        if stages > 1:
            sizes += f" x --pipeline-parallel-size {stages}"
        raise UserError(
            f"{sizes} is not the number of processes {world}: start {tp * stages} "
            "(torchrun --nproc-per-node); only --data and --complete, in one pipeline stage, share "
            "their work out over replicas"
        )


def _load_libraries() -> None:
    """Imports what every command needs, so that what is missing is said before any work."""
    requirements.check()
    from lirpa_megatron.compat import auto_lirpa  # noqa: F401


def _meet_other_ranks() -> None:
    """Waits for rank 0 to have printed: it may start more slowly, and torchrun ends it with us."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or importlib.util.find_spec("torch") is None:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError, ValueError):  # there is nothing left to lose
        dist.init_process_group("gloo", timeout=timedelta(minutes=1))
        dist.barrier()
        dist.destroy_process_group()


def _silence_libraries() -> None:
    """Keeps deprecation warnings and logs of torch, Megatron and auto_LiRPA from the user."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"  # for the processes of Megatron's writer
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("megatron", "torch", "auto_LiRPA"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _import_onnx(arguments: dict[str, Any]) -> int:
    from lirpa_megatron.adapters.parallelize import parallelize
    from lirpa_megatron.checkpoint.writer import check_output, save_network
    from lirpa_megatron.networks.network import Network
    from lirpa_megatron.networks.onnx_import import read_onnx
    from lirpa_megatron.parallel import runtime
    from lirpa_megatron.verify.agreement import agreed

    group, out, force = runtime.tp_group(), arguments["out"], arguments.get("force", False)
    with agreed(group, "checking the arguments"):
        if runtime.is_rank0():
            check_output(out, force)
    with agreed(group, "reading the network"):
        imported = read_onnx(arguments["net"], arguments.get("onnx_output"))
        network = Network.from_weights(imported.description, imported.weights)
        model = parallelize(network, tp_group=group)
    with agreed(group, "writing the checkpoint"):
        save_network(imported.description, model, out, force)
    if runtime.is_rank0():
        print(f"wrote {out} (tensor-parallel size {runtime.tp_size()})")
    return 0


def _import_hf(arguments: dict[str, Any]) -> int:
    from lirpa_megatron.checkpoint.arguments import read_model_config
    from lirpa_megatron.checkpoint.hugging_face_import import import_hugging_face
    from lirpa_megatron.checkpoint.writer import check_output
    from lirpa_megatron.parallel import runtime
    from lirpa_megatron.verify.agreement import agreed

    out, force = arguments["out"], arguments.get("force", False)
    with agreed(runtime.tp_group(), "checking the arguments"):
        if runtime.is_rank0():
            check_output(out, force)
    with agreed(runtime.tp_group(), "importing the folder"):
        config = arguments.get("model_config")
        overrides = None if config is None else read_model_config(config)
        description, difference = import_hugging_face(arguments["folder"], out, force, overrides)
    if runtime.is_rank0():
        print(
            f"wrote {out} (tensor-parallel size {runtime.tp_size()}, {description.stored.dtype}); "
            f"its logits differ from the folder's by {difference:.1e} of the largest"
        )
    return 0


def _inspect(arguments: dict[str, Any]) -> int:
    from lirpa_megatron.checkpoint.arguments import read_model_config
    from lirpa_megatron.checkpoint.inspection import inspect
    from lirpa_megatron.parallel import runtime
    from lirpa_megatron.verify.agreement import agreed

    with agreed(runtime.tp_group(), "inspecting the checkpoint"):
        if runtime.is_rank0():
            config = arguments.get("model_config")
            print(inspect(
                arguments["checkpoint"], arguments.get("iteration"),
                None if config is None else read_model_config(config),
                arguments.get("seq_length"), arguments.get("max_spec_rows"),
                arguments.get("verbose", False),
            ), flush=True)
    return 0


def _verify_sentences(arguments: dict[str, Any]) -> int:
    from lirpa_megatron.verify.sentences.job import Files, run
    from lirpa_megatron.verify.sentences.options import SentenceOptions

    def chosen(kind: Any) -> Any:
        names = {field.name for field in fields(kind)}
        return kind(**{name: value for name, value in arguments.items() if name in names})

    return run(chosen(Files), chosen(SentenceOptions))


def _verify(arguments: dict[str, Any]) -> int:
    if "data" in arguments:
        return _verify_sentences(arguments)
    import torch.distributed as dist

    from lirpa_megatron.parallel import runtime, spmd
    from lirpa_megatron.parallel.model_ranks import ModelRanks
    from lirpa_megatron.verify.agreement import agreed
    from lirpa_megatron.verify.properties.job import Runner, run_shared
    from lirpa_megatron.verify.properties.job_plan import plan_job
    from lirpa_megatron.verify.properties.options import VerifyOptions
    from lirpa_megatron.verify.properties.output import Output
    from lirpa_megatron.verify.properties.results import summary_table
    from lirpa_megatron.verify.properties.search_files import search_files
    from lirpa_megatron.verify.stop_signal import StopSignal

    names = {field.name for field in fields(VerifyOptions)}
    options = replace(VerifyOptions(), **{k: v for k, v in arguments.items() if k in names})
    group = dist.group.WORLD
    with agreed(group, "checking the arguments"):
        plan = plan_job(arguments, options) if runtime.is_rank0() else None
        plan = spmd.broadcast_object(plan, group)

    stop = StopSignal((signal.SIGTERM, signal.SIGINT)) if options.complete else None
    runner = Runner(
        options, ModelRanks.of_megatron(), stop, plan.searches, plan.one_property
    )
    if plan.instances and plan.one_network:  # nothing of the run makes sense without it
        runner.prepare(plan.instances[0], only_network=not plan.one_property)
    with agreed(group, "opening the output"):
        output = Output(plan.output, plan.keep_bytes, runner.ranks, "query" in arguments)
    with contextlib.closing(output), stop.listening() if stop else contextlib.nullcontext():
        results = plan.done + run_shared(runner, plan.instances, output)
    if "query" in arguments:
        if runner.ranks.is_first and results:
            _answer(runner, results[0])
    elif runner.ranks.is_first:
        print(summary_table(results), file=sys.stdout if plan.output else sys.stderr, flush=True)
    if runner.ended is not None:
        if runner.ranks.is_first:
            searches = search_files(options.searches) if options.searches is not None else ()
            is_begun = bool(searches) or (plan.output is not None and bool(results))
            how = "; --resume goes on" if is_begun else ""
            print(f"ended by {signal.Signals(runner.ended).name}{how}", file=sys.stderr, flush=True)
        return 128 + runner.ended
    return 1 if any(result.result == "error" for result in results) else 0


def _answer(runner: Any, result: Any) -> None:
    """Prints a result as the VNN-LIB standard says."""
    from lirpa_megatron.verify.properties.assignment import assignment

    if result.result == "error":
        print_error(result.error)
        return
    print("timed-out" if result.result == "timeout" else result.result)
    if result.result == "sat":
        print("\n".join(assignment(*runner.counterexample)))
    sys.stdout.flush()


def _check(arguments: dict[str, Any]) -> int:
    import torch.distributed as dist

    from lirpa_megatron.networks.files import find_file
    from lirpa_megatron.verify.properties.records import check_record

    if dist.get_world_size() > 1:
        raise UserError("check runs in one process: start it without torchrun")
    network, is_checkpoint = arguments.get("load"), "load" in arguments
    if "onnx" in arguments:
        network = find_file(arguments["onnx"], "network")
    prop = arguments.get("vnnlib")
    prop = None if prop is None else find_file(prop, "property")
    print(check_record(
        arguments["record"], network, is_checkpoint, prop, arguments.get("onnx_output")
    ))
    return 0


def _report(arguments: dict[str, Any]) -> int:
    """Needs one process, and none of the libraries that bounds need."""
    from lirpa_megatron.report.page import write_report
    from lirpa_megatron.report.reader import read_lines
    from lirpa_megatron.report.summary import summary_table

    if not launched_as_rank0():
        return 0
    path, output = arguments["results"], arguments.get("output", Path("report.html"))
    results = read_lines(path)
    if output.exists() and output.samefile(path):
        raise UserError(f"output {output} is the file of results: choose another name")
    summary = write_report(results, output, source=path.name)
    print(summary_table(summary))
    print(f"wrote {output}")
    return 0


_COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "check": _check,
    "import-hf": _import_hf,
    "import-onnx": _import_onnx,
    "inspect": _inspect,
    "verify": _verify,
}
