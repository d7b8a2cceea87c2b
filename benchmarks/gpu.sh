#!/usr/bin/env bash
# What a GPU should show, part by part, each in under nine minutes:
#
#   bash benchmarks/gpu.sh PART [OUT] [DATA] [DATA_PATH]
#
# PART is check, step, train, evaluate, autoattack, or all. OUT (runs/gpu) takes the run, the logs and a JSON file for
# each part. DATA is an .npz file or a name (digits); DATA_PATH is where the files of a data set with a name lie. Both
# are relative to the working directory, which can be any. evaluate and autoattack work on the run that train left in
# OUT, so they want the same OUT, DATA and DATA_PATH.
#
# Nothing is installed. $PYTHON (python3) has to have torch, numpy, scipy, scikit-learn, pillow, jinja2, safetensors,
# jaxtyping and rich; autoattack compares with pyautoattack where that is installed. Further options are environment
# variables, such as DEVICE=cuda:1, BUDGET=300 (seconds), IMAGES=1000; `python benchmarks/gpu.py --help` lists them.
set -uo pipefail
usage="usage: bash benchmarks/gpu.sh check|step|train|evaluate|autoattack|all [OUT] [DATA] [DATA_PATH]"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
export OUT=${2:-${OUT:-runs/gpu}} DATA=${3:-${DATA:-digits}} DATA_PATH=${4:-${DATA_PATH:-}}
case ${1:-} in
  check | step | train | evaluate | autoattack) parts=$1 ;;
  all) parts="check step train evaluate autoattack" ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
mkdir -p "$OUT" || exit 2
failed=0
for part in $parts; do
  "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$part" 2>&1 | tee "$OUT/$part.log" || failed=1
done
exit $failed
