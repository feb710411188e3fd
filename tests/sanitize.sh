#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UBSan into a temporary folder and runs the kernel
# tests through it, on every instruction set of this machine; where AVX-512 is none of them, its
# kernels too, their vectors made of AVX2's. AMX's tiles, beside AVX512-BF16 or all of these, are
# arrays on any machine, as the sanitizers see nothing of what an instruction of AMX reads. Usage: tests/sanitize.sh [PYTHON]
set -euo pipefail
python=${1:-python}
cd "$(dirname "$0")/.."
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT

emulated=
grep -qw avx512f /proc/cpuinfo || emulated=-DRNNFAST_EMULATE_AVX512
CFLAGS="${CFLAGS:-} -DRNNFAST_EMULATE_TILES $emulated" RNNFAST_SANITIZE=1 RNNFAST_REQUIRE_EXT=1 "$python" setup.py -q build \
  --build-base "$where/build" --build-lib "$where/lib" >"$where/log" 2>&1 ||
  { tail -30 "$where/log"; exit 1; }
cp -r tests pyproject.toml "$where"
cd "$where" # away from the source tree, whose rnnfast would be imported instead

# The interpreter is not instrumented, so the runtimes come first by preloading; torch's and
# Python's own allocations at exit are not ours to judge.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$where/lib" RNNFAST_REQUIRE_EXT=1
preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
preload="$preload $(gcc -print-file-name=libstdc++.so)"
LD_PRELOAD="$preload" "$python" -c \
  'import rnnfast.backends as b; assert b.build_record()["sanitized"] and not b.extension_error'
export RNNFAST_TEST_CAPABILITY=1 # each set once, and here
kernel_tests() {
  LD_PRELOAD="$preload" "$python" -m pytest -q -p no:cacheprovider \
    -k "not reference and not opcheck" tests/test_op.py tests/test_numerics.py "$@"
}
kernel_tests tests/test_errors.py tests/test_direct_calls.py # the best set of this machine
ATEN_CPU_CAPABILITY=default kernel_tests
if [ -n "$emulated" ]; then
  export RNNFAST_EMULATE_AVX512=1
  kernel_tests
else
  ATEN_CPU_CAPABILITY=avx2 kernel_tests
fi
if [ -n "$emulated" ] || grep -qw avx512_bf16 /proc/cpuinfo; then
  RNNFAST_EMULATE_TILES=1 kernel_tests \
    -k "not reference and not opcheck and (bfloat16 or sixteen_bits or nan_stays or any_stride)"
fi
