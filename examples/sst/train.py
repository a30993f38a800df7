"""Trains a small Megatron BERT to tell good reviews from bad ones, and saves its checkpoint.

    python examples/sst/train.py --save CHECKPOINT
    torchrun --nproc-per-node 2 examples/sst/train.py --save CHECKPOINT

Every process is a tensor-parallel rank. The class is that of the binary head, which looks at the
first token, [CLS]. The options are named as Megatron-LM's, and so is what the checkpoint holds:
torch_dist format, with the arguments in common.pt; any tensor-parallel size loads it. Two choices
make the model one that can be certified: where the words start (`build`), and that half of the loss
is that of embeddings moved against the model (`backward`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import sst_data
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.transformer_config import TransformerConfig
from tqdm import tqdm

from lirpa_megatron.checkpoint.writer import check_output
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data" / "sst"


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options, and what Megatron-LM derives from its own; the checkpoint keeps them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA,
                        help="folder of train.jsonl and dev.jsonl (default: %(default)s)")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--vocab-file", type=Path,
                        help="to write, one word a line (default: vocab.txt beside the checkpoint)")
    parser.add_argument("--vocab-least", type=int, default=2,
                        help="how often a word must occur in train.jsonl")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--ffn-hidden-size", type=int, default=128)
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=64, help="tokens, with [CLS]")
    parser.add_argument("--hidden-dropout", type=float, default=0.3)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--word-dropout", type=float, default=0.2,
                        help="how often a word is read as [UNK] in training")
    parser.add_argument("--adversarial-eps", type=float, default=0.03,
                        help="L-inf radius of adversarial training; 0: none")
    parser.add_argument("--init-method-std", type=float, default=0.02)
    parser.add_argument("--embedding-init-method-std", type=float, default=0.4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decoupled-lr", type=float, default=1e-2,
                        help="learning rate of the embeddings")
    parser.add_argument("--lr-warmup-fraction", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(given)
    args.vocab_file = args.vocab_file or args.save.parent / "vocab.txt"
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for files that cannot be written and sizes that do not go together."""
    if args.save.exists():
        raise UserError(f"{args.save} exists already: choose another name with --save")
    check_output(args.save, force=False)
    if not args.vocab_file.parent.is_dir():
        raise UserError(f"cannot write {args.vocab_file}: there is no such folder")
    tp = runtime.tp_size()
    for name in ("hidden_size", "num_attention_heads", "ffn_hidden_size"):
        if getattr(args, name) % tp != 0:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} is not divisible by "
                f"tensor-parallel size {tp}"
            )
    if args.hidden_size % args.num_attention_heads != 0:
        raise UserError(
            f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads "
            f"{args.num_attention_heads}"
        )


