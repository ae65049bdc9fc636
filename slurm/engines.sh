#!/usr/bin/env bash
# The engines of one node: engines.sh HAND COMMAND ... Runs `selfpref serve` with a folder of its
# own below HAND until the file HAND/stop is there.
set -euo pipefail

# Requests to stop are for the trainer, which still needs its engines to save. Whatever is started
# from here on ignores them as well.
trap '' USR1
hand=$1
shift
"$@" "exp_manager.exp_dir=$hand/$SLURM_PROCID" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
told=''
while kill -0 "$child" 2>/dev/null; do
  if [[ -z "$told" && -e "$hand/stop" ]]; then
    told=1 # once: a second time ends it at once
    kill -TERM "$child" 2>/dev/null || true
  fi
  sleep 1
done
wait "$child"
