#!/usr/bin/env bash
# OSP on 8 nodes of 8 GPUs. Settings follow the script, as for `selfpref train`:
#   sbatch slurm/osp_8node.sh name=my-run model.restore_from_path=/models/llama \
#     model.tensor_model_parallel_size=4 data.train_path=[/data/prompts.jsonl] \
#     algorithm.judge.augmentation.num_pairs=1000 \
#     algorithm.judge.augmentation.path=[/data/pairs.jsonl]
# Other sizes: sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/osp_8node.sh ...
# Knobs (container, environment, restarts): the head of slurm/run.sh.
#SBATCH --job-name=osp
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

exec bash "${SELFPREF_HOME:-$SLURM_SUBMIT_DIR}/slurm/run.sh" "${CONFIG_NAME:-osp}" \
  exp_manager.checkpoint_callback_params.every_n_train_steps="${SAVE_EVERY:-100}" \
  trainer.precision=bf16 "$@"
