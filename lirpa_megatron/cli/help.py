"""What the command line's help says below its options."""

EXAMPLES = """examples:
  lirpa-megatron import-onnx net.onnx.gz checkpoint
  lirpa-megatron verify --load checkpoint --vnnlib prop.vnnlib --output results.jsonl
  lirpa-megatron inspect checkpoint
  torchrun --nproc-per-node 2 -m lirpa_megatron verify --instances instances.csv --method CROWN
  torchrun --nproc-per-node 2 -m lirpa_megatron verify --load checkpoint --data reviews.jsonl
  lirpa-megatron report results.jsonl --output report.html
"""
RESULTS = """results:
  unsat    the property holds for every input of the set; strict comparisons are proved as closed
           ones; a set without inputs, or output constraints that contradict each other, too (note)
  sat      the attack found an input, in the box as written, at which the network as it is stored
           (float32, ...) violates the property exactly, and so do its weights in float64, or by
           more than rounding explains: violation and float64_violation say by how much
  unknown  neither; a violation that is not beyond rounding is a note
  timeout, error; of sentences also misclassified (wrong without any perturbation)
exit status: 0 all decided or unknown, 1 an input errored, 2 bad usage, 143 ended by SIGTERM

"""
