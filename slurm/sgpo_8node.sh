#!/usr/bin/env bash
# SGPO on 8 nodes of 8 GPUs. Settings follow the script, as for `selfpref train`:
#   sbatch slurm/sgpo_8node.sh model.restore_from_path=/models/llama model.tensor_model_parallel_size=4 \
#     data.train_path=[/data/answers.jsonl] algorithm.targets.source=file algorithm.targets.path=/data/t.jsonl
#SBATCH --job-name=sgpo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

CONFIG_NAME=${CONFIG_NAME:-sgpo}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
VENV=${VENV:-$SLURM_SUBMIT_DIR/.venv}
PORT=${PORT:-29500}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A run continues where it stopped, so a requeued job needs nothing else.
srun --kill-on-bad-exit=1 "$VENV/bin/python" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:$PORT" \
  -m nemo_selfpref.cli train --config-name "$CONFIG_NAME" \
  trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$GPUS_PER_NODE" \
  trainer.precision=bf16 trainer.enable_progress_bar=false "$@"
