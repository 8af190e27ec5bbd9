#!/usr/bin/env bash
# Checks and measures the kernels on a GPU machine, in seven minutes at most, without network:
#
#   bash benchmarks/gpu/run.sh [--wheels DIR] [--out DIR] [options of `python benchmarks/gpu`, see its --help]
#
# Takes the first Python that can import torch ($PYTHON, then python3, python), and the packages of the wheels in DIR (default: .whl/
# in the checkout, if it exists), which it unpacks into a temporary folder: nothing is installed. memrewrite itself need not be
# installed. Without pip, or with a broken wheel, it says so and goes on: sections that lack a package say which.
# Writes into --out (default: build/gpu): results.jsonl, gpu.json, table.md, log.txt. After an interruption, `--resume` runs the rest.
# Exit code: 0 done; 1 a kernel is wrong or a case failed; 2 nothing could be measured.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wheels=$here/../../.whl
[ -d "$wheels" ] || wheels=
seconds=
rehearse=
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    --wheels=*) wheels=${1#*=}; shift ;;
    --seconds) seconds=${2:?--seconds needs a number}; shift 2 ;;
    --seconds=*) seconds=${1#*=}; shift ;;
    --rehearse) rehearse=yes; options+=("$1"); shift ;;
    *) options+=("$1"); shift ;;
  esac
done

python=
for name in "${PYTHON:-}" python3 python; do
  if [ -n "$name" ] && "$name" -c 'from importlib.util import find_spec as f; raise SystemExit(not f("torch"))' 2>/dev/null; then
    python=$name
    break
  fi
done
if [ -z "$python" ]; then
  echo "run.sh: no Python here can import torch" >&2
  echo "  try: PYTHON=/path/to/python bash benchmarks/gpu/run.sh" >&2
  exit 2
fi

unpack() { # wheel, folder
  local said
  if ! said=$(timeout -k 5 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --target "$2" "$1" 2>&1); then
    echo "run.sh: $1 is not available: $(tail -n 1 <<<"$said")" >&2
    rm -rf "$2"
  fi
}

if [ -n "$wheels" ]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  number=0
  for wheel in "$wheels"/*.whl; do # each in a folder of its own: a broken wheel costs no other, and none overwrites another
    number=$((number + 1))
    unpack "$wheel" "$packages/$number" &
    PYTHONPATH=$packages/$number${PYTHONPATH:+:$PYTHONPATH}
  done
  wait
  export PYTHONPATH
fi

# The unpacking counts as part of the seven minutes. A rehearsal has its own, longer limit.
[ -n "$seconds$rehearse" ] || seconds=$((420 - SECONDS))
[ -z "$seconds" ] || options+=(--seconds "$seconds")
"$python" "$here" ${options[@]+"${options[@]}"}
