#!/usr/bin/env bash
# Train one model for each grid G, rank r and mode: a job array, one run per element, each with its own directory.
#
#   GRIDS="1 3" RANKS="12" MODES="blockwise" sbatch --array=0-1 slurm/sweep_grid.sh [key=value ...]
#
# --array has one element for each combination; `--array=0-11%4` runs four at a time. Each run is handled as in
# imagenet_fourier_karat.sh.

#SBATCH --job-name=sweep_grid
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
#SBATCH --array=0-11

# sbatch runs a copy of this file. SLURM knows the path of the original, in the clone (22.05 adds the arguments).
SCRIPT=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
KARAT_HOME=${KARAT_HOME:-$(dirname "$(dirname "${SCRIPT:-$(realpath "$0")}")")}

GRIDS=${GRIDS:-1 3 5}                # G, harmonics
RANKS=${RANKS:-12 24}                # r
MODES=${MODES:-blockwise universal}
RECIPE=${RECIPE:-imagenet_vit_tiny_g3b}
SHARDS=${SHARDS:-$KARAT_HOME/data/imagenet}
RUNS=${RUNS:-$KARAT_HOME/runs/sweep} # each run's directory is below it
VENV=${VENV:-}           # a virtual environment, or
CONDA_ENV=${CONDA_ENV:-} # a conda environment; neither: the python on PATH
MODULES=${MODULES:-}     # modules to load before, such as "cuda/12.6"
CONTAINER=${CONTAINER:-} # a prefix, such as "apptainer exec --nv karat.sif"
STAGE=${STAGE:-}         # a local disk of the node for a copy of the shards, such as /local/scratch

# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$KARAT_HOME/slurm/launch.sh" || exit 2
enter_environment
read -ra grids <<<"$GRIDS"
read -ra ranks <<<"$RANKS"
read -ra modes <<<"$MODES"
count=$((${#grids[@]} * ${#ranks[@]} * ${#modes[@]}))
index=${SLURM_ARRAY_TASK_ID:-0}
((index < count)) || refuse "array index $index, but there are $count runs; use --array=0-$((count - 1))"
grid=${grids[index / (${#ranks[@]} * ${#modes[@]})]}
rank=${ranks[index / ${#modes[@]} % ${#ranks[@]}]}
mode=${modes[index % ${#modes[@]}]}
RUN=$RUNS/g${grid}_r${rank}_$mode
POINT=("attention.grid=$grid" "attention.rank=$rank" "attention.mode=$mode" "data.path=$SHARDS" "run.dir=$RUN")
check_recipe train "$RECIPE" "${POINT[@]}" "$@"
count_restart
stage_shards "$SHARDS"
launch train "$RECIPE" "${POINT[@]}" "$@"
