#!/usr/bin/env bash
# Functions for the scripts here, which source this file. A script calls them in this order:
#
#   enter_environment        modules, venv or conda; refuses to start if karat_scale is missing
#   check_recipe ARGUMENTS   refuses a wrong recipe before any GPU waits for it
#   count_restart            refuses to start again after restarts without a new checkpoint
#   stage_shards DIR         copies shards to the nodes' local disks, if STAGE is set
#   launch ARGUMENTS         `karat ARGUMENTS`, one rank per GPU (per node without GPUs); ends the job. On each node an
#                            agent runs the ranks: `karat launch`. After a failure they start again in this job
#   run_alone COMMAND...     one process that can resume; requeues the job on a signal
#
# Exit codes: 0 done; 2 a mistake to fix; 1 anything else. Saved on a signal is 75: the job is requeued.
set -uo pipefail

# `sbatch --export=NAMES` sets it, and each srun would leave out all other variables, PATH among them.
unset SLURM_EXPORT_ENV

# These may be set, too. The number of restarts in a row that may end without a new checkpoint.
: "${IDLE_RESTARTS:=3}"
# This many nodes wait to replace lost ones, and those with a GPU that is not sound. It needs `sbatch --no-kill`, or SLURM
# ends the job with the first lost node.
: "${SPARES:=0}"
# If a rank makes no progress for this many seconds, it is named and the ranks start again. 0: never. Phases may have
# their own: 900,start=1800,compile=3600,data=300,step=600,save=1800
: "${STALL_SECONDS:=900}"
# HOST_SUFFIX: turns a node's name into the name of its fast interface, such as i on JUWELS.

# SLURM's name of this job. One element of an array has the array's own id, which SLURM uses for all elements.
JOB=${SLURM_JOB_ID:-}
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

refuse() {
  echo "error: $*" >&2
  exit 2
}

say() {
  echo "$(date +%H:%M:%S) job $JOB: $*"
}

# The last override wins: the ranks would use another directory, or other shards, than the functions below. In a sourced
# file, "$@" are the arguments of the script.
for argument in "$@"; do
  case $argument in
    run.dir=*) refuse "$argument: set RUN=DIR instead, since the script uses it, too (a sweep: karat sweep --out DIR)" ;;
    data.path=*)
      [[ -z ${SHARDS:-}${STAGE:-} ]] ||
        refuse "$argument beside SHARDS or STAGE: set SHARDS=DIR instead, since the script uses it, too"
      ;;
  esac
done

for name in IDLE_RESTARTS SPARES; do
  [[ ${!name} =~ ^[0-9]+$ ]] || refuse "$name = ${!name}: should be a whole number"
done

# How often the ranks have started again in this job, and why; the nodes that train; those left out, and what the others
# said; whether the job was told to stop.
ATTEMPT=0 FAILURE='' NODES='' LOST='' ANSWERS='' TOLD=''

# There is nothing to save until the ranks run.
trap 'requeue "told to stop before the start"' USR2 TERM

