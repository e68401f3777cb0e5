#!/usr/bin/env bash
# Convert ImageNet to shards on CPU nodes: a job array, one split per element. After an interruption, it resumes.
#
#   IMAGES=/data/ILSVRC sbatch --account=A --partition=cpu slurm/prepare_imagenet.sh [options of make_webdataset.py ...]
#
# IMAGES has the official tars and LOC_val_solution.csv, or train/<class>/* and val/<class>/*. Run on finished shards,
# it checks every byte.

#SBATCH --job-name=prepare_imagenet
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --array=0-1
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@60
# Many sites need these two options. Remove one # from each line to set them:
##SBATCH --account=
##SBATCH --partition=

# sbatch runs a copy of this file. SLURM knows the path of the original, in the clone (22.05 adds the arguments).
SCRIPT=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
KARAT_HOME=${KARAT_HOME:-$(dirname "$(dirname "${SCRIPT:-$(realpath "$0")}")")}

IMAGES=${IMAGES:-}
SHARDS=${SHARDS:-$KARAT_HOME/data/imagenet}
SPLITS=${SPLITS:-train val} # one for each element of the array
VENV=${VENV:-}              # a virtual environment, or
CONDA_ENV=${CONDA_ENV:-}    # a conda environment; neither: the python on PATH
MODULES=${MODULES:-}        # modules to load before
CONTAINER=${CONTAINER:-}    # a prefix, such as "apptainer exec karat.sif"

# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$KARAT_HOME/slurm/launch.sh" || exit 2
for option in "$@"; do
  case $option in
    --val-fraction | --val-fraction=* | --val-count | --val-count=*)
      refuse "$option: each element of the array makes one split, so none can divide one into train and val;" \
        "run \`karat prepare webdataset\` in a job of your own"
      ;;
    --dry-run) refuse "$option: run \`karat prepare webdataset --src IMAGES --out SHARDS --dry-run\`" ;;
    --src | --src=* | --out | --out=* | --split | --split=*)
      refuse "$option: set IMAGES, SHARDS and SPLITS instead of --src, --out and --split"
      ;;
  esac
done
enter_environment
[[ -n $IMAGES ]] || refuse "IMAGES is not set; give the directory of ImageNet's tars or folders: IMAGES=DIR sbatch ${SCRIPT:-$0}"
[[ -e $IMAGES ]] || refuse "IMAGES = $IMAGES: no such directory"
read -ra splits <<<"$SPLITS"
index=${SLURM_ARRAY_TASK_ID:-0}
((index < ${#splits[@]})) || refuse "array index $index, but there are ${#splits[@]} splits; use --array=0-$((${#splits[@]} - 1))"
split=${splits[index]}

make_shards() { # DIR OPTIONS...   The last --workers counts, so the user's comes last.
  run_alone "${PYTHON[@]}" "$KARAT_HOME/data_prep/make_webdataset.py" --workers "${SLURM_CPUS_PER_TASK:-1}" \
    --src "$IMAGES" --split "$split" --out "$@"
}

mkdir -p "$SHARDS" || refuse "SHARDS = $SHARDS cannot be written"
if grep -qs "^ *\"$split\": {" "$SHARDS/dataset.json"; then
  make_shards "$SHARDS" "$@"
else
  # Each task writes to its own directory, because two tasks must not write the same dataset.json.
  [[ -f $SHARDS/.making-$split/dataset.json ]] || make_shards "$SHARDS/.making-$split" "$@"
  run_alone "${PYTHON[@]}" "$KARAT_HOME/data_prep/join_splits.py" --src "$SHARDS/.making-$split" --out "$SHARDS"
fi
