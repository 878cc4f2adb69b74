#!/usr/bin/env bash
# Pretraining on SLURM that outlives its time limit and failing processes: 2 nodes of 8 GPUs.
#   sbatch training/launch/slurm.sh --config imagenet_small_patch16 --train_dir /shared/images --output_dir /shared/runs/mine
# The flags are those of hf_vicreg.training.pretrain; --output_dir has to be on a file system that all nodes share.
# Three minutes before the limit, or when it takes the job's place for another, SLURM signals this script. It asks the run
# to stop by a file, the run writes a checkpoint, and the job queues again and goes on with that. A job that is cancelled
# does not queue again. Exit codes: 0 finished, 75 interrupted, 2 bad flags, else that of srun. The tests run it with real
# training processes against stand-ins for srun and scontrol, not on a cluster.
#SBATCH --job-name=hf_vicreg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail

output_dir=""
flags=("$@")
for ((i = 0; i < ${#flags[@]}; i++)); do
    case "${flags[i]}" in
        --output_dir) output_dir="${flags[i + 1]:-}" ;;
        --output_dir=*) output_dir="${flags[i]#*=}" ;;
    esac
done
if [[ -z "$output_dir" ]]; then
    echo "error: \`--output_dir\`: expected a folder that all nodes share, got none." >&2
    exit 2
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
mkdir -p "$output_dir"
finished_at="$output_dir/results.json" # written once the run is through
rm -f "$output_dir/stop"

signals=0
ask_to_stop() {
    signals=$((signals + 1))
    touch "$output_dir/stop"
}
trap ask_to_stop USR1 TERM

# torchrun starts failed processes again; each start goes on from the newest checkpoint that is whole. With a store of its
# own it does not read addresses of the start before (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# a signal that SLURM sends to the tasks reaches torchrun: time for a step, a measurement and a checkpoint
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then # since SLURM 22.05 srun does not take it from sbatch
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_endpoint "${hosts[0]}:$port" --rdzv_id "$SLURM_JOB_ID" --max_restarts 3 \
    -m hf_vicreg.training.pretrain "$@" --resume_from_checkpoint latest &
run=$!
while :; do
    before=$signals
    code=0
    wait "$run" || code=$?
    ((signals == before)) && break # else a signal ended `wait`, not the run
done

if [[ -e "$finished_at" ]] || ((!signals)); then
    exit "$code"
fi
case "$(scontrol show job "$SLURM_JOB_ID")" in
    *JobState=CANCELLED* | *JobState=COMPLETING*) # by `scancel`, or it stopped too late
        echo "stopped; SLURM ends the job, which does not queue again"
        exit 75
        ;;
esac
echo "stopped before its end: the job queues again"
scontrol requeue "$SLURM_JOB_ID" || echo "error: \`scontrol requeue\` failed; submit the same command again to go on." >&2
exit 75 # as a run that stopped when asked: try again
