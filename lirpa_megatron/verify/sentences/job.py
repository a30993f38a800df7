"""A run over the sentences of a data file, on all processes; each result is written at once."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from lirpa_megatron.checkpoint.arguments import read_model_config
from lirpa_megatron.checkpoint.language_model import load_language_model, read_model_description
from lirpa_megatron.checkpoint.layout import split_iteration
from lirpa_megatron.errors import SPMDError, UserError
from lirpa_megatron.networks.network import DTYPES
from lirpa_megatron.parallel import runtime, spmd
from lirpa_megatron.parallel.pipeline import guard
from lirpa_megatron.parallel.shared_weights import share_weights
from lirpa_megatron.problem.token_perturbations import check_start_layer
from lirpa_megatron.report.summary import summarise, summary_table
from lirpa_megatron.verify.agreement import agreed
from lirpa_megatron.verify.sentences import vectors
from lirpa_megatron.verify.sentences.data import Item, read_items
from lirpa_megatron.verify.sentences.encoded import Encoded, Tokenizer
from lirpa_megatron.verify.sentences.files import (
    Files,
    ResultsFile,
    check_output,
    merge_parts,
    write_summary,
)
from lirpa_megatron.verify.sentences.options import SentenceOptions
from lirpa_megatron.verify.sentences.results import (
    of_items,
    read_results,
    result_of,
    to_line,
    unfinished,
)
from lirpa_megatron.verify.sentences.sentence import SentenceVerifier
from lirpa_megatron.verify.sentences.task import Task, make_task
from lirpa_megatron.verify.sentences.tokenizer import (
    Substitutes,
    read_tokenizer,
    substitutes_of,
)
from lirpa_megatron.verify.sentences.tokenizer_files import (
    check_around,
    check_forms,
    find_tokenizer,
    said_of,
)
from lirpa_megatron.verify.sentences.vectors import check_dimensions, read_vectors
from lirpa_megatron.verify.stop_signal import StopSignal

TERMINATED = 143
"""Exit status of a run that SIGTERM ended between two sentences; --resume goes on."""


@dataclass
class _Replica:
    """What one data-parallel replica has."""

    items: list[Item]
    tokenizer: Tokenizer | None
    task: Task
    verifier: SentenceVerifier
    # number of positions the model has
    positions: int
    # tokens that are not padding
    vocabulary: int
    # what tells its results from those of another question or model, as they are written
    asked: dict[str, Any]
    # results of the output before this run, and those of them that answer this run's question
    done: list[dict[str, Any]] = field(default_factory=list)
    answered: list[dict[str, Any]] = field(default_factory=list)


def run(files: Files, options: SentenceOptions) -> int:
    """Verifies the sentences.

    Every process calls this. Processes beyond one model's (its tensor-parallel ranks, of all
    pipeline stages) are replicas, which share the sentences out; each writes a file of its own
    (`OUTPUT.1`, ...) that the first one adds to the output at the end, or when a later run resumes.

    Returns:
        exit status: 0 done, 1 a sentence ended in an error, `TERMINATED` after SIGTERM.

    Raises:
        UserError: whatever is wrong with arguments, checkpoint, tokenizer or data, on all ranks.
        SPMDError: a rank failed.
    """
    stop = StopSignal()
    world = dist.group.WORLD
    with agreed(world, "checking the arguments"):
        options.check()
        if runtime.is_rank0():
            check_output(files)
    replica = _prepare(files, options)
    with _output(files) as stream, stop.listening():
        results, ended = _run_replica(replica, options, stream, stop)
    return _finish(files, replica, results, ended)


def _prepare(files: Files, options: SentenceOptions) -> _Replica:
    group = runtime.tp_group()
    with agreed(dist.group.WORLD, "reading the data"):
        items = read_items(files.data, options.limit)
        overrides = read_model_config(files.model_config) if files.model_config else None
        path = files.tokenizer or find_tokenizer(files.load, options.iteration)
        tokenizer = None if path is None else read_tokenizer(path)
        if tokenizer is not None and files.tokenizer is None:
            check_forms(path, tokenizer)
        if tokenizer is not None:
            check_around(path, files.load, options.iteration)
        if tokenizer is None and any(item.text is not None for item in items):
            # What is wrong may be the checkpoint, in whose folder a tokenizer was looked for.
            read_model_description(files.load, options.iteration, overrides)
            raise UserError(
                f"data {files.data} has sentences as text: give the --tokenizer of the model"
            )
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    with agreed(dist.group.WORLD, "loading the checkpoint"):
        description, model = load_language_model(
            files.load, group, dtype, device, options.iteration, overrides, options.pipeline_layers
        )
        vocabulary = description.vocab_size or description.padded_vocab_size
        if tokenizer is not None and tokenizer.size > vocabulary:
            raise UserError(
                f"tokenizer {tokenizer.name} has {tokenizer.size} tokens, the checkpoint's "
                f"vocabulary {vocabulary}: they do not belong together"
            )
        if options.layer:
            check_start_layer(model, options.layer)
        task = make_task(
            options.task, model, vocabulary, options.label_tokens, tokenizer, options.labels,
            options.layer,
        )
        along = None
        if options.vectors is not None:
            along = read_vectors(options.vectors, model.config.hidden_size)
            check_dimensions(len(along), options)
        items = [task.with_label(item) for item in items]
    if _replicas()[0] > 1:
        with guard(None, parallel_state.get_data_parallel_group(), "sharing the weights"):
            share_weights(model, parallel_state.get_data_parallel_group())
    used = str(next(model.parameters()).dtype).removeprefix("torch.")
    asked = {
        "network": split_iteration(files.load.resolve())[0].name, "task": task.name,
        **options.key(),
        "iteration": description.stored.iteration, "stored_dtype": description.stored.dtype,
        "dtype": used, "tokenizer": None if path is None else said_of(path, files.load),
    }
    if options.vectors is not None:
        asked["vectors"] = vectors.said_of(options.vectors)
    done: list[dict[str, Any]] = []
    with agreed(dist.group.WORLD, "reading earlier results"):
        if files.resume and runtime.is_rank0():
            merge_parts(files.output)
            done = read_results(files.output)[0] if files.output.exists() else []
        done = spmd.broadcast_object(done, dist.group.WORLD)
    if runtime.is_rank0():
        print(
            f"{description.kind} of {files.load}, iteration {description.stored.iteration}: "
            f"weights stored as {description.stored.dtype}, verified as {used}",
            file=sys.stderr, flush=True,
        )
    left = unfinished(items, done, asked)
    replicas, own = _replicas()
    longest = description.longest_input
    return _Replica(
        left[own::replicas], tokenizer, task,
        SentenceVerifier(model, task, options, group, along),
        sys.maxsize if longest is None else longest, vocabulary, asked, done,
        of_items(items, done, asked),
    )


def _replicas() -> tuple[int, int]:
    """Number of data-parallel replicas, and which of them this process belongs to."""
    return (
        parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    )


# --------------------------------------------------------------------- one replica


def _run_replica(
    replica: _Replica, options: SentenceOptions, stream: ResultsFile | None, stop: StopSignal
) -> tuple[list[dict[str, Any]], bool]:
    """The replica's results, and whether a signal ended the run."""
    results: list[dict[str, Any]] = []
    bar = tqdm(
        replica.items, desc="verify", unit="sentence", file=sys.stderr,
        disable=not runtime.is_rank0(),
    )
    for item in bar:
        if _stops(stop, replica.verifier):
            bar.close()
            return results, True
        result = _one(replica, item, options)
        results.append(result)
        if stream is not None:
            stream.write(to_line(result))
        certified = sum(r["result"] == "unsat" for r in results)
        bar.set_postfix_str(f"{certified} certified, {result['seconds']:.1f} s the last")
    return results, _stops(stop, replica.verifier)


