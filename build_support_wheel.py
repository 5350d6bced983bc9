"""What setup.py adds to a wheel: a bill of materials, and modes that don't depend on the umask.

The bill (SBOM) says what the binaries contain and what the package needs, in CycloneDX 1.6. PEP 770
gives it its folder, `.dist-info/sboms/`. It depends on the project's metadata and on the versions
of the build tools alone: it holds no time and no random number, so two builds write the same bytes.
This module needs only the standard library.
"""

import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE_NAME = "qkv_fast.cdx.json"
# What the compiled engine takes from others: code that is in the binaries, whatever runs them.
COMPILED_IN = {
    "cython": ("Apache-2.0", "C that Cython writes into each extension module"),
    "numpy": ("BSD-3-Clause", "inline functions of the C headers"),
}


def reference(name: str, number: str = "") -> str:
    """Return a package's URL in the sense of the purl specification, which serves as its id."""
    return f"pkg:pypi/{name.lower().replace('_', '-')}" + (f"@{number}" if number else "")


def component(name: str, number: str, **fields: object) -> dict[str, object]:
    """Return a component of the document; the version is left out where it is empty."""
    purl = reference(name, number)
    known = {"version": number} if number else {}
    return {"type": "library", "bom-ref": purl, "name": name, **known, "purl": purl, **fields}


def property_of(name: str, value: str) -> dict[str, str]:
    """Return a property in this project's namespace."""
    return {"name": f"qkv_fast:{name}", "value": value}


def compiled_in() -> list[dict[str, object]]:
    """Return the components whose code the compiler put into the extension modules."""
    found = []
    for name, (license_id, what) in COMPILED_IN.items():
        try:
            number = version(name)
        except PackageNotFoundError:  # built in some other way than by pyproject's requirements
            number = ""
        found.append(
            component(
                name,
                number,
                scope="required",
                licenses=[{"license": {"id": license_id}}],
                properties=[property_of("compiled-in", what)],
            )
        )
    return found


def needed(requirement: str) -> dict[str, object]:
    """Return the component of a runtime requirement, such as "numpy>=1.26".

    Its version is the installer's choice, so the requirement itself is a property.
    """
    name = requirement
    for separator in "<>=!~;[ ":
        name = name.partition(separator)[0]
    fields = component(name, "", scope="required", properties=[property_of("needs", requirement)])
    return fields | {"bom-ref": f"{reference(name)}#runtime"}


def sbom(
    name: str, number: str, license_id: str, requirements: Iterable[str], *, native: bool
) -> dict[str, object]:
    """Return the CycloneDX document of a wheel, with or without the compiled engine."""
    project = component(name, number, licenses=[{"license": {"id": license_id}}])
    components = [*map(needed, requirements), *(compiled_in() if native else [])]
    references = [part["bom-ref"] for part in components]
    edges: list[Mapping[str, object]] = [{"ref": project["bom-ref"], "dependsOn": references}]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": project},
        "components": components,
        "dependencies": edges + [{"ref": r} for r in references],
    }


def write_sbom(dist_info: Path, content: Mapping[str, object]) -> Path:
    """Write a document to the folder for it in a .dist-info folder; return its path."""
    path = dist_info / "sboms" / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
    return path


def unify_modes(folder: str | os.PathLike[str]) -> None:
    """Give the files of a folder that will be a wheel the modes that umask 022 gives."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(0o755 if path.suffix == ".so" else 0o644)
