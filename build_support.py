"""Compile C and Cython files in parallel, and only those whose content changed.

Each result is a file `stem-key.suffix` in one folder. The key is a hash of everything that decides
the result's content. Timestamps and include folders are not part of it, because pip unpacks NumPy's
headers into a new temporary folder for each build. This module serves setup.py and needs only the
standard library.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

JOBS_VARIABLE = "QKV_FAST_BUILD_JOBS"
CIMPORT = re.compile(r"^from \.(\w+) cimport\b", re.MULTILINE)
RESULTS_PER_STEM = 8  # some Python versions, with and without OpenMP, and what was before a change


class BuildError(Exception):
    """A compiler or Cython failed; the message is the line that tells why."""


def job_count(environ: Mapping[str, str]) -> int:
    """Return how many files to compile at a time: the variable's value, else the usable CPUs."""
    asked = environ.get(JOBS_VARIABLE, "").strip()
    if asked:
        if not (asked.isdecimal() and int(asked)):
            raise SystemExit(f"{JOBS_VARIABLE} is {asked!r}: it must be a whole number above 0")
        return int(asked)
    if hasattr(os, "sched_getaffinity"):  # Linux: what a container or taskset leaves
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_compiler(compiler: Any, environ: Mapping[str, str]) -> None:
    """Have setuptools' compiler for Windows, MSVC's cl, run clang-cl instead; raise without it.

    cl does not know the GNU C that csrc is written in: statement attributes, vector arithmetic and
    features for one file alone. clang-cl takes cl's options and links with what cl makes.
    """
    if compiler.compiler_type != "msvc":
        return
    asked = environ.get("CC", "")
    found = shutil.which(asked if "clang-cl" in asked else "clang-cl")
    if found is None:
        raise BuildError(
            "MSVC's cl cannot compile the engine, which is GNU C: put clang-cl, of LLVM or of "
            "Visual Studio, on PATH or in CC, or build with gcc (build_ext --compiler=mingw32)"
        )
    if not getattr(compiler, "initialized", True):
        compiler.initialize()
    compiler.cc = found