enter_environment() {
  [[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is a batch script: run it by sbatch"
  local name
  # Their scripts read variables that may be unset.
  set +u
  for name in ${MODULES:-}; do
    module load "$name" || refuse "MODULES = $MODULES: \`module load $name\` failed"
  done
  if [[ -n ${VENV:-} ]]; then
    [[ -f $VENV/bin/activate ]] || refuse "VENV = $VENV: no bin/activate there"
    # shellcheck source=/dev/null
    source "$VENV/bin/activate"
  elif [[ -n ${CONDA_ENV:-} ]]; then
    eval "$(conda shell.bash hook)"
    conda activate "$CONDA_ENV" || refuse "CONDA_ENV = $CONDA_ENV: cannot activate it"
  fi
  set -u
  read -ra PYTHON <<<"${CONTAINER:-} python"
  KARAT=("${PYTHON[@]}" -m karat_scale)
  # In a clone; an installed package is found without this.
  [[ -d $KARAT_HOME/karat_scale ]] && export PYTHONPATH=$KARAT_HOME${PYTHONPATH:+:$PYTHONPATH}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  "${KARAT[@]}" --version >/dev/null ||
    refuse "\`${KARAT[*]}\` does not run on $(hostname); set VENV, CONDA_ENV, MODULES or CONTAINER"
}

check_recipe() {
  # The first start of a requeued job has checked it. If it was changed since then, the ranks say what is wrong.
  ((${SLURM_RESTART_COUNT:-0} > 0)) || "${KARAT[@]}" "$@" --print >/dev/null || exit $?
}

# RUN/restarts: the newest checkpoint at the last start, and at how many starts it was the same.
count_restart() {
  local latest seen=- idle=0
  latest=$(cat "$RUN/checkpoints/latest" 2>/dev/null || echo none)
  if ((${SLURM_RESTART_COUNT:-0} + ATTEMPT > 0)) && [[ -f $RUN/restarts ]]; then
    read -r seen idle <"$RUN/restarts"
  fi
  if [[ $seen == "$latest" ]]; then idle=$((idle + 1)); else idle=0; fi
  if ((idle > IDLE_RESTARTS)); then
    echo "error: $idle starts without a new checkpoint (the newest is $latest): stopped, not requeued;" \
      "read $RUN/logs, give more --time or an earlier --signal" >&2
    [[ -z $FAILURE ]] || echo "$FAILURE" >&2
    exit 1
  fi
  { mkdir -p "$RUN" && echo "$latest $idle" >"$RUN/restarts"; } || refuse "RUN = $RUN cannot be written"
}

# Once per node, verified by hash, kept for the next start. A rank reads a complete copy, else the shared shards:
# see karat_scale/data/shards/shard_format.py.
stage_shards() {
  export KARAT_SHARDS=$1 KARAT_STAGED=
  [[ -n ${STAGE:-} ]] || return 0
  [[ -n $1 ]] || refuse "STAGE = $STAGE needs SHARDS, the directory to copy"
  [[ -f $1/dataset.json ]] || return 0
  [[ -f $KARAT_HOME/data_prep/stage.py ]] || refuse "STAGE needs data_prep/stage.py of a clone; set KARAT_HOME to one"
  KARAT_STAGED=$STAGE/karat-$(id -un)/$(basename "$1")-$(sha256sum <"$1/dataset.json" | cut -c 1-12)
  say "staging $1 to $KARAT_STAGED on each node"
  # If several jobs are on a node, one copies and the others wait for it.
  # shellcheck disable=SC2016 # the task's shell is to expand these
  srun --label --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
    mkdir -p "$KARAT_STAGED" && exec flock "$KARAT_STAGED.lock" "$@" --out "$KARAT_STAGED"
  ' stage "${PYTHON[@]}" "$KARAT_HOME/data_prep/stage.py" --src "$1" 2>&1 & # in the background: a signal may end it
  wait $! || say "not every node has room or right for a copy; those read $1"
}

launch() {
  local per_node=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-0} cpus=${SLURM_CPUS_PER_TASK:-1}
  unset SLURM_CPUS_PER_TASK # beside it, srun warns that an agent, with the cores of all its ranks, may never run
  [[ $gpus == 0 || $gpus == "$per_node" ]] ||
    refuse "$gpus GPUs but $per_node tasks a node; set --ntasks-per-node to --gpus-per-node"
  local nodes=$((SLURM_JOB_NUM_NODES - SPARES)) most
  ((nodes > 0)) || refuse "SPARES = $SPARES leaves none of $SLURM_JOB_NUM_NODES nodes to train on"
  if [[ $1 != eval ]] && ((nodes > 1)); then
    most=$("${PYTHON[@]}" -m karat_scale.commands.submit.within_job nodes "$nodes" "$per_node" "$@") || exit 2
    ((most == nodes)) ||
      say "takes $most of $nodes nodes; train.global_batch does not divide over the ranks of more"
    nodes=$most
  fi
  ((nodes == SLURM_JOB_NUM_NODES)) || leave_out_nodes "$nodes"
  export MASTER_ADDR MASTER_PORT KARAT_STALL_SECONDS=$STALL_SECONDS KARAT_START KARAT_RANK_WRAPPER
  while :; do
    KARAT_START=$JOB-${SLURM_RESTART_COUNT:-0}
    ((ATTEMPT == 0)) || KARAT_START+=.$ATTEMPT
    LOGS=$RUN/logs/$KARAT_START
    mkdir -p "$LOGS" || refuse "RUN = $RUN cannot be written"
    NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | grep -vxF "${LOST//,/$'\n'}" | head -n "$nodes")
    # A batch script runs on the first node, so without scontrol that is this one, and srun adds the others.
    NODES=${NODES:-${SLURMD_NODENAME:-$(hostname)}}
    MASTER_ADDR=${NODES%%$'\n'*}${HOST_SUFFIX:-}
    KARAT_RANK_WRAPPER=bash$'\t'$KARAT_HOME/slurm/rank.sh$'\t'$LOGS
    say "start $((${SLURM_RESTART_COUNT:-0} + 1))${KARAT_START#"$JOB-${SLURM_RESTART_COUNT:-0}"}: $((nodes * per_node)) ranks on $SLURM_JOB_NODELIST, logs in $LOGS"
    # Below the ports that kernels hand out; another one at each start, as this one may be taken.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1000 * ATTEMPT) % 10000))
    # What an earlier step left must not hold it up.
    srun --nodes="$nodes" --nodelist="${NODES//$'\n'/,}" --ntasks="$nodes" --ntasks-per-node=1 \
      --cpus-per-task="$((cpus * per_node))" --overlap --kill-on-bad-exit=1 --unbuffered \
      bash -c 'trap "" USR2 TERM; exec "$@"' agent "${KARAT[@]}" launch --ranks "$per_node" "$@" &
    STEP=$! WATCH='' ANSWERS=''
    trap ask_to_save USR2 TERM
    if [[ $STALL_SECONDS != 0 && $1 != eval ]]; then
      watch "$((nodes * per_node))" &
      WATCH=$!
    fi
    until ! runs || [[ -s $LOGS/verdict ]] || grep -Eqsv '^(0|75) ' "$LOGS"/rank-*.exit; do sleep 0.5; done
    ! runs || leave_step "$nodes" "$per_node"
    finish "$((nodes * per_node))"
    [[ $1 != eval ]] || fail
    trap 'requeue "told to stop before the start"' USR2 TERM # as above, for the next start
    [[ -z $TOLD ]] || requeue "$FAILURE"
    leave_out_nodes "$nodes"
    ATTEMPT=$((ATTEMPT + 1))
    count_restart
    say "$FAILURE; the ranks start again"
  done
}

