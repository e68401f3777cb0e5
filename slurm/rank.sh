#!/usr/bin/env bash
# One rank of a job: rank.sh LOGS COMMAND...   srun starts it once per task; see launch.sh.
#
# LOGS/rank-00003.log      the output of the rank; that of rank 0 is also in the job's output
# LOGS/rank-00003.exit     its exit code, node and end time
#
# srun ends all ranks when one fails. Code 75 (saved, run again) is not a failure, so only this file records it.
set -u
logs=$1
shift
rank=$(printf %05d "$SLURM_PROCID")
log=$logs/rank-$rank.log

# A signal would kill the trainer before it handles signals. So ignore it; launch.sh repeats it.
trap '' USR2 TERM

if [[ $SLURM_PROCID == 0 ]]; then
  "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
else
  "$@" >>"$log" 2>&1
  code=$?
fi
echo "$code ${SLURMD_NODENAME:-$(hostname)} $(date +%s.%N) $SLURM_PROCID" >"$logs/rank-$rank.exit"
[[ $code == 75 ]] && exit 0
exit "$code"