def _one(replica: _Replica, item: Item, options: SentenceOptions) -> dict[str, Any]:
    """One sentence; what is wrong with it is its result."""
    group, pipeline = runtime.tp_group(), replica.verifier.pipeline
    begin = time.monotonic()
    encoded = verdict = error = None
    substitutes = Substitutes()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with guard(pipeline, group, f"sentence {item.name}"):
            encoded, text = _encode(replica, item, options)
            if options.question == "synonyms":
                if item.candidates is None:
                    raise UserError("the question is synonyms, but there are no candidates")
                if options.prompt.strip() != "{text}":
                    raise UserError("candidates and --prompt do not go together")
                substitutes = substitutes_of(
                    replica.tokenizer, text, encoded, item.candidates
                )
            verdict = replica.verifier.verify(
                encoded.ids, encoded.positions, item.label, substitutes.ids, options.timeout
            )
    except Exception as failure:  # recorded; a run of days must not end for one sentence
        is_told = isinstance(failure, (UserError, SPMDError))
        error = str(failure) if is_told else f"{type(failure).__name__}: {failure}"
        # Raises if the reason is that a rank is gone: there is nobody to go on with, and the
        # sentence is still to be done.
        with guard(pipeline, group, f"the error of sentence {item.name}"):
            spmd.handshake(group, f"the error of sentence {item.name}")
    return result_of(
        item, encoded, substitutes, verdict, replica.task, replica.asked,
        (runtime.tp_size(), runtime.pp_size()),
        time.monotonic() - begin, _peak_memory(),
        None if error is None else " ".join(error.split()),
    )