def megatron_arguments(args: argparse.Namespace, words: int) -> argparse.Namespace:
    """`args` and the fields that Megatron-LM's parser and set-up add to its own."""
    tp, divisor = runtime.tp_size(), 128
    derived = dict(
        encoder_num_layers=args.num_layers, encoder_seq_length=args.seq_length,
        max_position_embeddings=args.seq_length, add_position_embedding=True,
        position_embedding_type="learned_absolute", rotary_percent=1.0,
        kv_channels=args.hidden_size // args.num_attention_heads,
        group_query_attention=False, num_query_groups=1, qk_layernorm=False,
        multi_latent_attention=False, num_experts=None,
        normalization="LayerNorm", norm_epsilon=1e-5, layernorm_epsilon=1e-5,
        apply_layernorm_1p=False, apply_residual_connection_post_layernorm=False,
        # GELU with erf: the fused one is the tanh approximation, and asks for a compiler.
        swiglu=False, squared_relu=False, quick_geglu=False, openai_gelu=False, onnx_safe=None,
        bias_gelu_fusion=False, bias_swiglu_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
        no_persist_layer_norm=True, attention_softmax_in_fp32=False,
        disable_bias_linear=False, add_bias_linear=True, add_qkv_bias=True,
        untie_embeddings_and_output_weights=False,
        bert_binary_head=True, vocab_size=words, make_vocab_size_divisible_by=divisor,
        padded_vocab_size=-(-words // (divisor * tp)) * divisor * tp,
        params_dtype=torch.float32, bf16=False, fp16=False, use_cpu_initialization=True,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=1, context_parallel_size=1,
        expert_model_parallel_size=1, virtual_pipeline_model_parallel_size=None,
        data_parallel_size=1, world_size=tp, sequence_parallel=False,
        transformer_impl="local", spec=None, fp8=None, ckpt_format="torch_dist",
    )
    # Folders are this machine's business, and paths are no plain data.
    own = {n: v for n, v in vars(args).items() if n not in ("data", "save", "vocab_file")}
    return argparse.Namespace(**own, **derived)


def build(args: argparse.Namespace) -> BertModel:
    """The model that Megatron-LM's pretrain_bert.py would build from `args`, not pipelined."""
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size, num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        use_cpu_initialization=True,  # every rank draws the full weights and keeps its part
        init_method_std=args.init_method_std,
        embedding_init_method_std=args.embedding_init_method_std,
        hidden_dropout=args.hidden_dropout, attention_dropout=args.attention_dropout,
        layernorm_epsilon=args.norm_epsilon, params_dtype=args.params_dtype,
        bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
    )
    model = BertModel(
        config, num_tokentypes=2, transformer_layer_spec=bert_layer_local_spec,
        vocab_size=args.padded_vocab_size, max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=True, add_binary_head=True,
    )
    # All words start alike, far from the origin (at the position's and the token type's vectors):
    # then LayerNorm is nearly linear in what a word adds, and bounds through it are tight.
    torch.nn.init.zeros_(model.embedding.word_embeddings.weight)
    return model


