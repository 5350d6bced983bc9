"""build_support*.py and setup.py: what a build compiles, what fails, what a wheel holds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
import zipfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "build_support.py").exists():
    pytest.skip("needs a checkout or an sdist", allow_module_level=True)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_support = load("build_support.py")
build_twice = load("tools/build_twice.py")
CC = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler")


@pytest.fixture
def cache(tmp_path: Path) -> build_support.BuildCache:
    return build_support.BuildCache(tmp_path / "objects")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two C files, one of which includes a header."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "size.h").write_text("#define SIZE 4\n")
    (tmp_path / "with_header.c").write_text('#include "size.h"\nint sizes[SIZE];\n')
    (tmp_path / "alone.c").write_text("#ifdef LARGE\nlong x;\n#else\nint x;\n#endif\n")
    return tmp_path


@pytest.fixture
def compiled(project: Path, cache: build_support.BuildCache) -> Callable[..., dict[str, bool]]:
    """Return a build, which returns for each file whether it was compiled."""

    def build(*flags: str, include: str = "include", compiler: str | None = CC) -> dict[str, bool]:
        assert compiler is not None
        command = [compiler, f"-I{include}", *flags]
        files = ("with_header", "alone")
        return {f: build_support.compile_object(cache, command, f"{f}.c")[1] for f in files}

    return build


BOTH = {"with_header": True, "alone": True}
NONE = {"with_header": False, "alone": False}
ONLY_HEADER = {"with_header": True, "alone": False}


@needs_compiler
def test_second_build_compiles_nothing(project: Path, compiled: Callable) -> None:
    assert compiled() == BOTH
    for file in project.glob("*.c"):
        os.utime(file)
    assert compiled() == NONE


@needs_compiler
def test_header_rebuilds_what_includes_it(project: Path, compiled: Callable) -> None:
    compiled()
    (project / "include" / "size.h").write_text("#define SIZE 5\n")
    assert compiled() == ONLY_HEADER
    (project / "include" / "size.h").write_text("/* A comment. */\n#define SIZE 5\n")
    assert compiled() == NONE


@needs_compiler
def test_moved_headers_rebuild_nothing(project: Path, compiled: Callable) -> None:
    compiled()
    (project / "include").rename(project / "elsewhere")
    assert compiled(include="elsewhere") == NONE


@needs_compiler
def test_flags_rebuild_and_do_not_mix(compiled: Callable, cache: build_support.BuildCache) -> None:
    assert compiled("-O1") == BOTH
    assert compiled("-O0") == BOTH
    assert compiled("-O1") == NONE
    assert len(list(cache.folder.glob("alone-*.o"))) == 2
    assert compiled("-O1", "-DLARGE")["alone"]


@needs_compiler
def test_other_compiler_rebuilds(project: Path, compiled: Callable) -> None:
    other = project / "other-cc"
    other.write_text(f'#!/bin/sh\n[ "$*" = "${{*#*-v}}" ] || echo version 2\nexec {CC} "$@"\n')
    other.chmod(0o755)
    assert compiled() == BOTH
    assert compiled(compiler=str(other)) == BOTH


@needs_compiler
def test_failure_tells_file_line_and_error(
    project: Path, compiled: Callable, cache: build_support.BuildCache, capfd: pytest.CaptureFixture
) -> None:
    (project / "alone.c").write_text("int x;\nint missing_semicolon\n")
    with pytest.raises(build_support.BuildError, match=r"alone\.c:2.*error"):
        compiled()
    assert "missing_semicolon" in capfd.readouterr().out
    assert not list(cache.folder.glob("alone*"))
    assert not list(cache.folder.glob("tmp*"))


@needs_compiler
def test_objects_come_in_the_order_of_sources(
    project: Path, cache: build_support.BuildCache, capfd: pytest.CaptureFixture
) -> None:
    flags = [str(CC), "-Iinclude"]
    shutil.copy("alone.c", "kernels_f32.c")
    names = ("alone.c", "with_header.c", "kernels_f32.c")
    sources = [("package.a", name, flags) for name in names] + [("package.b", "alone.c", flags)]
    objects = build_support.build_objects(cache, sources, {}, jobs=3)
    stems = {m: [Path(o).name.rpartition("-")[0] for o in paths] for m, paths in objects.items()}
    assert stems == {"package.a": ["alone", "with_header", "kernels_f32"], "package.b": ["alone"]}
    assert "[ 4/4]" in capfd.readouterr().out


def test_cython_runs_again_only_when_the_file_or_a_declaration_changed(
    project: Path, cache: build_support.BuildCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_support, "version", lambda name: "1.0")
    monkeypatch.setattr(build_support, "run_tool", lambda command: Path(command[-1]).touch())
    pyx = project / "module.pyx"
    pyx.write_text("x = 1\n")

    def ran(**directives: object) -> bool:
        return build_support.translate(cache, str(pyx), "package.module", directives)[1]

    assert ran()
    os.utime(pyx)
    assert not ran()
    assert ran(boundscheck=False)
    pyx.write_text("x = 2\n")
    assert ran()
    (project / "module.pxd").write_text("cdef int x\nfrom .other cimport y\n")
    assert ran()
    (project / "other.pxd").write_text("cdef enum:\n    y = 1\n")
    assert ran()
    (project / "unrelated.pxd").write_text("cdef int z\n")
    assert not ran()
    monkeypatch.setattr(build_support, "version", lambda name: "1.1")
    assert ran()


def test_unfinished_results_are_never_seen(cache: build_support.BuildCache) -> None:
    path = cache.path("stem", ".o", "key")
    begun, go_on = threading.Event(), threading.Event()

    def slow(out: Path) -> None:
        out.write_text("half")
        begun.set()
        assert go_on.wait(10)
        out.write_text("whole")

    first = threading.Thread(target=cache.get, args=(path, slow))
    first.start()
    assert begun.wait(10)
    assert not path.exists()
    assert cache.get(path, lambda out: out.write_text("whole"))  # a second build at the same time
    go_on.set()
    first.join()
    assert [p.name for p in cache.folder.iterdir()] == [path.name]
    assert path.read_text() == "whole"


def test_pruning_spares_other_files_and_what_is_in_use(cache: build_support.BuildCache) -> None:
    names = [("stem", str(i)) for i in range(build_support.RESULTS_PER_STEM)]
    paths = [cache.path(stem, ".o", key) for stem, key in [*names, ("stem_f32", "0")]]
    for age, path in enumerate(paths):
        path.touch()
        os.utime(path, (age, age))
    assert not cache.get(paths[0], Path.touch)
    assert cache.get(cache.path("stem", ".o", "new"), Path.touch)
    assert {path.name for path in paths if not path.exists()} == {"stem-1.o"}


def test_unwritable_folder_falls_back_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = build_support.BuildCache(tmp_path / "file" / "objects", tmp_path / "temporary")
    assert cache.folder == tmp_path / "temporary"
    with pytest.raises(build_support.BuildError, match="cannot write to"):
        build_support.BuildCache(tmp_path / "file")


def test_failure_stops_what_has_not_begun() -> None:
    done: list[int] = []

    def fail() -> None:
        raise build_support.BuildError("no")

    with pytest.raises(build_support.BuildError):
        build_support.run_parallel([fail, *(partial(done.append, i) for i in range(1000))], 1)
    assert not done


def test_job_count() -> None:
    assert build_support.job_count({"QKV_FAST_BUILD_JOBS": "3"}) == 3
    assert build_support.job_count({}) >= 1
    for wrong in ("0", "-1", "two", "1.5"):
        with pytest.raises(SystemExit, match=r"QKV_FAST_BUILD_JOBS is .* whole number above 0"):
            build_support.job_count({"QKV_FAST_BUILD_JOBS": wrong})


def test_cl_is_refused_and_clang_cl_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cl = SimpleNamespace(compiler_type="msvc", cc="cl.exe")
    with pytest.raises(build_support.BuildError, match=r"MSVC's cl cannot compile .* put clang-cl"):
        build_support.choose_compiler(cl, {})
    clang_cl = tmp_path / "clang-cl"
    clang_cl.touch(mode=0o755)
    build_support.choose_compiler(cl, {"CC": "cl"})
    assert cl.cc == str(clang_cl)


def test_flags_by_compiler() -> None:
    assert build_support.options("unix", ["-O3"]) == (["-O3"], ["-pthread"])
    assert build_support.options("msvc", ["-O3", "-g0"]) == (["/clang:-O3", "/clang:-g0"], [])
    compiling, linking = build_support.options("mingw32", ["-O3"])
    assert compiling[0] == "-O3"
    assert not linking


@pytest.fixture
def small_copy(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return setup.py as a command, on a copy of the project with two trivial extensions."""
    pytest.importorskip("Cython")
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for path in ROOT.glob("build_support*.py"):
        shutil.copy(path, tmp_path)
    package = tmp_path / "src" / "qkv_fast"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in project["tool"]["setuptools"]["packages"]:
        folder = tmp_path.joinpath("src", *name.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text('__version__ = "1.0"\n')
    native = package / "_native"
    for name in ("engine.pyx", "blas.pyx"):
        (native / name).write_text("x = 1\n")
    (native / f"engine{sysconfig.get_config_var('EXT_SUFFIX')}").touch()  # of an earlier build

    def run(*command: str, umask: int = -1, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QKV_FAST_")}
        return subprocess.run(
            [sys.executable, "setup.py", *command],
            cwd=tmp_path,
            env=environment | variables,
            umask=umask,
            capture_output=True,
            text=True,
        )

    return run


@needs_compiler
def test_wheel_holds_the_extensions(small_copy: Callable, tmp_path: Path) -> None:
    build = small_copy("bdist_wheel", QKV_FAST_REQUIRE_EXTENSION="1")
    assert build.returncode == 0, build.stdout + build.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for module in ("engine", "blas"):
        assert f"qkv_fast/_native/{module}{sysconfig.get_config_var('EXT_SUFFIX')}" in names


@needs_compiler
def test_wheel_says_what_it_contains_and_needs(small_copy: Callable, tmp_path: Path) -> None:
    """PEP 770: a CycloneDX document in .dist-info/sboms, which RECORD lists."""
    assert small_copy("bdist_wheel", QKV_FAST_REQUIRE_EXTENSION="1").returncode == 0
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = json.loads(archive.read("qkv_fast-1.0.dist-info/sboms/qkv_fast.cdx.json"))
        record = archive.read("qkv_fast-1.0.dist-info/RECORD").decode()
    assert "sboms/qkv_fast.cdx.json,sha256=" in record
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    project = content["metadata"]["component"]
    assert (project["name"], project["version"]) == ("qkv-fast", "1.0")
    assert project["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    properties = [p for c in content["components"] for p in c["properties"]]
    needs = [p["value"] for p in properties if p["name"] == "qkv_fast:needs"]
    assert needs == facts["dependencies"]
    versions = {c["name"]: c["version"] for c in content["components"] if "version" in c}
    assert versions == {name: metadata.version(name) for name in ("cython", "numpy")}
    references = [c["bom-ref"] for c in content["components"]]
    assert len(set(references)) == len(references)
    assert content["dependencies"][0] == {"ref": project["bom-ref"], "dependsOn": references}


def test_wheel_without_the_engine_contains_no_code_of_others(
    small_copy: Callable, tmp_path: Path
) -> None:
    assert small_copy("bdist_wheel", QKV_FAST_NO_EXTENSION="1").returncode == 0
    [wheel] = (tmp_path / "dist").glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = json.loads(archive.read("qkv_fast-1.0.dist-info/sboms/qkv_fast.cdx.json"))
    assert [c["name"] for c in content["components"]] == ["numpy", "scipy"]
    assert not any("version" in component for component in content["components"])


@needs_compiler
def test_two_builds_write_the_same_bytes(small_copy: Callable, tmp_path: Path) -> None:
    """With SOURCE_DATE_EPOCH, whatever the umask; tools/build_twice.py does so for the real one."""
    wheels = []
    for seed, umask in (("1", 0o022), ("2", 0o077)):
        build = small_copy(
            "bdist_wheel", umask=umask, SOURCE_DATE_EPOCH="1767225600", PYTHONHASHSEED=seed
        )
        assert build.returncode == 0, build.stdout + build.stderr
        [wheel] = (tmp_path / "dist").glob("*.whl")
        wheels.append(wheel.rename(tmp_path / f"{seed}.whl"))
        for folder in (tmp_path / "build", *(tmp_path / "src").glob("*.egg-info")):
            shutil.rmtree(folder)
    assert build_twice.differences(*wheels) == []
    with zipfile.ZipFile(wheels[0]) as archive:
        times = {member.date_time for member in archive.infolist()}
    assert times == {(2026, 1, 1, 0, 0, 0)}


def test_differences_of_wheels_are_named(tmp_path: Path) -> None:
    def write(name: str, **members: tuple[str, int]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, (content, year) in members.items():
                archive.writestr(zipfile.ZipInfo(member, (year, 1, 1, 0, 0, 0)), content)
        return tmp_path / name

    one = write("a.whl", x=("1", 2026), y=("1", 2026))
    assert build_twice.differences(one, write("b.whl", x=("1", 2026), y=("1", 2026))) == []
    assert build_twice.differences(one, write("a2.whl", x=("2", 2026), y=("1", 2025)))[1:] == [
        "x: content",
        "y: time or mode",
    ]
    assert "the lists of members" in build_twice.differences(one, write("c.whl", x=("1", 2026)))


def test_without_compiler_the_reason_is_noted(small_copy: Callable, tmp_path: Path) -> None:
    build = small_copy("build_ext", "--inplace", CC="no-such-cc")
    assert build.returncode == 0
    package = tmp_path / "src" / "qkv_fast"
    assert "no-such-cc" in (package / "_build_info.json").read_text(encoding="utf-8")
    assert not list(package.rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"))


def test_without_compiler_a_required_extension_fails(small_copy: Callable) -> None:
    build = small_copy("build_ext", CC="no-such-cc", QKV_FAST_REQUIRE_EXTENSION="1")
    assert build.returncode
    assert "QKV_FAST_REQUIRE_EXTENSION=1, but the build failed" in build.stderr
