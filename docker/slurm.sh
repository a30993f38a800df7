#!/usr/bin/env bash
# Verifies a checkpoint on a Slurm cluster, in containers (the pyxis plugin's --container options).
#
#   CHECKPOINT=... DATA=.../data.jsonl RESULTS=... IMAGE=... sbatch docker/slurm.sh
#
# The number of processes, nodes times GPUs, is the tensor-parallel size.
#
#SBATCH --job-name=lirpa-megatron
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
# The job may be queued again at any time, by us when its time is up, by Slurm when it is preempted
# or a node fails: --resume goes on behind the last whole result.
#SBATCH --requeue
#SBATCH --open-mode=append
# To this script alone (B:), and USR1 since scancel sends TERM, after which nothing may come back.
#SBATCH --signal=B:USR1@120
set -euo pipefail

: "${CHECKPOINT:?folder of the checkpoint}"
: "${DATA:?file of inputs, JSON lines}"
: "${RESULTS:?folder for the results}"
: "${IMAGE:?container image, made from docker/Dockerfile}"
CONFIG=${CONFIG:-$SLURM_SUBMIT_DIR/docker/job.yaml}
PORT=${PORT:-29500}

mounts=$CHECKPOINT:/checkpoint:ro,$DATA:/data/data.jsonl:ro
mounts+=,$CONFIG:/config/job.yaml:ro,$RESULTS:/results
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}

queue_again() {
    echo "time is nearly up: queueing the job again, it will resume" >&2
    kill -TERM "$step" 2>/dev/null || true
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap queue_again USR1

# In the background, or bash would look at the signal only after it.
srun --kill-on-bad-exit=1 --container-image="$IMAGE" --container-mounts="$mounts" \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$PORT" --rdzv-id="$SLURM_JOB_ID" \
    -m lirpa_megatron verify \
    --load /checkpoint --data /data/data.jsonl --config /config/job.yaml \
    --output /results/results.jsonl --resume &
step=$!
wait "$step"
