#!/usr/bin/env bash
# One rank: rank.sh FIRST_FAILURE COMMAND ... Gives it its place, passes requests to stop on, and
# writes rank and exit status into the file FIRST_FAILURE unless another rank failed before.
set -euo pipefail

requested='' interrupted='' child=''
# shellcheck disable=SC2317 # the traps call it
pass_on() { # NAME NUMBER
  interrupted=1
  requested=$((128 + $2))
  if [[ -n "$child" ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
trap 'pass_on USR1 10' USR1
trap 'pass_on TERM 15' TERM
trap 'pass_on INT 2' INT

first_failure=$1
shift
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-1}"
"$@" &
child=$!
if [[ -n "$requested" ]]; then kill -TERM "$child" 2>/dev/null || true; fi

while # wait ends early where a signal comes
  interrupted='' status=0
  wait "$child" || status="$?"
  [[ -n "$interrupted" ]]
do :; done

# Asked to stop before it could listen, while it loaded its model: nothing is lost.
if [[ "$status" == "$requested" ]]; then status=75; fi
if [[ "$status" != 0 ]]; then
  # noclobber: of all ranks one creates the file.
  (set -o noclobber && printf '%s %s\n' "$RANK" "$status" >"$first_failure") 2>/dev/null || true
fi
exit "$status"
