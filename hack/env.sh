#!/usr/bin/env bash
# Makes .venv from requirements/all.txt: exact versions, nothing resolved here.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p out
outside=${PATH//"$PWD/.venv/bin:"/}   # the Makefile puts .venv first; .venv itself is made by another Python
python=$(PATH=$outside command -v python3.11 || PATH=$outside command -v python3)
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "env: expected Python 3.11 (SGLang's wheels), found $("$python" --version); install python3.11 with python3.11-venv" >&2
  exit 1
}
started=$SECONDS
if [ ! -x .venv/bin/uv ]; then
  echo "env: creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^uv==' requirements/all.txt)"
fi
echo "env: installing $(grep -c '==' requirements/all.txt) packages (6 GB on disk, mostly torch)"
export VIRTUAL_ENV=$PWD/.venv
.venv/bin/uv pip install --quiet --no-deps -r requirements/all.txt
.venv/bin/uv pip install --quiet --no-deps --editable .
echo "env: ready in $((SECONDS - started)) s"
