"""How many layers each pipeline stage gets, so that all do as much of the verification.

In training every layer costs the same, and stages of as many layers are balanced. Bounding is
different. With L layers, layer i (from 0) is passed by the rows of every start node behind it:
those of a later layer count 1, its own, which begin inside of it, one half. The last layer's count
half of that: a language model is read at one position, for which its last layer needs few rows, and
the output of another network has few. That makes L - 1 - i for layer i, and 1/4 for the last one. A
stage of the layers a to b - 1, b < L, costs the sum of these,

    cost(a, b) = sum over a <= i < b of (L - 1 - i) = (b - a) (L - (a + b + 1) / 2)

so early layers are dear, and the layers from a on cost about (L - a)^2 / 2 together. Of P stages,
stage s would begin where P - s of P parts of the cost are left: at L (1 - sqrt(1 - s / P)). With
two stages the first has 0.29 of the layers, with four 0.13, 0.16, 0.21 and 0.5. The last stage
therefore holds more of the weights than an even split would give it.

Not counted: embeddings, the output layer, and the one pass of the specification, whose rows are
few.
"""

from __future__ import annotations

from lirpa_megatron.errors import UserError


def stage_cost(begin: int, end: int, layers: int) -> float:
    """Passes through the layers `begin` to `end` - 1 of a model of `layers` layers, in layers."""
    last = 0.25 if begin < end == layers else 0.0  # by the formula it costs nothing
    return (end - begin) * (layers - (begin + end + 1) / 2) + last


def balanced_split(layers: int, stages: int) -> list[int]:
    """Layers of each stage, from the model's input on: the least cost of the dearest stage.

    Of several such splits, the one with most layers on the first stages: the later the borders, the
    fewer rows cross them.

    Args:
        layers: of the model.
        stages: pipeline-parallel size.

    Raises:
        UserError: more stages than layers, or none.
    """
    if not 1 <= stages <= layers:
        raise UserError(
            f"{layers} layers cannot be split into {stages} pipeline stages: each needs a layer, "
            f"so choose a pipeline-parallel size from 1 to {layers}"
        )
    # best[a]: (cost of the dearest stage, minus the split) of the layers from a on
    best = {a: (stage_cost(a, layers, layers), [a - layers]) for a in range(layers)}
    for others in range(1, stages):
        best = {
            a: min(
                (max(stage_cost(a, b, layers), best[b][0]), [a - b, *best[b][1]])
                for b in range(a + 1, layers - others + 1)
            )
            for a in range(layers - others)
        }
    return [-n for n in best[0][1]]
