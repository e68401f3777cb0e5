#!/usr/bin/env bash
# Train a ViT with Fourier-KArAt on ImageNet to the end, through preemption, time limits and lost nodes.
#
#   SHARDS=/scratch/imagenet sbatch --account=A --partition=P slurm/imagenet_fourier_karat.sh [key=value ...]
#
# key=value are overrides of the recipe, such as optim.lr=1e-3; another model is another recipe, such as
# RECIPE=imagenet_vit_small_g3b. Options of sbatch on the command line override the #SBATCH lines, and variables in the
# environment override the defaults below. To resume after a failure, submit the same line again: the run resumes from its
# last checkpoint.

#SBATCH --job-name=fourier_karat
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
# Many sites need these two options. Remove one # from each line to set them:
##SBATCH --account=
##SBATCH --partition=

# sbatch runs a copy of this file. SLURM knows the path of the original, in the clone (22.05 adds the arguments).
SCRIPT=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
KARAT_HOME=${KARAT_HOME:-$(dirname "$(dirname "${SCRIPT:-$(realpath "$0")}")")}

RECIPE=${RECIPE:-imagenet_vit_tiny_g3b}    # `karat recipes` lists them, or a YAML file
SHARDS=${SHARDS:-}       # a directory or URL of shards; empty: the recipe's data.path
RUN=${RUN:-$KARAT_HOME/runs/$(basename "$RECIPE" .yaml)}
VENV=${VENV:-}           # a virtual environment, or
CONDA_ENV=${CONDA_ENV:-} # a conda environment; neither: the python on PATH
MODULES=${MODULES:-}     # modules to load before, such as "cuda/12.6"
CONTAINER=${CONTAINER:-} # a prefix, such as "apptainer exec --nv karat.sif"
STAGE=${STAGE:-}         # a local disk of the node for a copy of the shards, such as /local/scratch

# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$KARAT_HOME/slurm/launch.sh" || exit 2
enter_environment
check_recipe train "$RECIPE" ${SHARDS:+"data.path=$SHARDS"} "run.dir=$RUN" "$@"
count_restart
stage_shards "$SHARDS"
launch train "$RECIPE" ${SHARDS:+"data.path=$SHARDS"} "run.dir=$RUN" "$@"
