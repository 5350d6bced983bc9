#!/bin/sh
# Fuzz the kernels of this machine's tables beside the portable ones (tests/kernels/fuzz_kernels.c).
#
#   tests/fuzz_kernels.sh [SECONDS [FOLDER]]
#
# With clang and its libFuzzer, the inputs are those that reach new branches, for SECONDS (30 by
# default), beginning with those of tests/corpus/kernels; new ones join FOLDER/corpus, and an input
# with a difference or a bad access is kept in FOLDER. With another compiler (CC=gcc), the corpus and
# INPUTS random inputs run (20000 by default). FOLDER holds the build, which takes some minutes of
# one CPU and is used again: remove it when sources have changed.
#
# AddressSanitizer and UBSan watch both. clang takes minutes for each of these templates with all of
# UBSan or with ASan's checks inline, so there ASan calls functions, and gcc alone has all of UBSan.
# MERGE=1 then writes the smallest set of inputs with the same coverage to tests/corpus/kernels.
set -eu

seconds=${1:-30}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${2:-$(mktemp -d)}
mkdir -p "$folder/corpus"
cd "$root"
corpus=tests/corpus/kernels
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
        -artifact_prefix="$folder/" "$folder/corpus" $corpus
    if [ -n "${MERGE:-}" ]; then
        mkdir -p $corpus
        "$program" -merge=1 -max_len=400 $corpus "$folder/corpus"
    fi ;;
*)
    [ -z "$(ls $corpus)" ] || "$program" $corpus/*
    "$program" "${INPUTS:-20000}" ;;
esac
