#!/usr/bin/env bash
# Everything that needs a GPU: tests, compute-sanitizer on a few of them, then the benchmarks.
#   benchmarks/gpu_check.sh [folder for raw results]
# PYTHON names the interpreter that has torch with CUDA. The compiled parts are built unless they are
# there already (libraries may come from another x86-64 machine); GPU kernels must have been compiled
# by `make kernels`. KEEP_GOING=1 runs the benchmarks although tests fail.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-build/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/pyext${PYTHONPATH:+:$PYTHONPATH}
export TWINFUSE_TEST_REQUIRE=core,torch,gpu

loads="import twinfuse.torch as t; from twinfuse.torch import _operators as o; assert not o.missing, o.missing"
if ! "$python" -c "$loads" 2>/dev/null; then
  "$python" setup.py --quiet build_ext --inplace || exit
  "$python" -c "$loads" || exit
fi

failed=0
"$python" -m pytest -q -rs -p no:cacheprovider -n "${WORKERS:-8}" ${TESTS:-tests/test_gpu_*.py} \
  >"$out/tests.log" 2>&1 || failed=1
tail -n 60 "$out/tests.log" | cut -c1-300

sanitized="(odd_everywhere or uneven_padding or pointwise_stride or three_by_three_stride_nhwc
  or packed_tile or mask_tile or 7-3-40-256 or 7-8-67-640) and not float32 and not norm and not dropout"
sanitized=$(echo $sanitized)
if command -v compute-sanitizer >/dev/null; then
  for tool in ${SANITIZERS:-memcheck racecheck}; do
    # Racecheck does not see that asynchronous stores between blocks of a cluster order anything.
    [ "$tool" = memcheck ] || sanitized+=" and not 256"
    # torch's caching allocator would hide an access beyond a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZER_TIMEOUT:-120}" compute-sanitizer \
      --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
      tests/test_gpu_torch.py tests/test_gpu_lstm_torch.py -k "${SANITIZED:-$sanitized}" \
      >"$out/$tool.log" 2>&1
    status=$?
    # Racecheck exits so for warnings, too. There are some: of the words of Triton's barriers in
    # shared memory, which one warp makes and uses.
    if [ "$status" = 9 ] && [ "$tool" = racecheck ] && grep -q "(0 errors" "$out/$tool.log" &&
      ! grep -q "[0-9] failed" "$out/$tool.log"; then
      status=0
    fi
    [ "$status" = 0 ] || failed=1
    echo "$tool: $(tail -n 2 "$out/$tool.log" | tr '\n' ' ' | cut -c1-200)"
  done
fi

if [ "$failed" = 0 ] || [ "${KEEP_GOING:-}" = 1 ]; then
  "$python" -m benchmarks.gpu ${BENCHMARKS:---compile} --json "$out/bfloat16.json" || failed=1
  "$python" -m benchmarks.gpu_lstm ${LSTM_BENCHMARKS:-} --json "$out/lstm.json" || failed=1
  "$python" -m benchmarks.gpu_networks ${NETWORKS:-} --json "$out/networks.json" || failed=1
fi
exit "$failed"
