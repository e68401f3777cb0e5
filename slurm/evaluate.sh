#!/usr/bin/env bash
# Evaluate a run's checkpoint on the validation split; each image counts once. The result is RUN/eval-CHECKPOINT.json.
#
#   RUN=runs/imagenet_vit_tiny_g3b sbatch --account=A --partition=P slurm/evaluate.sh [key=value ...]
#   ... sbatch --dependency=afterok:TRAINING_JOB slurm/evaluate.sh         when the training is finished

#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Many sites need these two options. Remove one # from each line to set them:
##SBATCH --account=
##SBATCH --partition=

# sbatch runs a copy of this file. SLURM knows the path of the original, in the clone (22.05 adds the arguments).
SCRIPT=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
KARAT_HOME=${KARAT_HOME:-$(dirname "$(dirname "${SCRIPT:-$(realpath "$0")}")")}

RUN=${RUN:-}                      # the run's directory
CHECKPOINT=${CHECKPOINT:-best}    # best, latest, or a name
SHARDS=${SHARDS:-}                # other shards than those of the run
VENV=${VENV:-}           # a virtual environment, or
CONDA_ENV=${CONDA_ENV:-} # a conda environment; neither: the python on PATH
MODULES=${MODULES:-}     # modules to load before, such as "cuda/12.6"
CONTAINER=${CONTAINER:-} # a prefix, such as "apptainer exec --nv karat.sif"

# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$KARAT_HOME/slurm/launch.sh" || exit 2
enter_environment
[[ -n $RUN ]] || refuse "RUN is not set; give the directory of a run: RUN=DIR sbatch ${SCRIPT:-$0}"
[[ -f $RUN/recipe.yaml ]] || refuse "RUN = $RUN is not a run's directory: it has no recipe.yaml"
launch eval "$RUN" ${SHARDS:+"data.path=$SHARDS"} "$@" --checkpoint "$CHECKPOINT" --json "$RUN/eval-$CHECKPOINT.json"
