#!/bin/sh
# Installs karat_scale into /opt/karat of a Debian image: install.sh cpu|cuda12|cuda13 DIRECTORY-OF-WHEELS
# CUDA and NCCL come with torch's wheels, and DALI with its own; FFCV is compiled here. The host needs a driver alone.
set -eu
kind=$1
packages="python3 python3-venv ca-certificates"
case $kind in
  # In a job the clone's code runs, whose kernels are compiled there.
  cpu) torch=cpu dali= extras=parquet,remote,export packages="$packages g++ libjpeg-dev" ;;
  # Triton compiles its launchers with gcc and Python's headers.
  cuda12) torch=cu126 dali=nvidia-dali-cuda120 ;;
  cuda13) torch=cu130 dali=nvidia-dali-cuda130 ;;
  *) echo "error: $kind is not cpu, cuda12 or cuda13" >&2; exit 2 ;;
esac
if [ "$kind" != cpu ]; then
  packages="$packages python3-dev g++ pkg-config libopencv-dev libturbojpeg0-dev"
  extras=parquet,remote,export,ffcv
fi
wheel=$(ls "$2"/karat_scale-*_"$(uname -m)".whl)
apt-get update
# shellcheck disable=SC2086 # several words
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
python3 -m venv /opt/karat
pip="/opt/karat/bin/pip install --no-cache-dir"
$pip --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl}/$torch" torch torchvision
# shellcheck disable=SC2086
$pip "$wheel[$extras]" $dali
rm -rf /var/lib/apt/lists/*
/opt/karat/bin/karat --version
