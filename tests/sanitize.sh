#!/bin/sh
# Build the engine with AddressSanitizer and UBSan, and run cases of tests/fuzz.py on it.
#
#   tests/sanitize.sh [FOLDER [arguments of tests/fuzz.py]]
#   tests/sanitize.sh                                      500 cases, in a new temporary folder
#   tests/sanitize.sh /tmp/san --seed 3 --cases 5000       in this folder
#   tests/sanitize.sh /tmp/san --seed 3 --case 17          one case, with the whole report
#   tests/sanitize.sh /tmp/san pytest -q tests/kernels     tests instead
#
# It copies the tree to FOLDER and builds it there with gcc, which takes minutes. A FOLDER that has a
# built engine is used as it is: remove it when sources have changed. PYTHON names the interpreter.
# Undefined behaviour and bad accesses end the process. The fuzz reports them with the number of the
# case and continues in a new process. With KEEP_GOING=1, undefined behaviour is reported once for
# each place in 1000 cases, and the process continues.
set -eu

python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- --seed 0 --cases 500

if ! ls "$folder"/src/qkv_fast/_native/engine*.so >/dev/null 2>&1; then
    mkdir -p "$folder"
    (cd "$root" && tar cf - --exclude='*.so' --exclude='__pycache__' csrc src tests setup.py build_support*.py \
        pyproject.toml README.md LICENSE MANIFEST.in) | tar xf - -C "$folder"
    flags="-fsanitize=address,undefined -fno-omit-frame-pointer"
    # What setup.py says comes behind CFLAGS: without a change there, no line has a number.
    sed -i 's/"-O3", "-falign-loops=64", "-g0"/"-O1", "-g1"/' "$folder/setup.py"
    (cd "$folder" && CFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" \
        QKV_FAST_REQUIRE_EXTENSION=1 "$python" setup.py build_ext --inplace >build.log 2>&1) || {
        tail -20 "$folder/build.log"
        exit 1
    }
fi

echo "sanitized tree: $folder"
libraries="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
halt="halt_on_error=1"
[ -z "${KEEP_GOING:-}" ] || halt="halt_on_error=0"
# PYTHONMALLOC: each array's memory is one that AddressSanitizer watches.
cd "$folder"
if [ "$1" = pytest ]; then
    shift
    set -- -m pytest -p no:cacheprovider --capture=sys "$@" # else the report goes with the process
else
    set -- tests/fuzz.py "$@"
fi
LD_PRELOAD="$libraries" \
ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:handle_segv=1" \
UBSAN_OPTIONS="print_stacktrace=1:$halt" \
PYTHONMALLOC=malloc FUZZ_SECONDS="${FUZZ_SECONDS:-600}" PYTHONPATH="$folder/src:$folder/tests" \
    exec "$python" "$@"
