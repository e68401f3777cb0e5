#!/usr/bin/env bash
# One rank of a job: rank.sh LOGS COMMAND...   srun starts it once per task; see launch.sh.
#
# LOGS/rank-00003.log      what the rank printed; rank 0 prints to the job's output too
# LOGS/rank-00003.exit     its exit code, node and time of death
#
# srun ends all ranks when one fails, and 75 (saved, run me again) is no failure: the file alone tells of it.
set -u
logs=$1
shift
rank=$(printf %05d "$SLURM_PROCID")
log=$logs/rank-$rank.log

# A signal that comes before the trainer listens would kill it. Ignored, it is lost, but launch.sh repeats it.
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
