"""Values of a query's variables, as the VNN-LIB standard prints them.

A line with name, type and shape of each tensor in the order of their declarations, then a line for
each of its elements in row-major order. A property of VNN-LIB 1.0 has the tensors X and Y.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from lirpa_megatron.verify.properties.counterexamples import Counterexample
from lirpa_megatron.verify.properties.property import Declared, Property, Tensor


def assignment(prop: Property, found: Counterexample) -> list[str]:
    """The lines of a counterexample's values."""
    inputs, outputs = iter(prop.declared_inputs(found.point)), iter(found.outputs)
    handed_on = 0 if prop.wiring is None else len(prop.wiring.handed_on)
    networks: Sequence[Declared] = prop.networks or (
        Declared("", *(
            (Tensor(name, "real", (size,)),)
            for name, size in (("X", prop.n_in), ("Y", prop.n_out - handed_on))
        )),
    )
    lines = []
    for network in networks:
        for tensors, values in ((network.inputs, inputs), (network.outputs, outputs)):
            for tensor in tensors:
                shape = ",".join(map(str, tensor.shape))
                lines.append(f"{tensor.name} {tensor.dtype} [{shape}]")
                lines += [_written(next(values)) for _ in range(tensor.size)]
    return lines


def _written(value: float) -> str:
    """All digits, and no exponent, which VNN-LIB 2.0 does not have."""
    digits = format(Decimal(repr(value)), "f")
    return digits if "." in digits else f"{digits}.0"
