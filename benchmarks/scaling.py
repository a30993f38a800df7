"""CROWN of GPT models that no machine here holds: memory, time and bytes per rank, from counts.

    python benchmarks/scaling.py

Counts as in `checkpoint.estimates` and `crown.communication`, for all intermediate bounds of a
causal model of which the last position's output is asked for. `scaling.md` has the table and how
far the counts are from what was measured on small models.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A GPT: L layers, hidden h, FFN f, n query heads, key/value width kv, FFN matrices (3: gated).
    """

    name: str
    L: int
    h: int
    f: int
    n: int
    kv: int
    matrices: int = 2

    def attention(self) -> int:
        """Weights of a layer's attention."""
        return 2 * self.h * (self.h + self.kv)

    def mlp(self) -> int:
        return self.matrices * self.h * self.f


SHAPES = (
    Shape("3 x 128", 3, 128, 512, 4, 128),
    Shape("GPT-2 small (12 x 768)", 12, 768, 3072, 12, 768),
    Shape("1B (24 x 2048)", 24, 2048, 8192, 16, 2048),
    Shape("7B (32 x 4096)", 32, 4096, 11008, 32, 4096, 3),
    Shape("70B (80 x 8192)", 80, 8192, 28672, 64, 1024, 3),
)


def starts(shape: Shape, S: int):
    """(rows of a start node, attention regions passed, MLP regions passed), last layer's last.

    Regions of the last layer, which have one position, are left out.
    """
    s, fc1 = shape, shape.f * (shape.matrices - 1)
    for layer in range(s.L):
        last = layer == s.L - 1
        Q = 1 if last else S
        pairs = s.n * (S if last else S * (S + 1) // 2)
        if layer:
            yield S * s.h, layer, layer
        yield Q * s.h + 2 * S * s.kv, layer, layer
        yield pairs, layer, layer
        yield Q * s.h, layer + (not last), layer
        yield Q * fc1, layer + (not last), layer
    yield s.h, s.L - 1, s.L - 1


def counts(shape: Shape, S: int, p: int, memory: float, itemsize: int = 4) -> dict[str, float]:
    """For one rank, rows of A in chunks of `memory` bytes."""
    widest = max(shape.f * (shape.matrices - 1), shape.h + 2 * shape.kv)
    at_once = max(1, int(memory // (2 * S * widest * itemsize)))
    found = {"flops": 0.0, "A": 0.0, "weights": 0.0}
    # Of attention: 13 numbers a pair of positions, and a [d, d] matrix for each that is not masked.
    tables = 13 * shape.n * S * S + shape.h**2 // shape.n * S * (S + 1) // 2
    for rows, attention, mlp in starts(shape, S):
        own = -(-rows // p)
        chunks = -(-own // at_once)
        found["flops"] += 2 * 2 * own * S * (
            attention * shape.attention() + mlp * shape.mlp()
        )
        found["A"] += (p - 1) * own * 2 * itemsize * 2 * S * shape.h * (attention + mlp)
        shards = attention * (shape.attention() + tables) + mlp * (shape.mlp() + 4 * S * shape.f)
        found["weights"] += (p - 1) / p * chunks * shards * itemsize
    layer = shape.attention() + shape.mlp()
    found["weight bytes"] = shape.L * layer * itemsize / p
    found["A bytes"] = 5 * memory
    found["gathered"] = 2 * max(shape.attention(), shape.mlp()) * itemsize
    return found


def of_stages(shape: Shape, S: int, p: int, split: list[int], itemsize: int = 4) -> list[dict]:
    """For one rank of each pipeline stage: rows that go down, bytes, products, weights."""
    found, begin = [], 0
    for layers in split:
        end, flops, rows_down = begin + layers, 0.0, 0
        for rows, attention, mlp in starts(shape, S):
            own = -(-rows // p)
            passed = [max(0, min(count, end) - begin) for count in (attention, mlp)]
            flops += 4 * own * S * (passed[0] * shape.attention() + passed[1] * shape.mlp())
            # What begins at this stage's layers or behind them crosses its input.
            rows_down += own * (0 < begin <= mlp)
        found.append({
            "flops": flops, "rows": rows_down,
            "bytes": 2 * itemsize * rows_down * (S * shape.h + 1),
            "weights": layers * (shape.attention() + shape.mlp()) * itemsize / p,
        })
        begin = end
    return found


def print_stages(S: int, p: int, rate: float, link: float) -> None:
    """Stages of the largest models, with the split that balances passes and with an even one."""
    from lirpa_megatron.crown.stage_split import balanced_split

    print("\n| model | PP | layers | most weights, GiB | products of the busiest, s | most sent "
          "down by a rank, GB | s |\n" + "|---" * 7 + "|")
    for shape in SHAPES[3:]:
        for stages in (1, 2, 4, 8):
            splits = [balanced_split(shape.L, stages), [shape.L // stages] * stages]
            for split in splits[: 1 + (stages > 1)]:
                found = of_stages(shape, S, p, split)
                sent = max(x["bytes"] for x in found)
                print(f"| {shape.name} | {stages} | {' + '.join(map(str, split))} "
                      f"| {max(x['weights'] for x in found) / GIB:.3g} "
                      f"| {max(x['flops'] for x in found) / rate:,.3g} | {sent / 1e9:,.3g} "
                      f"| {sent / link:,.3g} |")
    small = of_stages(Shape("6 x 128", 6, 128, 512, 4, 128), 4, 1, [2, 4])
    print("\n6 x 128, 4 tokens, layers 2 + 4: " + ", ".join(
        f"{name} {[f'{x[name]:.4g}' for x in small]}" for name in ("rows", "bytes", "flops")))


def main() -> None:
    S, p, rate, link, memory = 16, 8, 40e12, 3e11, 4 * GIB
    print(f"{S} tokens, TP={p}, {rate / 1e12:.0f} TFLOP/s in float32, {link / 1e9:.0f} GB/s, rows "
          f"of A in chunks of {memory / GIB:.0f} GiB\n")
    print("| model | weights, GiB | chunks of A, GiB | gathered at a time, GiB | products, s | "
          "moving A, s | moving weights, s |\n" + "|---" * 7 + "|")
    for shape in SHAPES[1:]:
        c = counts(shape, S, p, memory)
        cells = [c["weight bytes"] / GIB, c["A bytes"] / GIB, c["gathered"] / GIB,
                 c["flops"] / rate, c["A"] / link, c["weights"] / link]
        print(f"| {shape.name} | " + " | ".join(f"{x:,.3g}" for x in cells) + " |")
    small = counts(SHAPES[0], 8, 2, 2**23)
    print("\n3 x 128, 8 tokens, TP=2: " + ", ".join(
        f"{name} {small[name]:.4g}" for name in ("flops", "A", "weights")))
    print_stages(S, p, rate, 5e10)


if __name__ == "__main__":
    main()
