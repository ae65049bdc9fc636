#!/usr/bin/env bash
# The body of every job here: run.sh CONFIG_NAME [key=value ...], inside an allocation with one task
# for each GPU. The scripts beside it say how many nodes; docs/cluster.md explains all of it.
#
# Knobs, from the environment (sbatch passes it on):
#   VENV              environment with nemo_selfpref; default: .venv where sbatch was called
#   SELFPREF_HOME     code to run, with slurm/ in it; default: where sbatch was called
#   CONFIG_DIR        a folder with YAML files of your own
#   CONTAINER_IMAGE   run in this image (pyxis and enroot) instead of in VENV
#   CONTAINER_MOUNTS  more of FROM:TO, with commas between; the working folder is mounted as it is
#   CONTAINER_PYTHON  interpreter in the image; default: python3
#   SAVE_EVERY        optimizer steps between two checkpoints, of the scripts; default: 100
#   MAX_REQUEUES      how often the job may start again after 75, 76 or 137; default 20
#   PATIENCE_S        how long other ranks may take once the first has ended; default 60
#   MASTER_PORT       where ranks meet; default: made from the job's number
#   ENGINE_PORT       where engines of a heterogeneous job answer; likewise
set -euo pipefail

submit_dir=${SLURM_SUBMIT_DIR:-$PWD}
home=${SELFPREF_HOME:-$submit_dir}
restart=${SLURM_RESTART_COUNT:-0}
max_requeues=${MAX_REQUEUES:-20}
config=(--config-name "$1")
shift
if [[ -n "${CONFIG_DIR:-}" ]]; then config+=(--config-dir "$CONFIG_DIR"); fi
# A contradiction to these, given by hand, is refused by the ranks.
overrides=("trainer.num_nodes=$SLURM_JOB_NUM_NODES" "trainer.devices=${SLURM_NTASKS_PER_NODE:-1}"
  trainer.enable_progress_bar=false "$@")

say() { printf 'slurm/run.sh: %s\n' "$1" >&2; }

# -- where things run -----------------------------------------------------------------------------

python=${VENV:-$submit_dir/.venv}/bin/python
step=()
if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
  python=${CONTAINER_PYTHON:-python3}
  mounts=$PWD:$PWD,$home:$home${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  step=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$mounts"
    "--container-workdir=$PWD")
fi
# Nothing is imported from the working folder: the code is that of SELFPREF_HOME.
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

