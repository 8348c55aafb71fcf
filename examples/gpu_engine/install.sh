#!/usr/bin/env bash
# Installs an engine for NVIDIA GPUs, kvcached and what the GPU checks need into a virtual environment.
#
#     examples/gpu_engine/install.sh .venv-gpu [vllm==0.26.0]
#     examples/gpu_engine/install.sh .venv-gpu-sglang sglang==0.5.15
#
# It downloads several GB.
set -euo pipefail
venv=${1:?the folder of the virtual environment}
engine=${2:-vllm==0.26.0}
root=$(cd "$(dirname "$0")/../.." && pwd)

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet uv

# uv does not read pip's settings.
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}

"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" ${DRY_RUN:+--dry-run} \
  "$engine" --editable "$root[cuda,bench,gateway]" --group "$root/pyproject.toml:dev"
