"""Build the wheel twice from one sdist and compare the two files byte by byte.

python tools/build_twice.py --out dist        # exit status 1 and the names of what differs

The builds run in folders of different names, with other hash seeds, umasks and numbers of compile
jobs, and share no objects. Both get SOURCE_DATE_EPOCH: the environment's, else that of the last
commit, else 1 January 2026. The first wheel and the sdist are kept in the folder of `--out`. The
environment must have the requirements of [build-system] in pyproject.toml; a build takes as long
as CONTRIBUTING.md says.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 3_000_000


def source_date(root: Path) -> str:
    """Return the time that goes into archives, in seconds since 1970."""
    command = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return os.environ.get("SOURCE_DATE_EPOCH") or done.stdout.strip() or "1767225600"


def build_sdist(root: Path, out: Path, environ: Mapping[str, str]) -> Path:
    """Build the sdist of a tree into an empty folder and return its path."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=root, env=environ, check=True)
    [sdist] = out.glob("*.tar.gz")
    return sdist


def build_wheel(sdist: Path, folder: Path, environ: Mapping[str, str], umask: int) -> Path:
    """Unpack an sdist into a folder, build the wheel there and return its path."""
    folder.mkdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [tree] = (path for path in folder.iterdir() if path.is_dir())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), str(tree)]
    subprocess.run(command, env=environ, umask=umask, check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def differences(first: Path, second: Path) -> list[str]:
    """Return what differs between two wheels: nothing if their bytes are equal."""
    if first.read_bytes() == second.read_bytes():
        return []
    found = [f"names: {first.name}, {second.name}"] if first.name != second.name else []
    with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as other:
        if one.namelist() != other.namelist():
            return [*found, "the lists of members"]
        for a, b in zip(one.infolist(), other.infolist(), strict=True):
            if one.read(a) != other.read(b):
                found.append(f"{a.filename}: content")
            if (a.date_time, a.external_attr) != (b.date_time, b.external_attr):
                found.append(f"{a.filename}: time or mode")
    return found or ["the archives, not their members"]


def main() -> int:
    """Build twice, compare, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the results")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {
        "SOURCE_DATE_EPOCH": source_date(ROOT),
        "QKV_FAST_REQUIRE_EXTENSION": "1",
        "PYTHONHASHSEED": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        sdist_folder = Path(scratch, "sdist")
        sdist_folder.mkdir()
        sdist = build_sdist(ROOT, sdist_folder, environ)
        wheels = [
            build_wheel(sdist, Path(scratch, "a"), environ, 0o022),
            build_wheel(
                sdist,
                Path(scratch, "another folder"),
                environ | {"PYTHONHASHSEED": "2", "QKV_FAST_BUILD_JOBS": "1"},
                0o077,
            ),
        ]
        found = differences(*wheels)
        for path in (sdist, wheels[0]):
            shutil.copy(path, out)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {digest}")
        size = wheels[0].stat().st_size
    if size > MAX_BYTES:
        found.append(f"size: the wheel has more than {MAX_BYTES:,} bytes")
    print("\n".join(found) if found else "two builds: the same bytes")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
