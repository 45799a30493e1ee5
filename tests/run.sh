#!/usr/bin/env bash
# Sets up .venv with the pinned set of packages and passes the tests: style, types, then pytest.
# Arguments go to pytest: bash tests/run.sh -m heavy
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
command -v "${CXX:-c++}" >/dev/null || { echo "the tests start DeepSpeed, which compiles: install a C++ compiler (g++)"; exit 2; }
# torch writes the paths of its libraries into compiler commands without quotes: below an odd name .venv is elsewhere.
venv=$PWD/.venv
case $PWD in
*[!A-Za-z0-9/._+-]*) venv=${XDG_CACHE_HOME:-$HOME/.cache}/ckpttools-venv-$(printf %s "$PWD" | cksum | cut -d' ' -f1) ;;
esac
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt -e '.[test]'
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
# DeepSpeed compiles a small extension at its first launch; a killed launch can leave a lock in that folder.
# Its build files cannot name a folder with spaces.
extensions=$(mktemp -d /tmp/ckpttools-extensions.XXXXXX)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$extensions" || true' EXIT
if [ -z "${TORCH_EXTENSIONS_DIR:-}" ]; then
  export TORCH_EXTENSIONS_DIR=$extensions
  # Meanwhile style and types are looked at, which takes one core: else every worker of pytest would wait for it.
  "$venv/bin/python" -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null 2>&1 &
fi
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
