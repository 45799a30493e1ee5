#!/usr/bin/env bash
# Old DeepSpeed releases, each in its own virtual environment, and the samples they write.
#
#   old_deepspeed.sh VENVS                      build VENVS/{0.10.3,0.14.5,0.16.9}
#   old_deepspeed.sh VENVS CORPUS               ... and write CORPUS/<version>/<variant>_ws<N>/
#
# VERSIONS and PYTHON may be set in the environment. The torch is the one of the newest DeepSpeed's
# environment: releases before 0.16 cannot read their own shards with it (weights_only became the
# default in torch 2.6), so TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 is set for every run.
set -euo pipefail

venvs=${1:?usage: old_deepspeed.sh VENVS [CORPUS]}
corpus=${2:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
versions=${VERSIONS:-0.16.9 0.14.5 0.10.3}
python=${PYTHON:-python3.11}

build() {
    local version=$1 venv=$venvs/$1
    [ -e "$venv/ready" ] && return
    "$python" -m venv --clear "$venv"
    local pydantic='pydantic>=2'
    case $version in 0.10.*) pydantic='pydantic<2' ;; esac
    "$venv/bin/pip" install -q torch==2.13.0 'numpy<2' 'setuptools<82' wheel ninja py-cpuinfo hjson \
        einops msgpack packaging psutil tqdm nvidia-ml-py pynvml "$pydantic"
    # 0.10 and 0.14 insist on importing Intel's extensions for a CPU; nothing that they offer is used
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    touch "$site/intel_extension_for_pytorch.py" "$site/oneccl_bindings_for_pytorch.py"
    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 "$venv/bin/pip" install -q --no-build-isolation --no-deps "deepspeed==$version"
    # 0.10 imports two names that newer torch has not, for its elastic launcher, which is not used either
    sed -i 's/api import log, _get_socket_with_port/api import logger as log; _get_socket_with_port = None/' \
        "$site/deepspeed/elasticity/elastic_agent.py"
    # and its BF16_Optimizer expects tensor types named torch.cpu.BFloat16Tensor
    sed -i -E 's/"torch\.\{\}\.([A-Za-z0-9]+)"\.format\(device_type\)/"torch.\1"/g' "$site/deepspeed/runtime/engine.py"
    touch "$venv/ready"
}

sample() { # version world_size variants
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 \
        TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venvs/torch_extensions}/$1" PATH="$venvs/$1/bin:$PATH" \
        "$venvs/$1/bin/torchrun" --standalone --nproc_per_node="$2" --max-restarts=99 \
        "$here/deepspeed_samples.py" "$corpus/$1" --variants "$3"
}

for version in $versions; do
    build "$version"
    if [ -n "$corpus" ]; then
        sample "$version" 2 all
        sample "$version" 4 z2_bf16,z2_round_robin,z1_bf16opt,z0_bf16
    fi
done
