#!/usr/bin/env bash
# All that a GPU should show, in under ten minutes: correctness, the training step, one training and its evaluation.
#
#   bash benchmarks/gpu.sh [OUT] [DATA] [DATA_PATH]
#
# OUT (runs/gpu) takes the logs and JSON files. DATA is what `gsem train --data` takes (without it, the training and
# evaluation are left out; DATA_PATH holds the files of a data set that has a name). Needs Python 3.11 or later and a
# torch with CUDA that the interpreter ($PYTHON, python3 unless told) already has. No network: what else gsem needs is
# taken from the wheels in $WHEELS, filled beforehand, where there is a network, by
#   pip download --dest wheels --constraint constraints.txt .
# BUDGET (seconds, 300) is what the training may take; DEVICE is cuda unless told.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-runs/gpu}
DATA=${2:-}
DATA_PATH=${3:-}
DEVICE=${DEVICE:-cuda}
BUDGET=${BUDGET:-300}
MODEL=${MODEL:-gsem-resnet18}
BATCH=${BATCH:-256}
mkdir -p "$OUT"

PY=${PYTHON:-python3}
if ! PYTHONPATH=src "$PY" -c 'import gsem, gsem.cli' 2>"$OUT/import.log"; then
  "$PY" -m venv --system-site-packages "$OUT/venv"
  PY=$OUT/venv/bin/python
  "$PY" -m pip install --quiet --no-index --find-links "${WHEELS:?gsem cannot be imported ($(tail -n 1 "$OUT/import.log")): set WHEELS to a folder of wheels}" \
    --editable . --no-build-isolation
fi
export PYTHONPATH=src
"$PY" -c "import torch; torch.zeros(1, device='$DEVICE'); print('torch', torch.__version__, '$DEVICE')"

echo "--- correctness"
"$PY" benchmarks/gpu_check.py --device "$DEVICE" | tee "$OUT/check.log"

echo "--- the published step"
step() { "$PY" benchmarks/training_step.py --device "$DEVICE" --model "$MODEL" --batch "$BATCH" --repeats "${REPEATS:-3}" "$@"; }
step --json "$OUT/training_step.json" | tee "$OUT/training_step.log"
step --fp16 --json "$OUT/training_step_fp16.json" | tee "$OUT/training_step_fp16.log" || echo "fp16 failed"
timeout 150 bash -c "$(declare -f step); PY='$PY' DEVICE='$DEVICE' MODEL='$MODEL' BATCH='$BATCH' step --compile --json '$OUT/training_step_compiled.json'" \
  | tee "$OUT/training_step_compiled.log" || echo "compiled: failed, or over its time"

[ -n "$DATA" ] || exit 0
echo "--- a training by gcat, as long as $BUDGET s allow"
WHERE=(--data "$DATA")
[ -z "$DATA_PATH" ] || WHERE+=(--data-path "$DATA_PATH")
EPOCHS=${EPOCHS:-$("$PY" - "$OUT/training_step.json" "$BUDGET" "$DATA" "$DATA_PATH" <<'PYTHON'
import json
import statistics
import sys

import gsem

path, budget, data, where = sys.argv[1:]
found = json.load(open(path))
attack, training = (statistics.median(found["times"][f"{kind} pass of the batch"]["ours"]) for kind in ("attack", "training"))
images = len(gsem.data.load(data, where or None).training()[0])
steps = gsem.RECIPES["gcat"].steps
# (A tenth more for data, validation and the rest.)
epoch = 1.1 * images / found["metadata"]["batch_size"] * (steps * attack + training)
print(max(2, min(60, int(float(budget) / epoch))))
PYTHON
)}
rm -rf "$OUT/run"
time "$PY" -m gsem train gcat --model "$MODEL" "${WHERE[@]}" --epochs "$EPOCHS" --device "$DEVICE" --out "$OUT/run" | tee "$OUT/train.log"
time "$PY" -m gsem evaluate "$OUT/run" "${WHERE[@]}" --images 1000 --device "$DEVICE" --no-frozen \
  --attacks "${ATTACKS:-clean,pgd:steps=50,apgd:steps=50}" --out "$OUT/evaluation" | tee "$OUT/evaluate.log"
