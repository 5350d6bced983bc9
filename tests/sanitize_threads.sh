#!/bin/sh
# Build the engine with ThreadSanitizer, and run 16 Python threads on it at once.
#
#   tests/sanitize_threads.sh [FOLDER [arguments of pytest]]
#   tests/sanitize_threads.sh                                in a new temporary folder
#   tests/sanitize_threads.sh /tmp/tsan tests/engine -k jobs  these tests, in this folder
#
# It copies the tree to FOLDER and builds it there with gcc, which takes minutes. A FOLDER that has
# a built engine is used as it is: remove it when sources have changed. PYTHON names the interpreter,
# whose environment needs pytest, hypothesis, Cython and SciPy. A free-threaded one shows more: the
# GIL orders whatever happens while it is held. The exit status is not 0 if there was a finding.
# Only what our modules read and write is looked at: others are not compiled for it.
# tests/tsan_suppressions.txt lists what is not looked at, and why.
set -eu

python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- tests/engine/test_free_threading.py -k "at_once or counted"

if ! ls "$folder"/src/qkv_fast/_native/engine*.so >/dev/null 2>&1; then
    mkdir -p "$folder"
    (cd "$root" && tar cf - --exclude='*.so' --exclude='__pycache__' csrc src tests setup.py \
        build_support*.py pyproject.toml README.md LICENSE MANIFEST.in) | tar xf - -C "$folder"
    # What setup.py says comes behind CFLAGS: without a change there, no line has a number.
    sed -i 's/"-O3", "-falign-loops=64", "-g0"/"-O1", "-g1"/' "$folder/setup.py"
    (cd "$folder" && CFLAGS="-fsanitize=thread" LDFLAGS="-fsanitize=thread" \
        QKV_FAST_REQUIRE_EXTENSION=1 "$python" setup.py build_ext --inplace >build.log 2>&1) || {
        tail -20 "$folder/build.log"
        exit 1
    }
fi

echo "sanitized tree: $folder"
cd "$folder"
# gcc 12's ThreadSanitizer knows fewer memory layouts than kernels choose from at random.
fixed=$(command -v setarch >/dev/null && echo "setarch -R") || fixed=
# OpenBLAS's threads spin on memory that it does not mark as shared: one thread has none of them.
options="suppressions=$root/tests/tsan_suppressions.txt:ignore_noninstrumented_modules=1"
exec env LD_PRELOAD="$(gcc -print-file-name=libtsan.so)" \
    TSAN_OPTIONS="$options:${TSAN_OPTIONS:-}" \
    OPENBLAS_NUM_THREADS=1 PYTHONPATH="$folder/src:$folder/tests" \
    $fixed "$python" -m pytest -q -p no:cacheprovider "$@"