def _encode(replica: _Replica, item: Item, options: SentenceOptions) -> tuple[Encoded, str]:
    """The tokens of an item, checked against the model."""
    if item.error is not None:
        raise UserError(item.error)
    text = (item.text or "").strip()
    if item.ids is not None:
        if options.prompt.strip() != "{text}":
            raise UserError("token ids and --prompt do not go together")
        places = [[p] for p in range(len(item.ids))]
        encoded = Encoded(list(item.ids), [str(i) for i in item.ids], places)
    else:
        before, _, after = options.prompt.partition("{text}")
        encoded = replica.tokenizer.encode(f"{before}{text}{after}")
        first = len(f"{before}x".split()) - 1  # a word of the prompt may touch the sentence's first
        encoded = encoded.part(first, len(text.split()))
        if encoded.positions and set(encoded.positions) <= set(encoded.unknown):
            raise UserError(
                f"none of the {len(encoded.positions)} tokens is in the vocabulary of "
                f"{replica.tokenizer.name}"
            )
    if not encoded.ids or not encoded.positions:
        raise UserError("the sentence has no tokens")
    if max(encoded.ids) >= replica.vocabulary:
        raise UserError(
            f"token id {max(encoded.ids)} is not in the vocabulary of {replica.vocabulary} tokens"
        )
    if len(encoded.ids) > replica.positions:
        raise UserError(
            f"the sentence has {len(encoded.ids)} tokens, the model {replica.positions} positions"
        )
    if item.label is not None:
        replica.task.check_label(item.label)
    return encoded, text


def _peak_memory() -> float | None:
    """Of this rank in MiB: on the GPU since the sentence began, on a CPU since the start."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _stops(stop: StopSignal, verifier: SentenceVerifier) -> bool:
    """Whether any rank of the model has received a signal; collective."""
    received = any(spmd.gather_objects(stop.received is not None, verifier.group))
    if verifier.pipeline is None:
        return received
    return any(verifier.pipeline.agree("whether to stop", received))


# -------------------------------------------------------------------- the end


@contextlib.contextmanager
def _output(files: Files) -> Iterator[ResultsFile | None]:
    """Where this process writes results; None unless it is the first of its replica."""
    stream, (_, replica) = None, _replicas()
    with agreed(dist.group.WORLD, "opening the output"):
        if files.output is None and replica > 0:
            raise UserError("several replicas cannot share standard output: give --output")
        if runtime.tp_rank() == runtime.pp_rank() == 0:
            stream = ResultsFile(files, replica)
    try:
        yield stream
    finally:
        if stream is not None:
            stream.close()


def _finish(files: Files, replica: _Replica, results: list[dict[str, Any]], ended: bool) -> int:
    """Puts the parts together, prints the sums, and gives the exit status, on all processes."""
    failed = any(r["result"] == "error" for r in replica.answered + results)
    flags = spmd.gather_objects((ended, failed), dist.group.WORLD)
    with agreed(dist.group.WORLD, "summing up"):
        if runtime.is_rank0():
            every = replica.done + results
            if files.output is not None:
                merge_parts(files.output)
                every = read_results(files.output)[0]
                write_summary(files.output, every)
            if every:
                print(
                    summary_table(summarise(every)),
                    file=sys.stderr if files.output is None else sys.stdout, flush=True,
                )
    if any(flag[0] for flag in flags):
        return TERMINATED
    return 1 if any(flag[1] for flag in flags) else 0
