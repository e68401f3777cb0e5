#!/usr/bin/env bash
# Train the runs of a sweep: a job array, one run per element. `karat sweep RECIPE key=a,b ... --slurm` writes the
# overrides, fills in this script and submits it.
#
#   POINTS=runs/sweep/points/DIGEST SHARDS=/scratch/imagenet sbatch --array=0-11%4 slurm/sweep_grid.sh [key=value ...]
#
# POINTS/3 has the overrides of element 3, one on each line; the first is run.dir. `--array=0-11%4` runs four at a time.
# Each run is handled as in imagenet_fourier_karat.sh.

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
#SBATCH --array=0
# Many sites need these two options. Remove one # from each line to set them:
##SBATCH --account=
##SBATCH --partition=

# sbatch runs a copy of this file. SLURM knows the path of the original, in the clone (22.05 adds the arguments).
SCRIPT=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
KARAT_HOME=${KARAT_HOME:-$(dirname "$(dirname "${SCRIPT:-$(realpath "$0")}")")}

TASK=${TASK:-train}      # or detect
RECIPE=${RECIPE:-imagenet_vit_tiny_g3b}
SHARDS=${SHARDS:-}       # a directory or URL of shards; empty: the recipe's data.path
POINTS=${POINTS:-}       # the directory of the overrides
VENV=${VENV:-}           # a virtual environment, or
CONDA_ENV=${CONDA_ENV:-} # a conda environment; neither: the python on PATH
MODULES=${MODULES:-}     # modules to load before, such as "cuda/12.6"
CONTAINER=${CONTAINER:-} # a prefix, such as "apptainer exec --nv karat.sif"
STAGE=${STAGE:-}         # a local disk of the node for a copy of the shards, such as /local/scratch

# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$KARAT_HOME/slurm/launch.sh" || exit 2
enter_environment
index=${SLURM_ARRAY_TASK_ID:-0}
mapfile -t POINT 2>/dev/null <"$POINTS/$index"
[[ ${POINT[0]:-} == run.dir=* ]] || refuse "POINTS = $POINTS: no $index there; karat sweep writes it"
RUN=${POINT[0]#run.dir=}
check_recipe "$TASK" "$RECIPE" ${SHARDS:+"data.path=$SHARDS"} "$@" "${POINT[@]}"
count_restart
stage_shards "$SHARDS"
launch "$TASK" "$RECIPE" ${SHARDS:+"data.path=$SHARDS"} "$@" "${POINT[@]}"