run_alone() {
  local code
  "$@" &
  STEP=$!
  trap 'kill -TERM "$STEP" 2>/dev/null; requeue "told to stop"' USR2 TERM
  wait "$STEP"
  code=$?
  ((code == 0)) || exit "$code"
}

# Repeated, since ranks that are still starting do not handle it yet. srun forwards it to them.
ask_to_save() {
  trap '' USR2 TERM
  TOLD=1
  say "told to stop; the ranks are to save"
  while kill -USR2 "$STEP" 2>/dev/null; do sleep 2; done &
}

# The ranks' exit files have the result: srun's own code can be that of a rank which srun killed. Returns after a failure
# that another start may not have.
finish() {
  local ranks=$1 codes first
  [[ -z $WATCH ]] || kill "$WATCH" 2>/dev/null
  : >"$LOGS/ended" # so that NFS lists the files of other nodes anew
  codes=$(cut -d ' ' -f 1 "$LOGS"/rank-*.exit 2>/dev/null)
  # The first rank that ended, by the clock, has the cause. Those with code 76 lost another one.
  first=$(LC_ALL=C sort -k 3,3n "$LOGS"/rank-*.exit 2>/dev/null | awk '$1 != 0 && $1 != 75 && $1 != 76' | head -n 1)
  [[ -n $first ]] || first=$(grep -h '^76 ' "$LOGS"/rank-*.exit 2>/dev/null | head -n 1)
  if [[ -s $LOGS/verdict ]]; then
    FAILURE=$(cat "$LOGS/verdict")
  elif [[ -n $TOLD && -z $codes ]]; then
    requeue "told to stop"
  elif [[ -n $first || $(grep -c . <<<"$codes") -lt $ranks ]]; then
    describe_failure "$first"
    [[ $first != "2 "* ]] || fail 2
  elif grep -qx 75 <<<"$codes"; then
    requeue "saved $(cat "$RUN/checkpoints/latest" 2>/dev/null || echo nothing)"
  else
    say "done"
    exit 0
  fi
}

fail() {
  echo "$FAILURE" >&2
  exit "${1:-1}"
}

# Whether the step has not ended.
runs() {
  kill -0 "$STEP" 2>/dev/null
}

# After a failure srun ends the other ranks, but waits long for a node that is lost. So see which node that is, and go
# when the ranks of the others have ended.
leave_step() {
  local left=25 lost
  look "$1" 1
  lost=$(grep -cxFf <(tr , '\n' <<<"$LOST") <<<"$NODES")
  while runs && ((left-- > 0)); do
    ((lost == 0 || $(cat "$LOGS"/rank-*.exit 2>/dev/null | wc -l) < ($1 - lost) * $2)) || break
    sleep 0.2
  done
  kill -TERM "$STEP" 2>/dev/null && sleep 0.5 # for srun to tell the nodes
  { kill -KILL "$STEP"; wait "$STEP"; } 2>/dev/null
}

