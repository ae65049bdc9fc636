#!/usr/bin/env bash
# SAPO (self_augmented_po) on 8 nodes of 8 GPUs. Settings follow the script, as for training:
#   sbatch slurm/sapo_8node.sh name=my-run model.restore_from_path=/models/llama \
#     model.tensor_model_parallel_size=4 data.train_path=[/data/answers.jsonl] rollout=vllm
# Other sizes: sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/sapo_8node.sh ...
# Knobs (container, environment, restarts): the head of slurm/run.sh.
#SBATCH --job-name=self_augmented_po
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

exec bash "${SELFPREF_HOME:-$SLURM_SUBMIT_DIR}/slurm/run.sh" "${CONFIG_NAME:-self_augmented_po}" \
  exp_manager.checkpoint_callback_params.every_n_train_steps="${SAVE_EVERY:-100}" \
  trainer.precision=bf16 "$@"
