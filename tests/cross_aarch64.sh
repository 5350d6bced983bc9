#!/bin/sh
# Compile the kernels for AArch64 and hold each NEON kernel against the portable one, under qemu.
#
#   tests/cross_aarch64.sh [FOLDER]     objects and the program go there; by default a temporary one
#
# It needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user), takes a
# minute of one CPU, and fails if a kernel differs. CC and RUN name other tools: CC=gcc RUN= compares
# the tables of this machine instead.
set -eu

cc=${CC:-aarch64-linux-gnu-gcc}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
cd "$root"
export cc folder
# The flags of setup.py; the float32 kernels take longest, so they are compiled first.
ls csrc/isa/*_f32.c csrc/isa/*_f64.c csrc/isa/*_bf16.c csrc/isa/dispatch.c \
    tests/kernels/against_portable.c | sort -t_ -k2 | xargs -P "$(nproc)" -I {} sh -c '
    "$cc" -O3 -falign-loops=64 -g0 -std=gnu11 -fvisibility=hidden -Wall -Wextra -Werror -Icsrc \
        -c "$1" -o "$folder/$(basename "$1" .c).o"' compile {}
"$cc" -static "$folder"/*.o -lm -o "$folder/against_portable"
${RUN-qemu-aarch64} "$folder/against_portable"