def embed(model: BertModel, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [B, S] -> hidden states [S, B, h], whole on every rank."""
    return model.embedding(ids, model.bert_position_ids(ids), torch.zeros_like(ids))


def classify(model: BertModel, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states [S, B, h] -> [B, 2]: BertModel's forward without the logits of the words."""
    hidden = model.encoder(hidden, model.bert_extended_attention_mask(mask))
    return model.binary_head(model.pooler(hidden))


def accuracy(model: BertModel, sentences: list[torch.Tensor], labels: torch.Tensor) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        order = torch.arange(len(labels)).split(256)
        for ids, mask, expected in sst_data.batches(sentences, labels, order):
            right += (classify(model, embed(model, ids), mask).argmax(-1) == expected).sum().item()
    model.train()
    return right / len(labels)


def backward(
    model: BertModel, batch: sst_data.Batch, word_dropout: float, eps: float
) -> torch.Tensor:
    """The loss of a batch, some of its words unknown, and its gradients.

    With eps > 0, half of the loss is that of the hidden states one step uphill, on the border of
    the L-inf ball. The gradient of hidden states is whole on every rank, so all take the same step.
    """
    ids, mask, labels = batch
    dropped = torch.rand(ids.shape) < word_dropout
    ids = torch.where(dropped & (ids >= len(sst_data.SPECIAL)), sst_data.UNKNOWN, ids)
    hidden = embed(model, ids)
    hidden.retain_grad()
    loss = F.cross_entropy(classify(model, hidden, mask), labels)
    if eps == 0:
        loss.backward()
        return loss.detach()
    (loss / 2).backward()
    moved = embed(model, ids) + eps * hidden.grad.sign()
    attacked = F.cross_entropy(classify(model, moved, mask), labels)
    (attacked / 2).backward()
    return (loss.detach() + attacked.detach()) / 2


def train(
    model: BertModel, sentences: dict[str, list[torch.Tensor]], labels: dict[str, torch.Tensor],
    args: argparse.Namespace,
) -> int:
    """Trains the model on the 'train' split; returns the number of iterations."""
    count = len(labels["train"])
    # Gradients are in the buffers of Megatron's DDP; its optimizers need CUDA, torch's do not.
    parallel = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    words = model.embedding.word_embeddings.weight
    start = [p for p in model.embedding.parameters() if p is not words]
    others = [p for p in model.parameters() if all(p is not q for q in (words, *start))]
    groups = [
        {"params": [words], "lr": args.decoupled_lr, "weight_decay": args.weight_decay},
        {"params": [p for p in others if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": start + [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    total = args.epochs * -(-count // args.global_batch_size)
    warmup = max(1, round(args.lr_warmup_fraction * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (total - i) / max(1, total - warmup))
    )
    generator = torch.Generator().manual_seed(args.seed)  # the same at every tensor-parallel size
    progress = tqdm(total=total, unit="batch", disable=not runtime.is_rank0())
    iteration = 0
    for epoch in range(args.epochs):
        mean = 0.0
        order = sst_data.shuffled(sentences["train"], args.global_batch_size, generator)
        for batch in sst_data.batches(sentences["train"], labels["train"], order):
            parallel.zero_grad_buffer()
            # A model that knows nothing yet would learn nothing under attack.
            eps = args.adversarial_eps * min(1.0, max(0.0, 2 * iteration / total - 2 / 3))
            loss = backward(model, batch, args.word_dropout, eps)
            finalize_model_grads([parallel])
            for parameter in model.parameters():
                parameter.grad = parameter.main_grad
            optimizer.step()
            schedule.step()
            iteration += 1
            mean += loss.item() * len(batch.labels) / count
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()
        right = accuracy(model, sentences["dev"], labels["dev"])
        if runtime.is_rank0():
            progress.write(f"epoch {epoch + 1}: loss {mean:.4f}, dev accuracy {right:.4f}")
    progress.close()
    return iteration


def save(model: BertModel, args: argparse.Namespace, iteration: int, folder: Path) -> None:
    """Writes a checkpoint as Megatron-LM does; the tracker file comes last."""
    directory = folder / f"iter_{iteration:07d}"
    if runtime.is_rank0():
        directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {
        "args": args, "checkpoint_version": 3.0, "iteration": iteration,
        "model": model.sharded_state_dict(metadata={"dp_cp_group": group}),
    }
    dist_checkpointing.save(state, str(directory), ("torch_dist", 1))
    if runtime.is_rank0():
        tracker = folder / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(iteration), encoding="ascii")


def main() -> None:
    options = parse_arguments()
    check_arguments(options)
    records = {split: sst_data.read(options.data, split) for split in ("train", "dev")}
    words = sst_data.vocabulary(records["train"], options.vocab_least)
    args = megatron_arguments(options, len(words))
    labels = {split: torch.tensor([r["label"] for r in records[split]]) for split in records}
    sentences = {s: sst_data.encode(records[s], words, args.seq_length) for s in records}

    torch.manual_seed(args.seed)  # weights and dropout of whole tensors: the same on every rank
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)  # dropout of each rank's heads
    torch.set_num_threads(1)
    model = build(args)
    start = time.monotonic()
    iteration = train(model, sentences, labels, args)
    seconds = time.monotonic() - start
    found = {split: accuracy(model, sentences[split], labels[split]) for split in records}
    save(model, args, iteration, options.save)
    if runtime.is_rank0():
        options.vocab_file.write_text("\n".join(words) + "\n", encoding="utf-8")
        print(f"trained {iteration} iterations in {seconds:.0f} s on {runtime.tp_size()} "
              f"tensor-parallel ranks: accuracy train {found['train']:.4f}, dev {found['dev']:.4f}")


if __name__ == "__main__":
    with runtime.session():  # all torchrun processes, or this one
        try:
            main()
        except UserError as error:
            if runtime.is_rank0():
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
