"""The compiled engine, built where there is a compiler; all else is in pyproject.toml.

QKV_FAST_NO_EXTENSION=1       don't build it: the pure-Python engine serves the whole API
QKV_FAST_REQUIRE_EXTENSION=1  fail when it can't be built (CI and wheel builds set this)
QKV_FAST_OPENMP=1             loop with OpenMP instead of the library's own thread pool
QKV_FAST_BUILD_JOBS=2         compile so many files at a time; by default, as many as there are CPUs
"""

import copy
import json
import os
import shutil
import sys
from contextlib import suppress
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # PEP 517 builds have no project folder there
import build_support
import build_support_wheel

PACKAGE = "qkv_fast"
OPENMP = os.environ.get("QKV_FAST_OPENMP") == "1"
# Each C file is linked into one module: src/qkv_fast/_native/kernels.pxd.
C_SOURCES = {
    "isa": sorted(glob("csrc/isa/*.c") + glob("csrc/kernels/*.c") + glob("csrc/simd/*.c")),
    "parallel": [
        f"csrc/runtime/{name}.c"
        for name in ("job", "openmp_team", "thread_pool", "threads_posix", "threads_windows")
    ],
    "rows": ["csrc/runtime/convert.c"],
    "tuning": ["csrc/runtime/caches.c"],
}
OBJECTS = "build/objects"  # stays when pip's temporary folders go: build_support.BuildCache
# No -march and no -ffast-math: an ISA's features are named in its own csrc/isa file, and flags that
# change arithmetic would hold for the whole interpreter. Aligned loops: 3 % on AVX2.
FLAGS = ["-O3", "-falign-loops=64", "-g0", "-std=gnu11", "-fvisibility=hidden"]


def extensions():
    names = sorted(Path(pyx).stem for pyx in glob(f"src/{PACKAGE}/_native/*.pyx"))
    return [
        Extension(
            f"{PACKAGE}._native.{name}",
            [f"src/{PACKAGE}/_native/{name}.pyx", *C_SOURCES.get(name, [])],
            depends=glob("csrc/*/*.h"),
            include_dirs=["csrc"],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        )
        for name in names
    ]


def temporary_name(library):
    """Return a name of this process beside the library, with its suffix (which git ignores)."""
    return str(Path(library).with_suffix(f".{os.getpid()}{Path(library).suffix}"))


