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
  unsat    the property holds for every input of the set; strict comparisons are proved with their
           closed form. Also if the set is empty or the output constraints contradict each other
           (see the note)
  sat      the attack found an input inside the box as written at which the network as stored
           (float32, ...) violates the property, and float64 agrees or the violation is clearly
           more than rounding (see violation and float64_violation)
  unknown  neither a proof nor a counterexample; a violation within rounding is noted
  timeout, error; for sentences also misclassified (wrong without any perturbation)
exit status: 0 all decided or unknown, 1 an input caused an error, 2 bad usage, 143 SIGTERM

"""
