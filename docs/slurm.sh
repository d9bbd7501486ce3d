#!/bin/bash
# One training run on the hosts of a Slurm cluster. It is stopped before its time limit, saved, queued
# again, and continued until all of its steps are done.
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 docs/slurm.sh --data_root /shared/edu_fineweb10B
#
# Submit it from the repository. Options of sbatch come before the name of this file, flags of
# train_gpt2.py after it. The repository and LOG_DIR (log) have to lie on a disk that all hosts see.
# PROCESSES is how many run on each host: one for each GPU.

#SBATCH --job-name=gpt2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
#SBATCH --signal=B:USR1@120

LOG_DIR=${LOG_DIR:-log}
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# The last record of a finished run's log: kind "end", no error, and all steps done.
is_finished() {
    tail -n 1 "$LOG_DIR/log.jsonl" 2>/dev/null | python -c '
import json, sys
record = json.loads(sys.stdin.read() or "{}")
done = record.get("kind") == "end" and "error" not in record
sys.exit(not (done and record["step"] >= record["max_steps"]))'
}

# 120 seconds before the time limit Slurm sends USR1 to this shell. SIGTERM makes the run save.
stopped=no
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# One torchrun on each host; it starts this host's processes.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$PROCESSES" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$first_host:$port" --rdzv_id="$SLURM_JOB_ID" \
    train_gpt2.py --auto_resume --log_dir "$LOG_DIR" "$@" &
while kill -0 $! 2>/dev/null; do
    wait $!  # a signal interrupts it
done

if is_finished; then
    exit 0
elif [ "$stopped" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"  # Slurm ends this shell now, and starts it again later
else
    echo "the run has failed: the first error above says why" >&2
    exit 1
fi
