"""An ONNX network becomes a Megatron checkpoint at TP=2 and is certified from it.

    make demo-digits

Imports digits.onnx on two processes, verifies instances.csv from that checkpoint on two processes
and on one, and compares the two result files. Exit status 1 if a result word differs or a lower
bound differs by more than TOLERANCE.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIGITS = Path("examples/digits")
OUTPUT = Path("build/digits")
# Of the largest bound of the instance. float32 has 6e-8, and the sums behind a bound are hundreds
# of terms long and are added in another order on two ranks.
TOLERANCE = 1e-5


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
    """{property: result object} of a JSON-lines file, in the order of the file."""
    lines = (ROOT / path).read_text().splitlines()
    return {entry["property"]: entry for entry in map(json.loads, lines)}


def true_label(name):
    """The digit of a property, from the first line of its file."""
    path = ROOT / DIGITS / "properties" / f"{name}.vnnlib"
    first = path.read_text().splitlines()[0]
    return first.rstrip(".").split()[-1]


def difference(one, two):
    """Largest difference of two lists of bounds, over their largest magnitude; inf if they cannot
    be compared. An instance settled by the attack may have no bounds, then on both sides."""
    one, two = one or [], two or []
    if len(one) != len(two) or not all(map(math.isfinite, [*one, *two])):
        return math.inf
    scale = max(map(abs, [*one, *two]), default=0)
    apart = max((abs(a - b) for a, b in zip(one, two, strict=True)), default=0)
    return apart / scale if scale else 0.0


def smallest(bounds):
    return f"{min(bounds):.6f}" if bounds else "-"


def compare(one, two):
    """Prints the table; True if both files say the same."""
    if one.keys() != two.keys():
        print("the two runs did not verify the same properties")
        return False
    row = "{:<20} {:>5}  {:<14} {:>14} {:>14} {:>11}".format
    print("\n" + row("property", "label", "result", "TP=1 smallest", "TP=2 smallest", "difference"))
    worst, words_agree = 0.0, True
    for name, a in one.items():
        b = two[name]
        apart = difference(a["lower_bounds"], b["lower_bounds"])
        same_word = a["result"] == b["result"]
        word = a["result"] if same_word else f"{a['result']} / {b['result']}"
        bounds = smallest(a["lower_bounds"]), smallest(b["lower_bounds"])
        print(row(name, true_label(name), word, *bounds, f"{apart:.1e}"))
        worst, words_agree = max(worst, apart), words_agree and same_word
    proved = sum(entry["result"] == "unsat" for entry in one.values())
    print(f"\n{proved} of {len(one)} properties proved (unsat: no other digit can win in the box).")
    print(f"Largest difference between TP=1 and TP=2: {worst:.1e} of an instance's largest bound.")
    return words_agree and worst <= TOLERANCE


def main():
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    (ROOT / OUTPUT).mkdir(parents=True)
    checkpoint = OUTPUT / "ckpt"
    run("import-onnx", DIGITS / "digits.onnx", checkpoint, processes=2)
    files = {}
    for processes in (2, 1):
        files[processes] = OUTPUT / f"tp{processes}.jsonl"
        run(
            *("verify", "--load", checkpoint, "--instances", DIGITS / "instances.csv"),
            *("--method", "CROWN", "--output", files[processes]),
            processes=processes,
        )
    agree = compare(results(files[1]), results(files[2]))
    print("The bounds agree." if agree else f"The runs disagree (more than {TOLERANCE:.0e}).")
    sys.exit(not agree)


if __name__ == "__main__":
    main()