# Ends the step when a rank hangs.
watch() {
  local watcher
  "${PYTHON[@]}" -m karat_scale.commands.submit.within_job watch "$RUN" --ranks "$1" --stall "$STALL_SECONDS" \
    >"$LOGS/verdict" &
  watcher=$!
  trap 'kill "$watcher"; exit' TERM
  wait "$watcher"
  [[ $? == 3 ]] && kill -TERM "$STEP"
}

# The job goes back to the queue if there is no spare for each lost node. If more spares are left, they replace nodes
# with a GPU that is not sound. The trainer tells of the others.
leave_out_nodes() {
  local spares node fault
  [[ -n $ANSWERS ]] || look "$1" 60
  spares=$(($(scontrol show hostnames "$SLURM_JOB_NODELIST" | wc -l) - $1))
  if [[ -n $LOST ]]; then
    spares=$((spares - $(wc -w <<<"${LOST//,/ }")))
    ((spares >= 0)) || requeue "lost $LOST"
    say "lost $LOST; a spare node takes part"
  fi
  while read -r node fault && ((spares > 0)); do
    [[ -n $fault ]] || continue
    spares=$((spares - 1))
    LOST+=${LOST:+,}$node
    say "$fault; a spare node takes part"
  done <<<"$ANSWERS"
}

# Asks each node what is not sound there. ANSWERS gets a line for each that answers, and LOST those that run nothing any
# more. When NODES sound ones have answered, the others have SECONDS more. So a slow one may cost a spare, no more.
look() {
  local nodes=$1 seconds=$2 all node fault sound=0 patience=60 question=(true)
  all=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  (($(wc -l <<<"$all") == nodes)) || question=("${PYTHON[@]}" -m karat_scale.commands.submit.within_job faults)
  ANSWERS=''
  while read -r -t "$patience" node fault; do
    ANSWERS+="$node $fault"$'\n'
    [[ -n $fault ]] || sound=$((sound + 1))
    ((sound < nodes)) || patience=$seconds
  done < <(for node in $all; do look_at "$node" "${question[@]}" & done)
  LOST=$(grep -vxFf <(cut -d ' ' -f 1 <<<"$ANSWERS") <<<"$all" | paste -sd,)
}

# Runs a command that prints the faults of a node there. Unless that fails, prints the node's name and the faults.
look_at() {
  local node=$1 faults
  shift
  faults=$(timeout 60 srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" "$@" 2>/dev/null) &&
    echo "$node ${faults//$'\n'/; }"
}

requeue() {
  local state try
  for try in 1 2 3; do # a busy controller may not answer at once
    ((try == 1)) || sleep 5
    # Of a heterogeneous job, it tells each part's.
    state=$(squeue --noheader --jobs="$JOB" --format=%T 2>/dev/null | sort -u) && break
  done
  if [[ $state != RUNNING ]]; then # cancelled, or SLURM is requeueing it
    say "$1; not requeued, the job is ${state:-unknown}"
    exit 75
  fi
  say "$1; requeued"
  trap - USR2 TERM
  # If this is not allowed, the site may requeue by exit code (RequeueExit).
  scontrol requeue "$JOB" && sleep 60
  exit 75
}

# Libraries may print lines after the exception. PyTorch, like karat, puts the rank before its lines.
last_error() {
  local lines
  lines=$(sed -E 's/^\[rank ?[0-9]+\]:? //' "$1" | grep -v '^[[:space:]]*$')
  grep -E '^(error:|[A-Za-z_.]+(Error|Exception|Exit)(:|$))' <<<"$lines" | tail -n 1 | grep . || tail -n 1 <<<"$lines"
}

# FAILURE becomes one line about a rank that failed, given as the line of its exit file.
describe_failure() {
  local code node died rank log
  read -r code node died rank <<<"$1"
  if [[ -z ${code:-} ]]; then
    FAILURE="error: the ranks were ended from outside; SLURM's own lines above say why; logs: $LOGS"
    return
  fi
  log=$LOGS/rank-$(printf %05d "$rank").log
  if ((code > 128 && code <= 128 + 64)); then
    FAILURE="error: rank $rank on $node was killed by signal $((code - 128)) ($(kill -l "$code")) at"
    FAILURE+=" $(date -d "@$died" +%T); KILL is most often a lack of memory; log: $log"
    return
  fi
  ((code == 2)) || { echo "the end of $log:" && tail -n 25 "$log"; }
  FAILURE="rank $rank on $node failed first, exit code $code: $(last_error "$log")"
}
