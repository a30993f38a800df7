"""The main job: certifies and attacks sentences with a Megatron checkpoint, with two processes and
with one.

    make demo                               a few of sentences.jsonl
    make demo ARGS='--limit 30'             all of them: the table in docs/measurements.md
    make demo ARGS=--pipeline               the two processes are pipeline stages, not TP ranks
    make demo ARGS='--data ../shared/data/sst/dev.jsonl --limit 1'

Exit status 1 if the runs disagree on a result, or on a certified radius by more than the tolerance
of the search.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SST = Path("examples/sst")
OUTPUT = Path("build/demo")
TOLERANCE = 0.02
RUNS = {"tp1": "TP=1", "tp2": "TP=2"}
"""Folder of each run -> its name."""
STAGES = {"tp1": "TP=1", "pp2": "PP=2"}


SYNONYMS = {
    "synonyms": (),
    "synonyms-splits": ("--splits", "20"),
    "synonyms-forward": ("--method", "forward", "--order", "3", "--splits", "20"),
}
"""Folder of each run over synonyms -> its options."""


def run(*arguments, processes=1):
    """`python -m lirpa_megatron arguments` from the root of the project, echoed as it can be typed
    there; ends the demo with the command's exit status if that is not 0."""
    command = ["-m", "lirpa_megatron", *map(str, arguments)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [*launcher, str(processes), *command]
    command.insert(0, sys.executable)
    print("\n$", shlex.join([os.path.relpath(sys.executable, ROOT), *command[1:]]), flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # the processes share the cores
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if status:
        sys.exit(status)


def results(path):
    """{id: result} of a file of results, in the order of the file."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return {entry["property"]: entry for entry in map(json.loads, lines)}


def radii(entry):
    """"[certified, attacked]" as text, the first rounded down."""
    low, high = entry["certified_radius"], entry["attacked_radius"]
    if low is None:
        return entry["result"]
    low = int(low * 1e5) / 1e5
    return f"[{low:.5f}, {'-' if high is None else format(high, '.5f')}]"


def agree(one, two):
    """Whether two results say the same, radii to within the tolerance of their search."""
    low, high = sorted(entry["certified_radius"] or 0.0 for entry in (one, two))
    return one["result"] == two["result"] and high <= low * (1 + 1.01 * TOLERANCE)


def compare(runs, names):
    """Prints the table of sentences; True if all runs agree."""
    first = runs["tp1"]
    if any(entries.keys() != first.keys() for entries in runs.values()):
        print("the runs did not verify the same sentences")
        return False
    columns = [f"{name} [certified, attacked]" for name in names.values()]
    print(f"\n{'label':>5} {'model':>5}  {columns[0]:<27} {columns[1]:<27} sentence")
    same = True
    for name, entry in first.items():
        others = [entries[name] for entries in runs.values()]
        same = same and all(agree(entry, other) for other in others)
        cells = " ".join(f"{radii(other):<27}" for other in others)
        print(f"{entry['label']:>5} {entry['predicted']:>5}  {cells} {entry['text']}")
    return same


def summary(folder):
    """The sums of a run, as the job wrote them."""
    path = ROOT / OUTPUT / folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))["groups"][0]


def table(names):
    """The table of docs/measurements.md."""
    print("\n| | sentences | clean accuracy | certified accuracy | mean certified radius | "
          "mean attacked radius | seconds per sentence |")
    print("|---|---|---|---|---|---|---|")
    for folder, name in names.items():
        sums, entries = summary(folder), results(OUTPUT / folder / "results.jsonl").values()
        attacked = [e["attacked_radius"] for e in entries if e["attacked_radius"] is not None]
        mean = sum(attacked) / len(attacked) if attacked else float("nan")
        print(
            f"| {name} | {sums['inputs']} | {sums['clean_accuracy']:.0%} | "
            f"{sums['certified_accuracy']:.0%} | {sums['mean_radius'] or 0:.4f} | {mean:.4f} | "
            f"{sums['seconds_per_input']:.1f} |"
        )


def beside():
    """Words that may be replaced by their synonyms: CROWN and the forward method, sets in pieces.
    """
    print("\n| a word replaced by a synonym | words asked | proved | refuted | open | seconds |")
    print("|---|---|---|---|---|---|")
    for folder, options in SYNONYMS.items():
        entries = results(OUTPUT / folder / "results.jsonl").values()
        found = [word["result"] for entry in entries for word in entry["positions"] or ()]
        counts = " | ".join(str(found.count(word)) for word in ("unsat", "sat", "unknown"))
        name = " ".join(options if "--method" in options else ("CROWN", *options))
        seconds = sum(entry["seconds"] for entry in entries)
        print(f"| {name} | {len(found)} | {counts} | {seconds:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=SST / "sentences.jsonl", help="JSONL of sentences")
    parser.add_argument("--limit", default="3", help="how many of them (default 3)")
    parser.add_argument("--pipeline", action="store_true",
                        help="the two processes are pipeline stages")
    chosen = parser.parse_args()
    names = STAGES if chosen.pipeline else RUNS
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    common = ("verify", "--load", SST / "checkpoint", "--tokenizer", SST / "vocab.txt")
    common += ("--data", chosen.data, "--limit", chosen.limit)
    for name in reversed(names):
        folder, stages = OUTPUT / name, ("--pipeline-parallel-size", 2) if name == "pp2" else ()
        (ROOT / folder).mkdir(parents=True)
        run(*common, *stages, "--output", folder / "results.jsonl", processes=int(name[-1]))
    for name, method in SYNONYMS.items():
        (ROOT / OUTPUT / name).mkdir()
        run(*common, "--question", "synonyms", "--words", "each", *method,
            "--output", OUTPUT / name / "results.jsonl")
    run("report", OUTPUT / "tp1" / "results.jsonl", "--output", OUTPUT / "report.html")
    same = compare({name: results(OUTPUT / name / "results.jsonl") for name in names}, names)
    table(names)
    beside()
    print("\nWithin the certified radius (of all words' embeddings, L-inf) no perturbation changes "
          "the class; at the attacked one a perturbation was found that does.")
    print("The runs agree." if same else f"The runs disagree (radii by more than {TOLERANCE:.0%}).")
    sys.exit(not same)


if __name__ == "__main__":
    main()
