#!/usr/bin/env bash
# Installs Ray, kvcached's application for it and what the tests need into a virtual environment, without an engine.
#
#     examples/ray/install.sh .venv-ray
#
# For use `pip install 'kvcached-elastic[ray]'` is enough; engines have environments of their own (`environments:` of
# models.yaml).
set -euo pipefail
venv=${1:?the folder of the virtual environment}
root=$(cd "$(dirname "$0")" && pwd)/../..

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet uv

# uv does not read pip's settings.
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}

# Ray starts a dozen processes at once; without byte code each compiles what it imports, and a node gives up waiting.
"$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --editable "$root[demo,ray]" --group "$root/pyproject.toml:dev"
