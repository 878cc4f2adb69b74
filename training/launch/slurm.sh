#!/usr/bin/env bash
# Pretraining on SLURM that outlives its time limit and failing processes: 2 nodes of 8 GPUs.
#   sbatch training/launch/slurm.sh --config imagenet_small_patch16 --train_dir /shared/images --output_dir /shared/runs/mine
# The flags are those of hf_vicreg.training.pretrain; --output_dir has to be on a file system that all nodes share.
# Three minutes before the limit SLURM signals this script, the script asks the run to stop by a file, the run writes a
# checkpoint, and the job queues again. The tests run it against stand-ins for srun and
# scontrol, not on a cluster.
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

stop_requested=0
ask_to_stop() {
    stop_requested=1
    touch "$output_dir/stop"
}
trap ask_to_stop USR1

# torchrun starts failed processes again; each start goes on from the newest checkpoint that is whole. With a store of its
# own it does not read addresses of the start before (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then # since SLURM 22.05 srun does not take it from sbatch
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_endpoint "${hosts[0]}:29500" --rdzv_id "$SLURM_JOB_ID" --max_restarts 3 \
    -m hf_vicreg.training.pretrain "$@" --resume_from_checkpoint latest &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends `wait`, not the run
    code=0
    wait "$run" || code=$?
done

if [[ ! -e "$finished_at" ]] && ((stop_requested)); then
    echo "the time limit is near: the job queues again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
