#!/usr/bin/env bash
# Runs the tests of the core and of the bindings under AddressSanitizer and UBSan.
#   tests/sanitize.sh [python] [pytest arguments]
# Without arguments of pytest's it runs all cases of GPU kernels, and of the others SAMPLE of each
# test, or all.
# A second build of the package lies in build/sanitize and is put first on Python's path, so nothing
# of the usual build or of the package knows about this.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true

base=build/sanitize
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
# vptr checks ask for type information that TensorFlow does not export; the others make GCC refuse
# its headers (comparing a function with nullptr is then no constant), and ASan sees null anyway.
flags+=" -fno-sanitize=vptr,null,nonnull-attribute,returns-nonnull-attribute"
CXXFLAGS=$flags "$python" setup.py --quiet build --build-base "$base" --build-lib "$base/lib" \
  build_ext --test-module

# libasan must come first in the process, and libstdc++ before it looks for what it intercepts.
preload=$(g++ -print-file-name=libasan.so)
preload+=" $(g++ -print-file-name=libstdc++.so)"
export LD_PRELOAD=$preload
export PYTHONPATH=$PWD/$base/lib${PYTHONPATH:+:$PYTHONPATH}
export TWINFUSE_TEST_CORE=$PWD/$base/objects
export PYTHONMALLOC=malloc
# The interpreter and the frameworks keep memory for ever; the core allocates none.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1
# New memory holds what the tests of unwritten outputs look for.
ASAN_OPTIONS+=:max_malloc_fill_size=1073741824:malloc_fill_byte=127
export UBSAN_OPTIONS=print_stacktrace=1

"$python" -c "
from twinfuse import _core
library, reason = _core.load()
assert library is not None, reason
assert '/$base/' in str(_core.LIBRARY), _core.LIBRARY
"
# A report of the sanitizer ends the process: it must not be in a file of pytest's by then.
pytest=("$python" -m pytest -p no:cacheprovider --capture=sys)
# The table of convolutions runs on the core alone: in a framework it would take an hour here.
if [ $# -eq 0 ]; then
  # What launches GPU kernels, on the fake driver; the interpreter must be chosen before Triton loads.
  TRITON_INTERPRET=1 "${pytest[@]}" -q \
    tests/gpu/test_driver_failures.py tests/gpu/test_limits.py tests/gpu/test_images.py
  # Kernels that run on the CPU; those of many blocks would need gigabytes of stacks. Clusters are
  # among the cases and slices: tests of theirs alone would take minutes.
  TRITON_INTERPRET=1 "${pytest[@]}" -q -n "${WORKERS:-2}" \
    tests/gpu/test_cuda_lstm.py -k "not _768 and not _1024 and not _1280 and not cluster"
  set -- -q -n "${WORKERS:-2}" --dist loadfile --sample "${SAMPLE:-0}" -m "not slow" \
    tests/test_core*.py tests/test_properties*.py tests/test_lstm_onnx.py tests/test_isa.py \
    tests/test_linear_relu*.py tests/test_conv_relu_*_errors.py \
    tests/test_conv_relu_torch_formats.py tests/test_conv_relu_tensorflow_calls.py
fi
exec "${pytest[@]}" "$@"
