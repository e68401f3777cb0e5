#!/usr/bin/env bash
# Start a new run from a run's weights: other data, other classes, another image size, a lower rate.
#
#   FROM=runs/base RECIPE=my.yaml sbatch --dependency=afterok:TRAINING_JOB slurm/finetune.sh [key=value ...]
#
# Optimizer and schedule start from the beginning (docs/finetuning.md). After an interruption, the run resumes from its
# own checkpoints.

#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
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

FROM=${FROM:-}                    # the directory of the run to start from
CHECKPOINT=${CHECKPOINT:-best}    # best, latest, or the name of a checkpoint
RECIPE=${RECIPE:-$FROM/recipe.yaml}
SHARDS=${SHARDS:-}       # a directory or URL of shards; empty: the recipe's data.path
RUN=${RUN:-${FROM%/}-finetune}
VENV=${VENV:-}           # a virtual environment, or
CONDA_ENV=${CONDA_ENV:-} # a conda environment; neither: the python on PATH
MODULES=${MODULES:-}     # modules to load before, such as "cuda/12.6"
CONTAINER=${CONTAINER:-} # a prefix, such as "apptainer exec --nv karat.sif"
STAGE=${STAGE:-}         # a local disk of the node for a copy of the shards, such as /local/scratch

# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$KARAT_HOME/slurm/launch.sh" || exit 2
enter_environment
[[ -n $FROM ]] || refuse "FROM is not set; give the directory of a run: FROM=DIR sbatch ${SCRIPT:-$0}"
[[ -d $FROM/checkpoints ]] || refuse "FROM = $FROM is not a run's directory: it has no checkpoints; karat fetch makes one from a URL"
NAME=$(cat "$FROM/checkpoints/$CHECKPOINT" 2>/dev/null || echo "$CHECKPOINT")
BEGIN=(${SHARDS:+"data.path=$SHARDS"} "run.dir=$RUN" "resume.from=" "init_from=$FROM/checkpoints/$NAME")
[[ $RECIPE != "$FROM/recipe.yaml" ]] || BEGIN+=("checkpoint.url=" "convert={}") # which belong to that run
check_recipe train "$RECIPE" "${BEGIN[@]}" "$@"
count_restart
stage_shards "$SHARDS"
launch train "$RECIPE" "${BEGIN[@]}" "$@"
