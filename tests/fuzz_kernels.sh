#!/bin/sh
# Fuzz the kernels of this machine's tables beside the portable ones (tests/kernels/fuzz_kernels.c).
#
#   tests/fuzz_kernels.sh [SECONDS [FOLDER]]
#
# With clang and its libFuzzer, the inputs are those that reach new branches, for SECONDS (30 by
# default), beginning with those of tests/corpus/kernels.hex, one a line; new ones join FOLDER/corpus,
# and an input with a difference or a bad access is kept in FOLDER. With another compiler (CC=gcc),
# the corpus and INPUTS random inputs run (20000 by default). FOLDER holds the build, which takes half
# a minute of one CPU with clang, and is used again: remove it when sources have changed.
#
# clang's build has AddressSanitizer, which calls functions: checks inline, and those of UBSan, take
# clang minutes for some of these templates. gcc's build has both sanitizers. So new inputs of clang
# are worth a run of gcc's build.
# MERGE=1 then writes the smallest set of inputs that reach the same branches to the corpus.
set -eu

seconds=${1:-30}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${2:-$(mktemp -d)}
rm -rf "$folder/seeds" "$folder/merged"
mkdir -p "$folder/corpus" "$folder/seeds" "$folder/merged"
cd "$root"
corpus=tests/corpus/kernels.hex
"${PYTHON:-python}" -c '
import sys
for number, line in enumerate(open(sys.argv[1])):
    with open(f"{sys.argv[2]}/{number:05}", "wb") as file:
        file.write(bytes.fromhex(line))
' $corpus "$folder/seeds"
if [ -z "${CC:-}" ]; then
    CC=gcc
    if command -v clang >/dev/null && echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
        clang -fsanitize=fuzzer -x c - -o "$folder/probe" 2>/dev/null; then CC=clang; fi
fi
case $CC in
*clang*)
    flags="-fsanitize=fuzzer-no-link,address -gline-tables-only
        -mllvm -asan-instrumentation-with-call-threshold=0"
    link="-fsanitize=address,fuzzer" ;;
*)
    flags="-fsanitize=address,undefined -g1 -DSTANDALONE"
    link="-fsanitize=address,undefined" ;;
esac
export CC flags folder
program=$folder/fuzz_kernels
if [ ! -x "$program" ]; then
    ls csrc/isa/*_f32.c csrc/isa/*_f64.c csrc/isa/*_bf16.c csrc/isa/dispatch.c \
        tests/kernels/fuzz_kernels.c | sort -t_ -k2 | xargs -P "$(nproc)" -I {} sh -c '
        "$CC" -O1 -std=gnu11 -fvisibility=hidden -fno-omit-frame-pointer $flags \
            -fno-sanitize-recover=all -Icsrc -c "$1" -o "$folder/$(basename "$1" .c).o"' compile {}
    "$CC" $link "$folder"/*.o -lm -o "$program"
fi
export ASAN_OPTIONS=detect_leaks=0:allow_user_poisoning=1
export UBSAN_OPTIONS=print_stacktrace=1
case $CC in
*clang*)
    "$program" -max_total_time="$seconds" -max_len=400 -print_final_stats=1 \
        -artifact_prefix="$folder/" "$folder/corpus" "$folder/seeds"
    if [ -n "${MERGE:-}" ]; then
        "$program" -set_cover_merge=1 -use_counters=0 -max_len=400 "$folder/merged" \
            "$folder/seeds" "$folder/corpus"
        "${PYTHON:-python}" -c '
import pathlib, sys
inputs = sorted(file.read_bytes().hex() for file in pathlib.Path(sys.argv[1]).iterdir())
print(*inputs, sep="\n")
' "$folder/merged" >$corpus
    fi ;;
*)
    "$program" "$folder/seeds"/*
    "$program" "${INPUTS:-20000}" ;;
esac
