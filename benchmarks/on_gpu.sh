#!/usr/bin/env bash
# Everything that only a card can show, in one go and under 9 minutes, without network: the kernels
# against their oracle, then their speed beside the card's ceilings, then whole tokens.
#   benchmarks/on_gpu.sh FOLDER                leaves FOLDER/gpu-*.json; copy them to benchmarks/results
#   benchmarks/on_gpu.sh FOLDER end-to-end     and whole models, up to 75 GB of disk one after the other
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?give a folder for the results}
mkdir -p "$out"
python=${PYTHON:-python3}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
echo "== 1. correct?"
"$python" -m pytest -m gpu tests -q -p no:cacheprovider
"$python" -m pytest --card tests/cuda_ext -q -p no:cacheprovider -k "not sanitizer and not machine_code"
echo "== 2. fast?"
"$python" -m benchmarks.gpu.kernel_table "$out/gpu-kernels.json"
echo "== 3. whole tokens"
"$python" -m benchmarks.gpu.decode_step "$out/gpu-decode-step.json"
if [ "${2:-}" != "end-to-end" ]; then exit 0; fi
echo "== 4. whole models within 24 GB, some of their experts elsewhere; minutes for each"
"$python" -m benchmarks.gpu.end_to_end "$out/gpu-end-to-end.json" --peers
