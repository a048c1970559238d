#!/usr/bin/env bash
# Install the engines of tests/engines that do not come from pip. Where that cannot be done, their tests are not run,
# and say so.
set -euo pipefail

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "SLURM and Open MPI are installed by root with apt-get only; the tests that need them are not run."
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge openmpi-bin iproute2 util-linux bsdutils >/dev/null
