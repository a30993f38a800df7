"""A run over instances: each is verified, its result written and flushed, and the run goes on."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lirpa_megatron.complete.state import SearchState, StateError
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime, spmd
from lirpa_megatron.parallel.model_ranks import ALONE, ModelRanks
from lirpa_megatron.parallel.replicas import ALONE as ALONE_REPLICA
from lirpa_megatron.verify.agreement import agreed
from lirpa_megatron.verify.properties.counterexamples import Counterexample
from lirpa_megatron.verify.properties.instance import Deadline, Outcome, verify_instance
from lirpa_megatron.verify.properties.instance_list import Instance
from lirpa_megatron.verify.properties.loading import Loaded, load_sources
from lirpa_megatron.verify.properties.options import VerifyOptions
from lirpa_megatron.verify.properties.output import Output
from lirpa_megatron.verify.properties.property import Property
from lirpa_megatron.verify.properties.record_files import write_record
from lirpa_megatron.verify.properties.records import record_of
from lirpa_megatron.verify.properties.results import Result
from lirpa_megatron.verify.properties.search_files import (
    SearchFileError,
    is_of,
    state_of,
    write_search,
)
from lirpa_megatron.verify.properties.sources import (
    Source,
    check_sources,
    files_of,
    read_source,
    read_sources,
)
from lirpa_megatron.verify.properties.splits import check_dimensions
from lirpa_megatron.verify.properties.vnnlib import read_vnnlib
from lirpa_megatron.verify.stop_signal import StopSignal


class Runner:
    """Verifies instances one after the other; networks are loaded once for consecutive ones.

    Args:
        options: how.
        ranks: that hold the networks, and their replicas.
        stop: ends the run; what is left of the search then is written (`VerifyOptions.searches`).
        searches: files of searches that were ended, as `search_files.read_search` has them.
        one_property: whether it is the only one: a search that is out of time is written, too, and
            one that cannot be continued ends the run.
    """

    def __init__(
        self, options: VerifyOptions, ranks: ModelRanks = ALONE, stop: StopSignal | None = None,
        searches: Mapping[Path, dict[str, Any]] | None = None, one_property: bool = False,
    ) -> None:
        self.options, self.ranks, self.stop = options, ranks, stop
        self.searches, self.one_property = dict(searches or {}), one_property
        # by what signal the run was ended; the same on every rank
        self.ended: int | None = None
        self.progress: Callable[[str], None] | None = None
        # what of, without their weights, and the network
        self._loaded: tuple[Any, list[Source], Loaded] | None = None
        self._read: tuple[Path, Property] | None = None
        # of the last instance, if it has one
        self.counterexample: tuple[Property, Counterexample] | None = None

    def prepare(self, instance: Instance, only_network: bool = False) -> tuple[Loaded, Property]:
        """The instance's network and its property, which is of that network.

        Args:
            instance: what is to be verified.
            only_network: a property that cannot be read is passed over; the result then is the
                network as it is, and None.

        Raises:
            UserError: whatever is wrong with the files, on every rank.
        """
        prop = None
        try:
            prop = self._property(instance)
        except UserError:
            if not only_network:
                raise
        with self._agreed(f"loading network {instance.network}"):
            sources = self._sources(instance, prop)
        return self._network(instance, prop, sources), prop

    def _property(self, instance: Instance) -> Property:
        path = instance.property_path
        if self._read is None or self._read[0] != path:
            self._read = None
            with self._agreed(f"reading property {instance.property}"):
                prop = read_vnnlib(path)
                if self.options.splits:
                    check_dimensions(prop)
            self._read = path, prop
        return self._read[1]

    def _sources(self, instance: Instance, prop: Property | None) -> list[Source]:
        """The files, whose weights are read unless the network is there."""
        output = self.options.onnx_output
        if prop is None:
            return [read_source(instance.network_path, instance.is_checkpoint, output)]
        path = instance.property_path
        files = files_of(prop, path, instance.network_path, instance.named)
        known = self._loaded
        if known is not None and known[0] == (files, bool(prop.networks), prop.wiring):
            sources = known[1]
        else:
            self._loaded = None  # free the old one first
            sources = read_sources(files, instance.is_checkpoint, output, prop)
        check_sources(prop, path, sources)
        return sources

    def _network(
        self, instance: Instance, prop: Property | None, sources: list[Source]
    ) -> Loaded:
        if self._loaded is None or self._loaded[1] is not sources:
            wiring = None if prop is None else prop.wiring
            with self._agreed(f"loading network {instance.network}"):
                loaded = load_sources(
                    sources, wiring, self.options.dtype, self.options.bound_opts(), self.ranks,
                    self.options.pipeline_layers,
                )
            paths = tuple(source.path for source in sources)
            light = [source.without_weights() for source in sources]
            self._loaded = (paths, bool(prop and prop.networks), wiring), light, loaded
        return self._loaded[2]

    def run(self, instances: Iterable[Instance], write: Callable[[Result], None]) -> list[Result]:
        """Verifies all instances; one that raises gets the result "error".

        Args:
            instances: what to verify, the same on every rank.
            write: called on every rank with each result as it is there; all replicas work on the
                same instance, and have the same results.
        """
        results = []
        for instance in instances:
            begin = time.monotonic()
            error = None
            is_left = False
            try:
                with self.ranks.replicas.guard(f"instance {instance.network} {instance.property}"):
                    if instance.error is not None:
                        raise UserError(instance.error)
                    outcome = self._verify(instance)
                    is_left = self.ended is not None and outcome.result == "timeout"
            except Exception as exception:  # recorded; a run of days must not end for one instance
                if self.one_property and isinstance(exception, SearchFileError):
                    raise
                kind = "" if isinstance(exception, UserError) else f"{type(exception).__name__}: "
                error = f"{kind}{exception}".replace("\n", " ")
                outcome = Outcome("error", [])
            if is_left:  # --resume goes on with it
                return results
            result = Result(
                network=instance.network,
                property=instance.property,
                result=outcome.result,
                method=self.options.result_method,
                lower_bounds=outcome.lower_bounds,
                tensor_parallel=self.ranks.size,
                pipeline_parallel=None if self.ranks.stages == 1 else self.ranks.stages,
                seconds=round(time.monotonic() - begin, 4),
                **self._details(instance, outcome),
                error=error,
            )
            write(result)
            results.append(result)
            if self.ended is not None:
                break
        return results

    def _details(self, instance: Instance, outcome: Outcome) -> dict[str, Any]:
        network, prop = instance.files
        details: dict[str, Any] = {
            "network_file": network, "property_file": prop, "note": outcome.note
        }
        if self.options.branching != "auto":
            details["asked_branching"] = self.options.branching
        if self.options.onnx_output is not None:
            details["onnx_output"] = self.options.onnx_output
        if self.options.no_live_check:
            details["live_check"] = False
        if self.options.outward:
            details["rounding"] = self.options.rounding
        if self.options.order > 1:
            details["order"] = self.options.order
        if self.options.splits:
            details |= {"splits": self.options.splits, "proved_share": outcome.proved_share,
                        "pieces": outcome.pieces}
        if self._loaded is not None and instance.network_path in self._loaded[0][0]:
            details["stored_dtype"] = self._loaded[2].stored_dtype
            details["dtype"] = self._loaded[2].dtype
            details["sharded_share"] = self._loaded[2].sharded_share
        if outcome.decided is not None:
            details |= {"branching": outcome.decided.branching,
                        "bound": _finite(outcome.decided.bound),
                        "domains": outcome.decided.domains,
                        "inner_domains": outcome.decided.inner_domains,
                        "open_domains": outcome.decided.open}
        found = outcome.counterexample
        if found is not None:
            self.counterexample = self._read[1], found
            details |= {
                "counterexample": self._read[1].declared_inputs(found.point),
                "violation": found.violation, "float64_violation": found.float64_violation,
            }
        return details

    def _verify(self, instance: Instance) -> Outcome:
        stop = None if self.stop is None else self.stop.is_received
        deadline = Deadline(instance.timeout, self.ranks, stop)
        loaded, prop = self.prepare(instance)
        with self.ranks.guard(f"instance {instance.network} {instance.property}"):
            path, start = self._start(instance, loaded, prop)
            try:
                outcome = verify_instance(
                    loaded, prop, self.options, deadline, self.ranks, self.progress, start
                )
            except StateError as error:
                raise SearchFileError(
                    f"search {path} cannot be continued: {error}; remove it to begin anew"
                ) from None
            self.ended = self._stopped()
            if self.options.record is not None and outcome.result == "unsat":
                record = record_of(loaded, prop, instance, outcome)
                if self.ranks.is_first:
                    write_record(self.options.record, record)
            self._keep(instance, loaded, outcome, path)
        return outcome

    def _start(
        self, instance: Instance, loaded: Loaded, prop: Property
    ) -> tuple[Path | None, SearchState | None]:
        """What an earlier search has left of an instance, and in which file."""
        for path, found in self.searches.items():
            if is_of(found, instance):
                return path, state_of(path, found, instance, loaded, prop)
        return None, None

    def _stopped(self) -> int | None:
        """The signal that any rank has received; collective."""
        if self.stop is None:
            return None
        own = max(spmd.gather_objects(self.stop.received or 0, self.ranks.group))
        if self.ranks.pipeline is not None:
            own = max(self.ranks.pipeline.agree("whether to stop", own))
        return max(self.ranks.replicas.gather("whether to stop", own).values()) or None

    def _keep(
        self, instance: Instance, loaded: Loaded, outcome: Outcome, path: Path | None
    ) -> None:
        """Writes what is left of a search, or removes the file that it has come from."""
        own = self.options.searches
        if own is None:
            return
        left = None if outcome.decided is None else outcome.decided.state
        if outcome.result == "timeout":
            if left is not None and (self.one_property or self.ended is not None):
                number = runtime.dp_rank() if self.ranks.replicas is ALONE_REPLICA else 0
                file = path or (own.with_name(f"{own.name}.{number}") if number else own)
                write_search(file, left, instance, loaded, self.ranks.is_first)
        elif self.ranks.is_first and (outcome.decided is not None or outcome.result != "unknown"):
            # not where nothing could be split, as by another --branching
            for file in (path, own if self.one_property else None):
                if file is not None:
                    file.unlink(missing_ok=True)

    def _agreed(self, what: str) -> contextlib.AbstractContextManager[None]:
        return agreed(self.ranks.group, what, self.ranks.pipeline)


def run_shared(runner: Runner, instances: Sequence[Instance], output: Output) -> list[Result]:
    """The results of a run, in order; every rank of every replica calls it alike.

    While there is an instance for each replica, each verifies its own; those that are left then,
    fewer than replicas, and those of a replica that has been killed all verify together.

    Args:
        runner: of this rank.
        instances: what to verify.
        output: is told of each result.
    """
    ranks, results = runner.ranks, {}
    replicas, count = ranks.replicas, len(ranks.replicas.members)
    alone = len(instances) // count * count if count > 1 else 0
    if alone:
        own = range(alone)[replicas.members.index(replicas.rank) :: count]

        def write(result: Result) -> None:
            output.write_own(result)
            replicas.working()

        runner.ranks = replace(ranks, replicas=ALONE_REPLICA)
        with contextlib.closing(with_progress([instances[i] for i in own], runner)) as some:
            found = runner.run(some, write)
        runner.ranks = ranks
        with replicas.guard("the instances"), ranks.guard("the instances"):
            # a run that was ended has found fewer
            mine = dict(zip(own, found, strict=False)), runner.ended or 0
            heard = replicas.gather("results", mine)
        for part, _ in heard.values():
            results |= part
        runner.ended = max(ended for _, ended in heard.values()) or None
        output.gather([results[i] for i in sorted(results)])
    left = [i for i in range(len(instances)) if i not in results]
    if left and runner.ended is None:
        with contextlib.closing(with_progress([instances[i] for i in left], runner)) as some:
            found = runner.run(some, output.write)
        results |= dict(zip(left, found, strict=False))
    return [results[i] for i in sorted(results)]


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def with_progress(instances: list[Instance], runner: Runner) -> Iterator[Instance]:
    """The instances, with a progress bar on rank 0's standard error.

    Args:
        instances: what a run goes through.
        runner: runs them; what it says of its progress is shown behind the bar.
    """
    bar = tqdm(
        instances, desc="verify", unit="instance", file=sys.stderr, disable=not runtime.is_rank0()
    )
    runner.progress = bar.set_postfix_str
    with bar:
        for instance in bar:
            yield instance
            bar.set_postfix_str("", refresh=False)
