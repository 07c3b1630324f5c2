#!/usr/bin/env bash
# Everything that needs a GPU, in one go, in the active environment (PyTorch with CUDA, Triton, nvcc, pybind11, pytest):
# build, the whole test suite on the GPU, compute-sanitizer on the CUDA kernels, the benchmarks. Ends with a summary.
# Rivals take part where they are installed: flashinfer-python, liger-kernel, cut-cross-entropy, trl==1.13.0.
#
#   bash benchmarks/on_gpu.sh [FOLDER]     results and logs go to FOLDER (default: benchmarks/results)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
python=${PYTHON:-python3}
gpu=$($python -c 'import torch; print(torch.cuda.get_device_name(0).replace(" ", "-").lower())') || exit 1
summary=()
step() { # name, command...: run it, keep its log, remember how it went
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then summary+=("ok      $name ($((SECONDS - start)) s)"); else summary+=("FAILED  $name: $out/$name.log"); fi
  tail -n 3 "$out/$name.log"
}

step build "$python" setup.py build_ext --inplace
step tests "$python" -m pytest -q tests
# Small problems: the tools slow kernels down a hundredfold.
small="(mixture_sample or row_uniforms or mirror_descent) and cuda and not large and not two_to and not tail and not often"
for tool in memcheck racecheck initcheck synccheck; do
  step "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" -m pytest -q -x tests/test_mirror_descent.py tests/test_row_uniforms.py tests/test_mixture_sample.py -k "$small"
done
step benchmarks "$python" -m benchmarks.run --device cuda --out "$out/$gpu.jsonl"
step rollout "$python" -m benchmarks.rollout --device cuda --out "$out/$gpu-rollout.jsonl"
step train_step "$python" -m benchmarks.train_step --device cuda --out "$out/$gpu-train-step.jsonl"
step growth "$python" -m benchmarks.run --device cuda --preset growth --no-compile --out "$out/$gpu.jsonl"
step plots "$python" -m benchmarks.run --plot "$out/$gpu.jsonl" --plot-dir "$out"

tail -n 60 "$out/benchmarks.log"
printf '%s\n' "${summary[@]}"
! printf '%s\n' "${summary[@]}" | grep -q FAILED
