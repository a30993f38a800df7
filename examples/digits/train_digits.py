"""Trains the demo's classifier of handwritten digits and writes what `make demo` verifies.

    python examples/digits/train_digits.py

The images are the 8x8 scans of real handwriting bundled in scikit-learn, pixels scaled to [0, 1].
Training is adversarial (projected gradient): a plainly trained network is accurate too, but no
useful radius around its inputs can be certified. Written beside this file:

digits.onnx             64-128-64-128-64-10 with ReLU: two Column/Row pairs and an output layer
properties/*.vnnlib     "no other digit scores higher", for held-out images and three radii
instances.csv           network, property, timeout in seconds: the columns of VNN-COMP
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
WIDTHS = (64, 128, 64, 128, 64, 10)
HELD_OUT = 360  # of 1797 images
EPOCHS, BATCH = 40, 64
TRAIN_RADIUS, TRAIN_STEPS = 0.1, 5
VERIFIED = range(5)  # the first held-out images, fixed before anything was verified
RADII = (0.02, 0.05, 0.1)
TIMEOUT = 60


def images():
    """(train x, train y, held-out x, held-out y); x is [images, 64] float32 in [0, 1]."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    return x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]


def network():
    layers = []
    for inputs, outputs in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def attack(model, x, y, radius, steps):
    """Points of the L-inf ball around x, within [0, 1], that raise the loss; shaped like x."""
    low, high = (x - radius).clamp(0, 1), (x + radius).clamp(0, 1)
    point = low + (high - low) * torch.rand_like(x)
    for _ in range(steps):
        point.requires_grad_(True)
        (slope,) = torch.autograd.grad(functional.cross_entropy(model(point), y), point)
        point = (point.detach() + 2.5 * radius / steps * slope.sign()).clamp(low, high)
    return point


def train(model, x, y):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, epochs=EPOCHS, steps_per_epoch=-(-len(x) // BATCH)
    )
    for epoch in range(EPOCHS):
        radius = TRAIN_RADIUS * min(1, 2 * epoch / EPOCHS)
        for rows in torch.randperm(len(x)).split(BATCH):
            point = attack(model, x[rows], y[rows], radius, TRAIN_STEPS)
            optimizer.zero_grad()
            functional.cross_entropy(model(point), y[rows]).backward()
            optimizer.step()
            schedule.step()


def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


def export(model, path):
    """The layers as Gemm and Relu nodes: a file that needs no exporter and never changes shape."""
    nodes, weights, value = [], [], "input"
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for i, linear in enumerate(linears):
        last = i == len(linears) - 1
        names = [f"layers.{i}.weight", f"layers.{i}.bias"]
        for name, tensor in zip(names, (linear.weight, linear.bias), strict=True):
            weights.append(numpy_helper.from_array(tensor.detach().numpy(), name))
        product = "logits" if last else f"layers.{i}.output"
        nodes.append(helper.make_node("Gemm", [value, *names], [product], transB=1))
        value = product
        if not last:
            value = f"layers.{i}.relu"
            nodes.append(helper.make_node("Relu", [product], [value]))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, WIDTHS[0]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, WIDTHS[-1]])],
        weights,
    )
    opset = [helper.make_opsetid("", 13)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def vnnlib(image, label, radius):
    """The negated claim, as VNN-LIB wants it: a point of the box where another digit wins."""
    lines = [f"; Digits property with label: {label}.", ""]
    lines += [f"(declare-const X_{i} Real)" for i in range(WIDTHS[0])]
    lines += ["", *(f"(declare-const Y_{i} Real)" for i in range(WIDTHS[-1])), ""]
    lines += ["; Input constraints:"]
    low, high = (image - radius).clamp(0, 1).tolist(), (image + radius).clamp(0, 1).tolist()
    for i in range(WIDTHS[0]):
        lines += [f"(assert (<= X_{i} {high[i]!r}))", f"(assert (>= X_{i} {low[i]!r}))", ""]
    lines += ["; Output constraints:", "(assert (or"]
    lines += [f"    (and (>= Y_{i} Y_{label}))" for i in range(WIDTHS[-1]) if i != label]
    return "\n".join([*lines, "))", ""])


def write_properties(x, y, folder):
    """instances.csv and properties/ in `folder`; returns the number of instances."""
    (folder / "properties").mkdir(exist_ok=True)
    rows = []
    for radius in RADII:
        for i in VERIFIED:
            name = f"properties/digit_{i}_eps_{radius}.vnnlib"
            (folder / name).write_text(vnnlib(x[i], int(y[i]), radius))
            rows.append(f"digits.onnx,{name},{TIMEOUT}\n")
    (folder / "instances.csv").write_text("".join(rows))
    return len(rows)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one order of summation
    train_x, train_y, test_x, test_y = images()
    model = network()
    train(model, train_x, train_y)
    print(f"accuracy on {len(train_x)} training images: {accuracy(model, train_x, train_y):.1%}")
    print(f"accuracy on {len(test_x)} held-out images: {accuracy(model, test_x, test_y):.1%}")
    export(model, HERE / "digits.onnx")
    instances = write_properties(test_x, test_y, HERE)
    print(f"wrote digits.onnx and {instances} properties")


if __name__ == "__main__":
    main()
