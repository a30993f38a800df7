"""The two models of certified_training.py, each with its data, losses and evaluation.

Both have: `model` and Megatron's `config`, `count` training inputs, `batch`, `eps`, `radii` and
`epochs` (natural, certified); `groups(phase)` of parameters for the optimizer; of training inputs
by index the natural `loss`, the `inputs` and `labels` for `loss_of` (a CertifiedLoss); of held-out
ones what is `right` (under a gradient attack of radius eps) and `certified`; and `save`.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    bert_head,
    classification_margins,
    parallelize,
    perturb_tokens,
)
from lirpa_megatron.checkpoint.language_model import load_language_model
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime
from lirpa_megatron.training import CertifiedLoss

SST = Path(__file__).resolve().parent / "sst"
sys.path.insert(0, str(SST))
import sst_data  # noqa: E402
import train as sst_train  # noqa: E402


def attacked(loss_at, x, low, high, steps=20):
    """Points of the boxes that raise the loss, by projected gradient ascent."""
    point = low + (high - low) * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        point = point.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(loss_at(point), point)
        point = torch.minimum(torch.maximum(point + 1.25 * (high - low) / steps * slope.sign(),
                                            low), high)
    return point.detach()


class Digits:
    """784-256-256-10, column- and row-parallel, the same function at every size."""

    title, widths, classes, held_out = "Digits, held-out images", (784, 256, 256, 10), 10, 360
    epochs, batch = (10, 60), 128
    eps, radii = 0.1, (0.01, 0.02, 0.05, 0.1, 0.15)

    def __init__(self, _, limit):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("the digits are scikit-learn's: pip install scikit-learn") from None

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        images = torch.tensor(digits.images[order] / 16).float().unsqueeze(1)
        x = F.interpolate(images, size=(28, 28), mode="bilinear").flatten(1)
        y = torch.tensor(digits.target[order])
        self.x, self.y = x[: -self.held_out], y[: -self.held_out]
        self.held_x, self.held_y = x[-self.held_out :][:limit], y[-self.held_out :][:limit]
        torch.manual_seed(0)
        layers = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.model = parallelize(nn.Sequential(*layers[:-1]))
        self.config = TransformerConfig(  # Megatron's reductions ask it for the parallel sizes
            num_layers=1, hidden_size=self.widths[1], num_attention_heads=runtime.tp_size(),
            tensor_model_parallel_size=runtime.tp_size(),
        )
        self.loss_of = CertifiedLoss(
            self.model, (x[:1],), num_classes=self.classes, method="CROWN-IBP"
        )
        self.bounded = BoundedModule(self.model, x[:1])
        self.count = len(self.x)

    def groups(self, phase):
        rate = {"natural": 1e-2, "certified": 2e-3}[phase]
        return [{"params": list(self.model.parameters()), "lr": rate}]

    def loss(self, index):
        return F.cross_entropy(self.model(self.x[index]), self.y[index])

    def inputs(self, index, eps):
        return (self.box(self.x[index], eps),)

    def labels(self, index):
        return self.y[index]

    @staticmethod
    def box(x, eps):
        """Images whose pixels move by up to eps within [0, 1]."""
        low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        return BoundedTensor(x, PerturbationLpNorm(norm=math.inf, x_L=low, x_U=high))

    def right(self, eps):
        x, y = self.held_x, self.held_y
        if eps is not None:
            box = self.box(x, eps).ptb
            x = attacked(lambda z: F.cross_entropy(self.model(z), y), x, box.x_L, box.x_U)
        with torch.no_grad():
            return self.model(x).argmax(1) == y

    @torch.no_grad()
    def certified(self, eps):
        self.bounded.eval()
        C = classification_margins(self.held_y, self.classes)
        lower, _ = self.bounded.compute_bounds(
            (self.box(self.held_x, eps),), C=C, method="CROWN", bound_upper=False
        )
        return lower.amin(1) > 0

    def save(self, folder):
        return ""


class Sentences:
    """The BERT of examples/sst on sentences of up to seven words, whose embeddings move."""

    title, length, vocabulary = "SST, development set", 8, SST / "vocab.txt"
    epochs, batch = (0, 60), 64
    eps, radii = 0.05, (0.01, 0.02, 0.05, 0.1)

    def __init__(self, data, limit):
        if not (data / "train.jsonl").is_file():
            raise UserError(f"there is no {data}/train.jsonl: name the folder of SST with --data")
        words = self.vocabulary.read_text(encoding="utf-8").splitlines()
        self.parts = {}
        for split in ("train", "dev"):
            records = [record for record in sst_data.read(data, split)
                       if len(sst_data.words_of(record["sentence"])) < self.length]
            if split == "dev":
                records = records[: limit or 30]
            sentences = sst_data.encode(records, words, self.length)
            ids = nn.utils.rnn.pad_sequence(
                sentences, batch_first=True, padding_value=sst_data.PADDING
            )
            labels = torch.tensor([record["label"] for record in records])
            self.parts[split] = records, ids, labels
        self.records, self.held, self.held_labels = self.parts["dev"]
        group = parallel_state.get_tensor_model_parallel_group()
        _, self.model = load_language_model(SST / "checkpoint", group)
        self.model.requires_grad_(True).train()
        self.config, self.count = self.model.config, len(self.parts["train"][1])
        self.view = bert_head(self.model, "binary")
        self.loss_of = CertifiedLoss(
            self.view, self.of(self.parts["train"][1][:1], 0.0), num_classes=2, method="IBP"
        )
        self.graphs, self.margins = {}, {}

    def of(self, ids, eps):
        """Embeddings of which those of words (not [CLS], not [PAD]) move by up to eps."""
        mask = (ids != sst_data.PADDING).long()
        moved = mask.clone().float()
        moved[:, 0] = 0
        return perturb_tokens(self.view, ids, eps=eps * moved, attention_mask=mask,
                              tokentype_ids=torch.zeros_like(ids))

    def groups(self, _):
        words = self.model.embedding.word_embeddings.weight
        others = [p for p in self.model.parameters() if p is not words]
        # Bounds get tighter first of all by words that lie further apart.
        return [{"params": [words], "lr": 5e-3}, {"params": others, "lr": 5e-4}]

    def logits(self, hidden, ids):
        mask = (ids != sst_data.PADDING).long()
        return sst_train.classify(self.model, hidden, mask)

    def loss(self, index):
        _, ids, labels = self.parts["train"]
        hidden = sst_train.embed(self.model, ids[index])
        return F.cross_entropy(self.logits(hidden, ids[index]), labels[index])

    def inputs(self, index, eps):
        return self.of(self.parts["train"][1][index], eps)

    def labels(self, index):
        return self.parts["train"][2][index]

    def right(self, eps):
        with torch.no_grad():
            hidden = sst_train.embed(self.model, self.held)  # [S, B, h]
        if eps is not None:
            moved = (self.held != sst_data.PADDING).float()
            moved[:, 0] = 0
            radii = eps * moved.t().unsqueeze(-1)
            hidden = attacked(
                lambda x: F.cross_entropy(self.logits(x, self.held), self.held_labels),
                hidden, hidden - radii, hidden + radii,
            )
        with torch.no_grad():
            return self.logits(hidden, self.held).argmax(-1) == self.held_labels

    @torch.no_grad()
    def certified(self, eps):
        """Sentence by sentence, without padding; the replicas share them."""
        replicas = parallel_state.get_data_parallel_world_size()
        own = range(parallel_state.get_data_parallel_rank(), len(self.held), replicas)
        found = {i: self.margin(self.held[i], self.held_labels[i], eps) for i in own}
        everyone = [None] * replicas
        torch.distributed.all_gather_object(
            everyone, found, group=parallel_state.get_data_parallel_group()
        )
        found = {i: margin for part in everyone for i, margin in part.items()}
        self.margins[eps] = [found[i] for i in range(len(self.held))]
        return torch.tensor(self.margins[eps]) > 0

    def margin(self, ids, label, eps):
        """The lower bound of the right class's margin."""
        ids = ids[ids != sst_data.PADDING].unsqueeze(0)
        inputs = self.of(ids, eps)
        graph = self.graphs.get(ids.shape[1])
        if graph is None:
            graph = self.graphs[ids.shape[1]] = BoundedModule(self.view, self.of(ids, 0.0))
        graph.eval()
        C = classification_margins(label.unsqueeze(0), 2).to(inputs[0])
        lower, _ = graph.compute_bounds(inputs, C=C, method="CROWN", bound_upper=False)
        return lower.item()

    def save(self, folder):
        """A checkpoint as Megatron-LM writes it, its vocabulary, and what was certified of it."""
        checkpoint, data = folder / "checkpoint", folder / "certified.jsonl"
        words = self.vocabulary.read_text(encoding="utf-8")
        if runtime.is_rank0():
            shutil.rmtree(checkpoint, ignore_errors=True)  # that of an earlier run
        torch.distributed.barrier()
        args = sst_train.megatron_arguments(
            sst_train.parse_arguments(["--save", str(checkpoint)]), len(words.splitlines())
        )
        sst_train.save(self.model, args, 1, checkpoint)
        if not runtime.is_rank0():
            return ""
        (checkpoint / "vocab.txt").write_text(words, encoding="utf-8")
        margins = self.margins[self.eps]
        with data.open("w", encoding="utf-8") as file:
            for i, (record, margin) in enumerate(zip(self.records, margins, strict=True)):
                entry = {"id": str(i), "sentence": record["sentence"], "label": record["label"]}
                file.write(json.dumps({**entry, "eps": self.eps, "margin": margin}) + "\n")
        return (f"checkpoint: {checkpoint}\nthe same bounds again: lirpa-megatron verify --load "
                f"{checkpoint} --data {data} --question certify --eps {self.eps}\n")


MODELS = {"digits": Digits, "sentences": Sentences}