def options(compiler_type: str, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what to compile and to link with, by setuptools' name of the kind of compiler.

    `flags` are those of gcc and clang.
    """
    if compiler_type == "msvc":  # clang-cl, which gives them to clang
        return [f"/clang:{flag}" for flag in flags], []
    if compiler_type == "mingw32":
        # gcc for Windows aligns the stack to 16 bytes and moves vectors as if it were to 32 or 64
        # (GCC's bug 54412): the assembler makes these moves unaligned ones.
        return [*flags, "-Wa,-muse-unaligned-vector-move"], []
    return list(flags), ["-pthread"]


def hash_parts(*parts: str | bytes) -> str:
    """Return a short hash of the parts and of where each of them ends."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:20]


class BuildCache:
    """A folder of build results that survives the build and may serve several at once."""

    def __init__(self, *folders: str | os.PathLike[str]) -> None:
        """Use the first of the folders that can be written to."""
        for folder in map(Path, folders):
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                self.folder = folder
                return
        raise BuildError(f"cannot write to {' or '.join(map(str, folders))}")

    def path(self, stem: str, suffix: str, key: str) -> Path:
        """Return where the result for this key is or will be."""
        return self.folder / f"{stem}-{key}{suffix}"

    def get(self, path: Path, make: Callable[[Path], None]) -> bool:
        """Have `make` write the result unless it is there; return whether it was made.

        Other builds see a result only once it is complete: it is written elsewhere and renamed.
        """
        if path.exists():
            with suppress(OSError):
                os.utime(path)  # what is in use is pruned last
            return False
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            result = Path(scratch) / path.name
            make(result)
            os.replace(result, path)
        self.prune(path)
        return True

    def prune(self, path: Path) -> None:
        """Delete the oldest results of this path's stem, all but RESULTS_PER_STEM."""
        pattern = f"{path.name.rpartition('-')[0]}-*{path.suffix}"
        with suppress(FileNotFoundError):  # another build prunes as well
            results = sorted(self.folder.glob(pattern), key=lambda p: p.stat().st_mtime)
            for old in results[:-RESULTS_PER_STEM]:
                old.unlink()


def tool_environment() -> dict[str, str]:
    """Return the environment for compilers: on macOS, the release that Python was built for."""
    target = sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET")
    return ({"MACOSX_DEPLOYMENT_TARGET": str(target)} if target else {}) | os.environ


def run_tool(command: Sequence[str]) -> None:
    """Run a compiler and print what it says in one piece; raise BuildError when it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=tool_environment()
    )
    output = done.stdout.decode(errors="replace").strip()
    if done.returncode or output:
        print(" ".join(command), output, sep="\n", flush=True)
    if done.returncode:
        errors = [line for line in output.splitlines() if "error" in line.lower()]
        what = errors[0] if errors else f"exit status {done.returncode}"
        raise BuildError(f"{command[0]}: {what}")


def preprocess(flags: Sequence[str], source: str) -> bytes:
    """Return a C file with its headers and macros expanded and without line markers.

    Empty where the compiler cannot do that; what is wrong shows when it compiles the file.
    """
    architectures = [name for flag, name in pairwise(flags) if flag == "-arch"]
    common = [f for f in flags if f != "-arch" and f not in architectures]
    text = b""
    for architecture in architectures or [""]:  # macOS: clang preprocesses for one at a time
        chosen = ["-arch", architecture] if architecture else []
        done = subprocess.run(
            [*common, *chosen, "-E", "-P", source], capture_output=True, env=tool_environment()
        )
        if done.returncode:
            return b""
        text += done.stdout
    return text


@lru_cache
def compiler_identity(*flags: str) -> bytes:
    """Return what the compiler says of its version, its target and what its flags mean here."""
    command = [*flags, "-v", "-E", "-x", "c", os.devnull]
    environment = tool_environment() | {"LC_ALL": "C"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    return done.stdout


def object_key(flags: Sequence[str], source: str) -> str:
    """Return the key of an object file: its preprocessed source, its flags, its compiler.

    The folders of headers are left out, because their content is in the preprocessed source.
    """
    text = preprocess(flags, source)
    if not text:
        return uuid.uuid4().hex  # unknown, so like no other
    others = [flag for flag in flags if not flag.startswith("-I")]
    return hash_parts(text, compiler_identity(*others), *others)


def compile_object(cache: BuildCache, flags: Sequence[str], source: str) -> tuple[str, bool]:
    """Return the object file of a C file, and whether it had to be compiled."""
    stem = Path(source).stem.partition("-")[0]  # Cython's own results are called stem-key.c
    path = cache.path(stem, ".o", object_key(flags, source))
    return str(path), cache.get(path, lambda out: run_tool([*flags, "-c", source, "-o", str(out)]))


def cython_files(pyx: Path) -> list[Path]:
    """Return a Cython file and the .pxd files of its folder that it depends on.

    These are the one with its name, and those that it or they cimport from: "from .name cimport".
    """
    found: set[Path] = set()
    waiting = [pyx, pyx.with_suffix(".pxd")]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        names = CIMPORT.findall(path.read_text(encoding="utf-8"))
        waiting += [path.with_name(f"{name}.pxd") for name in names]
    return sorted(found)


def translate(
    cache: BuildCache, pyx: str, module: str, directives: Mapping[str, object]
) -> tuple[str, bool]:
    """Return the C file of a Cython file, and whether Cython had to run."""
    options = [f"-X{name}={value}" for name, value in sorted(directives.items())]
    packages = [f"{name} {version(name)}" for name in ("cython", "numpy", "scipy")]
    content = [path.read_bytes() for path in cython_files(Path(pyx))]
    key = hash_parts(pyx, module, *options, *packages, *content)
    path = cache.path(Path(pyx).stem, ".c", key)
    command = [sys.executable, "-m", "cython", "--module-name", module, *options, pyx]
    return str(path), cache.get(path, lambda out: run_tool([*command, "-o", str(out)]))


def run_parallel(tasks: Iterable[Callable[[], None]], jobs: int) -> None:
    """Run the tasks, starting them in order; after a failure start no more and raise it."""
    stop = threading.Event()

    def run(task: Callable[[], None]) -> None:
        if not stop.is_set():
            try:
                task()
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(run, task) for task in tasks]:
                future.result()
        finally:
            stop.set()  # also after Ctrl+C


def build_objects(
    cache: BuildCache,
    sources: Sequence[tuple[str, str, Sequence[str]]],  # module, file, compiler and flags
    directives: Mapping[str, object],
    jobs: int,
) -> dict[str, list[str]]:
    """Return each module's object files, in the order of its sources; compile what is new."""
    objects: dict[tuple[str, str], str] = {}
    lock = threading.Lock()

    def build(module: str, file: str, flags: Sequence[str]) -> None:
        start = time.perf_counter()
        c_file, translated = file, False
        if file.endswith(".pyx"):
            c_file, translated = translate(cache, file, module, directives)
        path, compiled = compile_object(cache, flags, c_file)
        what = f"{time.perf_counter() - start:.1f} s" if translated or compiled else "unchanged"
        with lock:
            objects[module, file] = path
            print(f"[{len(objects):2}/{len(sources)}] {file}: {what}", flush=True)

    print(
        f"{len(sources)} files to compile or find in {cache.folder}, {jobs} at a time", flush=True
    )
    # The float32 kernels also serve 16-bit types: they take longest, so they start first.
    longest_first = sorted(sources, key=lambda source: not source[1].endswith("_f32.c"))
    run_parallel([partial(build, *source) for source in longest_first], jobs)
    modules = dict.fromkeys(module for module, _, _ in sources)
    return {m: [objects[m, file] for module, file, _ in sources if module == m] for m in modules}