address() { # of the first host of a list, as SLURM itself reaches it
  local host
  host=$(scontrol show hostnames "$1" | sed -n 1p)
  scontrol show node "$host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

job=$SLURM_JOB_ID
MASTER_ADDR=$(address "$SLURM_JOB_NODELIST")
# Below the ports that Linux gives to clients; another one after a restart.
MASTER_PORT=${MASTER_PORT:-$((20000 + (job * 7 + restart) % 6000))}
engine_port=${ENGINE_PORT:-$((26000 + (job * 7 + restart) % 6000))}
export MASTER_ADDR MASTER_PORT

# -- what runs besides, and how it ends -----------------------------------------------------------

trainer='' engines='' hand='' cancelled='' waited=0

# PID: its exit status in $waited, also where a signal comes meanwhile
await() {
  local heard
  while
    interrupted=''
    waited=0
    wait "$1" || waited="$?"
    heard=$interrupted
    [[ -n "$heard" ]]
  do :; done
}

end_step() { # PID SECONDS: wait for an srun of ours; end it where it takes longer
  local end
  end=$((SECONDS + $2))
  while kill -0 "$1" 2>/dev/null && ((SECONDS < end)); do sleep 0.5; done
  kill -TERM "$1" 2>/dev/null || true
  await "$1"
}

clean_up() {
  if [[ -n "$trainer" ]]; then end_step "$trainer" 0; trainer=''; fi
  if [[ -n "$engines" ]]; then
    touch "$hand/stop"
    end_step "$engines" 90
    engines=''
    rm -rf "$hand/weights" "$hand/token" # made by this very job, and large
  fi
}

trap clean_up EXIT
# SLURM itself ends the steps of a job that is cancelled or preempted.
trap 'interrupted=1 cancelled=1' TERM
# --signal=B:USR1@300, scancel --batch: on to the ranks.
trap 'interrupted=1; if [[ -n "$trainer" ]]; then kill -USR1 "$trainer" 2>/dev/null || true; fi' USR1

# -- the run --------------------------------------------------------------------------------------

group=()
if [[ "${SLURM_HET_SIZE:-1}" != 1 ]]; then
  group=(--het-group=0)
  picked=''
  for override in "$@"; do if [[ "$override" == rollout=* ]]; then picked=1; fi; done
  if [[ -z "$picked" ]]; then overrides+=(rollout=vllm); fi # a group may be picked once
fi

# Composing the configuration refuses what is wrong in it before any rank starts.
facts=$(srun "${group[@]}" "${step[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 \
  "$python" -m nemo_selfpref.training.job_facts "${config[@]}" -- "${overrides[@]}")
run_dir=$(sed -n 1p <<<"$facts")
weights=$(sed -n 2p <<<"$facts")
logs=$run_dir/logs/$job.$restart
mkdir -p "$logs"
rm -f "$logs/first-failure"

start_engines() { # on the second component of a heterogeneous job
  local nodes number count host urls=''
  hand=$run_dir/engines/$job.$restart
  mkdir -p "$hand"
  rm -f "$hand/stop" # of a job whose number was given before
  srun --het-group=1 "${step[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --output="${logs//%/%%}/engines-%t.log" bash "$home/slurm/engines.sh" "$hand" \
    "$python" -m nemo_selfpref.cli serve "${config[@]}" --weights "$weights" \
    -- "${overrides[@]}" rollout.placement=disaggregated rollout.vllm.host=0.0.0.0 \
    "rollout.vllm.port=$engine_port" "rollout.vllm.token_file=$hand/token" \
    "rollout.vllm.weights_dir=$hand/weights" &
  engines=$!
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
  count=${#nodes[@]}
  for ((number = 0; number < count; number++)); do
    until compgen -G "$hand/$number/serve/*/front.ready.json" >/dev/null; do
      if ! kill -0 "$engines" 2>/dev/null; then
        await "$engines"
        engines=''
        say "the engines ended with status $waited; see $logs/engines-$number.log"
        exit "$((waited ? waited : 1))"
      fi
      sleep 1
    done
    host=$(address "${nodes[number]}")
    urls+="${urls:+,}http://$host:$engine_port"
  done
  say "engines: $urls"
  for_trainer
  overrides+=("rollout.vllm.urls=[$urls]" "rollout.vllm.token_file=$hand/token"
    "rollout.vllm.weights_dir=$hand/weights")
}

# What only a started server has is for selfpref serve; with urls it would be refused.
for_trainer() {
  local kept=() override
  for override in "${overrides[@]}"; do
    case "$override" in
      rollout.placement=* | rollout.vllm.also_serve=* | rollout.vllm.host=* | \
        rollout.vllm.port=* | rollout.vllm.python=* | \
        rollout.vllm.engines_per_set=* | rollout.vllm.devices=* | \
        rollout.vllm.tensor_parallel_size=* | rollout.vllm.max_num_seqs=* | \
        rollout.vllm.gpu_memory_utilization=* | rollout.vllm.kv_cache_gb=* | \
        rollout.vllm.enable_prefix_caching=* | rollout.vllm.enforce_eager=* | \
        rollout.vllm.max_restarts=* | rollout.vllm.min_engines=*) ;;
      *) kept+=("$override") ;;
    esac
  done
  overrides=("${kept[@]}")
}

if [[ -n "${group[*]}" ]]; then start_engines; fi

say "job $job, start $restart: ${SLURM_NTASKS:-?} ranks, $MASTER_ADDR:$MASTER_PORT, logs in $logs"
# The first that fails does not end the others: they say what they know, and save.
srun "${group[@]}" "${step[@]}" --kill-on-bad-exit=0 --wait="${PATIENCE_S:-60}" \
  --output="${logs//%/%%}/rank-%t.log" bash "$home/slurm/rank.sh" "$logs/first-failure" \
  "$python" -m nemo_selfpref.cli train "${config[@]}" -- "${overrides[@]}" &
trainer=$!
await "$trainer"
trainer=''
status=$waited
# srun tells the highest status, which need not be that of the rank that failed first.
if [[ -s "$logs/first-failure" ]]; then
  read -r rank status <"$logs/first-failure"
  say "rank $rank ended with status $status; the end of $logs/rank-$rank.log:"
  tail -n 20 "$logs/rank-$rank.log" >&2 || true
fi
clean_up

# -- once more? -----------------------------------------------------------------------------------

case "$status" in
  75 | 76 | 137)
    if [[ -n "$cancelled" ]]; then
      say "cancelled; the same command goes on"
    elif ((restart >= max_requeues)); then
      say "status $status after $restart restarts (MAX_REQUEUES); the same command goes on"
    else
      say "status $status: queued again"
      scontrol requeue "$job"
    fi
    ;;
  0) say "done" ;;
  *) say "status $status: not queued again" ;;
esac
exit "$status"
