#!/bin/sh
# Compile the C part for Windows, link it, and run it under Wine: the thread pool with many callers,
# then each SIMD kernel beside the portable one.
#
#   tests/cross_windows.sh [FOLDER]     objects and programs go there; by default a temporary one
#
# It needs x86_64-w64-mingw32-gcc and Wine (Debian: gcc-mingw-w64-x86-64, wine64), takes minutes of
# one CPU, and fails if a task is lost or a kernel differs. Without Wine it only links. Variables:
#
#   PARTS  "pool", which takes seconds, or "kernels": one of the two
#   CC     another compiler: CC="zig cc -target x86_64-linux-musl" RUN=
#   FLAGS  its flags beside those of setup.py; OPT: instead of -O3
#   RUN    what runs the programs: "" runs them here, "none" only links
#   JOBS   of each of the pool's 8 callers, instead of 300
set -eu

cc=${CC:-x86_64-w64-mingw32-gcc}
# gcc for Windows moves vectors on the stack as if it were aligned to 32 or 64 bytes, not to 16.
flags=${FLAGS-$([ -n "${CC:-}" ] || echo -Wa,-muse-unaligned-vector-move)}
for wine in wine64 /usr/lib/wine/wine64 wine none; do
    if command -v "$wine" >/dev/null; then break; fi
done
run=${RUN-$wine}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
cd "$root"
export cc folder
export all_flags="${OPT:--O3} -g0 -std=gnu11 -fvisibility=hidden -Wall -Wextra -Werror
    -Wno-maybe-uninitialized -Wno-unknown-warning-option -Icsrc $flags"

# build PROGRAM SOURCE...: the float32 kernels take longest, so they are compiled first.
build() {
    program=$1
    shift
    mkdir -p "$folder/$program"
    export program
    printf '%s\n' "$@" | sort -t_ -k2 | xargs -P "$(nproc)" -I {} sh -c '
        $cc $all_flags -c "$1" -o "$folder/$program/$(basename "$1" .c).o"' compile {}
    # shellcheck disable=SC2086
    $cc $flags "$folder/$program"/*.o -lm ${LIBRARIES:-} -o "$folder/$program.exe"
    echo "linked $program"
}

export WINEPREFIX="${WINEPREFIX:-$folder/wine}" WINEDEBUG="${WINEDEBUG:--all}"
for part in ${PARTS:-pool kernels}; do
    if [ "$part" = pool ]; then
        build pool csrc/runtime/*.c tests/engine/thread_pool_stress.c
        [ "$run" = none ] || $run "$folder/pool.exe" 8 "${JOBS:-300}"
    else
        build kernels csrc/isa/*.c csrc/runtime/*.c tests/kernels/against_portable.c
        [ "$run" = none ] || $run "$folder/kernels.exe"
    fi
done
