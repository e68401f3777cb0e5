#!/usr/bin/env bash
# One rank of a job: rank.sh LOGS COMMAND...   The agent of its node, `karat launch`, starts it; see launch.sh.
#
# LOGS/rank-00003.log      the output of the rank; that of rank 0 is also in the job's output
# LOGS/rank-00003.exit     its exit code, node and end time
#
# The agents end all ranks when one fails. Code 75 (saved, run again) is not a failure, so only this file records it.
set -u
logs=$1
shift
rank=$(printf %05d "${RANK:?}")
log=$logs/rank-$rank.log

# A signal would kill the trainer before it handles signals. So ignore it; launch.sh repeats it.
trap '' USR2 TERM

# A rank must not outlive its agent, for the next start needs its GPU and the run's directory. Not every cluster ends it.
# This is a process group of its own.
agent=$PPID
{ while kill -0 "$agent"; do sleep 1; done && kill -KILL -- -$$; } >/dev/null 2>&1 &
watch=$!
disown "$watch" # the shell does not tell of its end

if [[ $RANK == 0 ]]; then
  "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
else
  "$@" >>"$log" 2>&1
  code=$?
fi
kill -KILL "$watch"
echo "$code ${SLURMD_NODENAME:-$(hostname)} $(date +%s.%N) $RANK" >"$logs/rank-$rank.exit"
[[ $code == 75 ]] && exit 0
exit "$code"
