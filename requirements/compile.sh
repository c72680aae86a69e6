#!/usr/bin/env bash
# Writes requirements/<image>.txt: what each image installs, at the versions of requirements/all.txt.
#   compile.sh            write them
#   compile.sh --all      first all.txt, from pyproject.toml: versions that are there stay, unless it asks for others
#   compile.sh --check    fail when one is not what it would be
set -euo pipefail
cd "$(dirname "$0")/.."
uv=.venv/bin/uv
target=requirements
[ "${1:-}" = --check ] && target=$(mktemp -d) && trap 'rm -rf "$target"' EXIT

if [ "${1:-}" = --all ]; then
  "$uv" pip compile --quiet --no-header --no-annotate --python-version 3.11 pyproject.toml --all-extras -o requirements/all.txt
fi

compile() { # NAME, then uv's sources; names on standard input are "-"
  local name=$1
  shift
  "$uv" pip compile --quiet --no-header --no-annotate --python-version 3.11 --constraint requirements/all.txt "$@" -o "$target/$name.txt"
}

# the operator, which imports no arrays and no tables, and the Jobs on stores, which do; no torch
compile operator pyproject.toml --extra operator
# gateway, driver, `allele base fetch`: what pyproject.toml asks for everywhere, the driver's tokenizer, the command line
printf '%s\n' rich typer tokenizers | compile gateway pyproject.toml -
# a trainer image whose base has no torch of its own
compile trainer pyproject.toml --extra trainer

[ "$target" = requirements ] && exit
for name in operator gateway trainer; do
  diff -u "requirements/$name.txt" "$target/$name.txt" || { echo "requirements/$name.txt is out of date: run requirements/compile.sh" >&2; exit 1; }
done
