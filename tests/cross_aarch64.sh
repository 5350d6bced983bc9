#!/bin/sh
# Compile the kernels for AArch64 and hold each NEON kernel against the portable one, under qemu.
#
#   tests/cross_aarch64.sh [FOLDER]      objects and the program go there; by default a temporary one
#
# It needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross,
# qemu-user), takes about a minute, and fails if a kernel differs. CC and RUN name other tools:
# CC=gcc RUN= compares the tables of this machine instead.
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
for source in csrc/isa/*.c tests/kernels/against_portable.c; do
    # The flags of setup.py
    "$cc" -O3 -falign-loops=64 -g0 -std=gnu11 -fvisibility=hidden -Wall -Wextra -Werror -Icsrc \
        -c "$source" -o "$folder/$(basename "$source" .c).o"
done
"$cc" -static "$folder"/*.o -lm -o "$folder/against_portable"
${RUN-qemu-aarch64} "$folder/against_portable"
