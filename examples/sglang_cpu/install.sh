#!/usr/bin/env bash
# Installs a SGLang that runs on a CPU, kvcached and what the tests need into a virtual environment.
#
#     examples/sglang_cpu/install.sh .venv-sglang 0.5.23
#
# SGLang has no CPU build on the package index: its wheel names CUDA packages, of which it needs none
# here. `stand_ins` takes the place of its kernels (nothing on this path calls one) and declares two
# operators that torchvision's CUDA build expects.
set -euo pipefail
venv=${1:?the folder of the virtual environment}
release=${2:-0.5.23}
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet uv

# uv does not read pip's settings.
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}

install() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@"; }

install "torch==2.13.0+cpu" || install --torch-backend cpu torch==2.13.0
install --requirement "$here/requirements.txt"
install --no-deps "torchvision==0.29.2" "sglang==$release"
install --no-deps "$here/stand_ins"
install --editable "$root[demo]" --group "$root/pyproject.toml:dev"
