"""A benchmark of VNN-COMP: verdicts and processor times of `verify --complete` by property.

    python benchmarks/vnncomp.py FOLDER [--published RESULTS.csv] [--timeout 116] [--branching auto]
        [--output RESULTS.jsonl]

FOLDER has instances.csv, as in ChristopherBrix/vnncomp2023_benchmarks. One process, one thread. The
limit and all seconds are the processor's, so that other work on the machine does not count; loading
a network is part of an instance. RESULTS.csv is a tool's published file: category, network,
property, seconds to prepare, verdict, seconds. Verdicts of ours that differ are listed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import Counter
from pathlib import Path

WORDS = ("unsat", "sat", "unknown", "timeout", "error")


def published(path: Path) -> dict[tuple[str, str], str]:
    """(network, property) -> verdict; files with the folder that they are in."""
    found = {}
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: --published is a tool's results.csv")
    with path.open(newline="") as rows:
        for _, network, prop, _, verdict, *_ in csv.reader(rows):
            found[in_folder(network), in_folder(prop)] = verdict.strip()
    return found


def in_folder(name: str) -> str:
    path = Path(name.strip().removesuffix(".gz"))
    return f"{path.parent.name}/{path.name}"


def table(results: list) -> str:
    """Counts and seconds of each property."""
    groups: dict[str, list] = {}
    for result in results:
        groups.setdefault(result.property, []).append(result)
    groups["all"] = results
    head = ["property", "instances", *WORDS, "median s", "most s of the decided", "total s"]
    lines = [head, ["---"] * len(head)]
    for prop, own in groups.items():
        counts = Counter(r.result for r in own)
        decided = [r.seconds for r in own if r.result in ("sat", "unsat")]
        lines.append([
            prop, str(len(own)), *(str(counts[word]) for word in WORDS),
            f"{statistics.median(r.seconds for r in own):.1f}",
            f"{max(decided):.1f}" if decided else "-", f"{sum(r.seconds for r in own):.0f}",
        ])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--published", type=Path)
    parser.add_argument("--timeout", type=float, help="seconds (default: as instances.csv says)")
    parser.add_argument("--branching", default="auto", choices=("auto", "relu", "input"))
    parser.add_argument("--output", type=Path, help="file of results, one JSON object a line")
    arguments = parser.parse_args()

    time.monotonic = time.process_time  # limits and results are in the processor's seconds
    import torch

    from lirpa_megatron.parallel import runtime
    from lirpa_megatron.verify.properties.job import Runner
    from lirpa_megatron.verify.properties.job_plan import plan_job
    from lirpa_megatron.verify.properties.options import VerifyOptions

    torch.set_num_threads(1)
    options = VerifyOptions(
        complete=True, branching=arguments.branching, timeout=arguments.timeout
    )
    known = published(arguments.published) if arguments.published else {}
    results, wrong, found, theirs_decided = [], [], 0, 0
    with runtime.session():
        plan = plan_job({"instances": arguments.folder / "instances.csv"}, options)
        runner = Runner(options)
        for instance in plan.instances:
            (result,) = runner.run([instance], lambda _: None)
            results.append(result)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(result.to_line())
            names = result.network_file, result.property_file
            theirs = known.get(tuple(map(in_folder, names))) if None not in names else None
            found += theirs is not None
            theirs_decided += theirs in ("sat", "unsat")
            if {result.result, theirs} == {"sat", "unsat"}:
                wrong.append(f"{result.network} {result.property}: {result.result}, published "
                             f"{theirs}")
            print(f"{result.network} {result.property} {result.result} {result.seconds:.2f} s "
                  f"{result.domains or ''} {result.error or ''}".rstrip(), flush=True)
    print(table(results))
    if known:
        print(f"{found} of {len(results)} are published, {theirs_decided} are decided there")
        print(f"{len(wrong)} verdicts differ from the published ones", *wrong, sep="\n")


if __name__ == "__main__":
    main()