class BuildExtension(build_ext):
    """Build the engine or, failing that, note why not; never leave an old one behind."""

    def initialize_options(self):
        super().initialize_options()
        self.cython_c_in_temp = True
        self.cython_directives = {
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": True,
        }

    def run(self):
        self.jobs = self.parallel or build_support.job_count(os.environ)
        reason = self.build_or_reason()
        if reason:
            if os.environ.get("QKV_FAST_REQUIRE_EXTENSION") == "1":
                raise SystemExit(f"QKV_FAST_REQUIRE_EXTENSION=1, but {reason}")
            print(f"qkv_fast: installing without the compiled engine: {reason}")
            for extension in self.extensions:
                Path(self.built_path(extension)).unlink(missing_ok=True)
            self.extensions = []  # nothing for an editable install to look for
        cc = getattr(self.compiler, "cc", None) or "unknown"  # clang-cl's
        compiler = getattr(self.compiler, "compiler", None) or [cc]
        facts = {
            "extension": not reason,
            "reason": reason,
            "openmp": OPENMP,
            "compiler": " ".join(map(str, compiler)),
        }
        self.facts_path().parent.mkdir(parents=True, exist_ok=True)
        self.facts_path().write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def build_or_reason(self):
        if os.environ.get("QKV_FAST_NO_EXTENSION") == "1":
            return "QKV_FAST_NO_EXTENSION=1 was set when it was built"
        inplace = self.inplace
        try:
            import numpy

            for extension in self.extensions:
                extension.include_dirs.append(numpy.get_include())
            super().run()
        except (Exception, SystemExit) as error:  # whatever a broken tool chain can raise
            self.inplace = inplace  # setuptools cleared it on the way
            return f"the build failed: {type(error).__name__}: {error}"
        return ""

    def build_extensions(self):
        build_support.choose_compiler(self.compiler, os.environ)
        compiling, linking = build_support.options(self.compiler.compiler_type, FLAGS)
        for extension in self.extensions:
            openmp = ["-fopenmp"] * (OPENMP and extension.name.endswith(".parallel"))
            extension.extra_compile_args = [*compiling, *openmp]
            extension.extra_link_args = [*linking, *openmp]
        flags = {extension.name: self.compile_flags(extension) for extension in self.extensions}
        if not all(flags.values()):
            super().build_extensions()
            return
        declared = self.extensions  # wheel builds run this command twice
        self.extensions = self.compile_objects(flags)
        self.force = self.compiler.force = True  # link, whatever the files' times
        self.compiler.link_shared_object = self.link_and_rename
        try:
            super().build_extensions()
        finally:
            self.extensions = declared

    def compile_objects(self, flags):
        """Compile what changed; return extensions that are only to be linked."""
        sources = [(e.name, source, flags[e.name]) for e in self.extensions for source in e.sources]
        cache = build_support.BuildCache(OBJECTS, self.build_temp)
        objects = build_support.build_objects(cache, sources, self.cython_directives, self.jobs)
        linkable = [copy.copy(extension) for extension in self.extensions]
        for extension in linkable:
            extension.extra_objects = objects[extension.name]
            extension.sources = []
        return linkable

    def link_and_rename(self, objects, library, *args, **options):
        """Link to a temporary name and rename: another build may be copying the library."""
        temporary = temporary_name(library)
        type(self.compiler).link_shared_object(self.compiler, objects, temporary, *args, **options)
        os.replace(temporary, library)

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            library = self.built_path(extension)
            temporary = temporary_name(library)
            shutil.copy(Path(self.build_lib) / self.get_ext_filename(extension.name), temporary)
            os.replace(temporary, library)

    def compile_flags(self, extension):
        """Return setuptools' command for an extension's files, without the files.

        It is empty where setuptools has to compile them itself: clang-cl, or a setuptools that
        runs the compiler in a way unknown here.
        """
        command = []
        recorder = copy.copy(self.compiler)
        recorder.call = recorder.spawn = lambda arguments, **_: command.extend(arguments)
        if recorder.compiler_type not in ("unix", "mingw32"):
            return []
        with suppress(CompileError):
            [built] = recorder.compile(
                ["file.c"],
                output_dir=self.build_temp,
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                debug=self.debug,
                extra_postargs=extension.extra_compile_args,
            )
            command = [part for part in command if part not in ("-c", "file.c", "-o", built)]
        return command

    def built_path(self, extension):
        if self.inplace or self.editable_mode:
            return Path("src") / self.get_ext_filename(extension.name)
        return self.get_ext_fullpath(extension.name)

    def facts_path(self):
        root = Path("src") if self.inplace or self.editable_mode else Path(self.build_lib)
        return root / PACKAGE / "_build_info.json"

    def get_outputs(self):
        return [*super().get_outputs(), str(self.facts_path())]


class Wheel(bdist_wheel):
    """A wheel without the engine runs anywhere, and its name says so."""

    def run(self):
        self.run_command("build_ext")
        if not self.get_finalized_command("build_ext").extensions:
            self.root_is_pure = True
        super().run()

    def get_tag(self):
        return ("py3", "none", "any") if self.root_is_pure else super().get_tag()

    def write_wheelfile(self, wheelfile_base, *args, **options):
        """Write WHEEL and, beside it, what the wheel contains and needs."""
        super().write_wheelfile(wheelfile_base, *args, **options)
        facts = self.distribution.metadata
        content = build_support_wheel.sbom(
            facts.get_name(),
            facts.get_version(),
            facts.license_expression,
            self.distribution.install_requires,
            native=not self.root_is_pure,
        )
        build_support_wheel.write_sbom(Path(wheelfile_base), content)
        build_support_wheel.unify_modes(self.bdist_dir)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
