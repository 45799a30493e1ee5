#!/usr/bin/env bash
# MMEngine in a virtual environment of its own, with the DeepSpeed that its DeepSpeedStrategy can import, and with
# what ckpttools itself requires: its hook runs there.
#
#   mmengine_env.sh DIR         build DIR/bin/python, unless it is there
#
# MMEngine 0.10.7 imports deepspeed.runtime.fp16.onebit, which newer DeepSpeed releases no longer have.
# It calls torch.load without weights_only, so whoever resumes with it under torch 2.6 or newer sets
# TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 for that process. PYTHON may be set in the environment.
set -euo pipefail

venv=${1:?usage: mmengine_env.sh DIR}
[ -e "$venv/ready" ] && exit
"${PYTHON:-python3.11}" -m venv --clear "$venv"
ours=$("$venv/bin/python" - "$(dirname "$0")/../../pyproject.toml" <<'READ'
import sys, tomllib
from pathlib import Path
print(*tomllib.loads(Path(sys.argv[1]).read_text())["project"]["dependencies"])
READ
)
# shellcheck disable=SC2086  # one word for each requirement
"$venv/bin/pip" install -q torch==2.13.0 $ours 'setuptools<80' wheel ninja
DS_ACCELERATOR=cpu DS_BUILD_OPS=0 "$venv/bin/pip" install -q --no-build-isolation \
    mmengine==0.10.7 deepspeed==0.15.4
DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES='' "$venv/bin/python" -c \
    'from mmengine._strategy.deepspeed import DeepSpeedStrategy' >/dev/null 2>&1
touch "$venv/ready"
