#!/usr/bin/env bash
# Two processes on this machine, each with one CPU device: by_hand.sh DATA RUN_DIRECTORY [more arguments of metarec fit]
set -uo pipefail
data=$1 out=$2
shift 2
port=${PORT:-12355}

one() { metarec fit "$data" --out "$out" --coordinator "127.0.0.1:$port" --num-processes 2 --process-id "$1" "${@:2}"; }

while true; do
  one 1 "$@" &
  one 0 "$@"
  first=$?
  wait $!
  second=$?
  # 75: another process has gone; above 128: killed. Both resume from the last checkpoint.
  if [ $first -eq 75 ] || [ $second -eq 75 ] || [ $first -gt 128 ] || [ $second -gt 128 ]; then
    echo "started again" >&2
    continue
  fi
  exit $((first > second ? first : second))
done
