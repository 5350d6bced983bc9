"""Fixtures. A test that takes `engine` runs on each engine, tile kind and ISA of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import qkv_fast
from qkv_fast import _dispatch, _loader, _select

settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")

if _loader.why_not_native():  # test_backend.py checks that warning in child processes
    _dispatch._warned = True

ALL = [_select.Choice("python")]
ALL += [_select.Choice("native", "simd", isa) for isa in _select.ISAS[1:]]
ALL += [_select.Choice("native", "blas", isa) for isa in _select.ISAS[1:]]


def forced(choice: _select.Choice) -> bool:
    """Return whether the environment allows this choice: a forced run tests that one only."""
    engine, tiles, isa = (os.environ.get(name) or "auto" for name in _select.VARIABLES)
    if choice.engine == "python":
        return engine == "python" or (engine, tiles, isa) == ("auto",) * 3
    return engine != "python" and tiles in ("auto", choice.tiles) and isa in ("auto", choice.isa)


@pytest.fixture(
    params=[choice for choice in ALL if forced(choice)],
    ids=lambda choice: "-".join(filter(None, choice)),
)
def engine(request: pytest.FixtureRequest) -> Iterator[_select.Choice]:
    choice = request.param
    if choice.engine == "native":
        if _loader.why_not_native():
            pytest.skip(f"no native engine: {_loader.why_not_native()}")
        executable = _loader.native_module().isas()
        if choice.isa not in executable:
            pytest.skip(f"this CPU lacks {choice.isa}")
    with qkv_fast.backend(choice.engine, tiles=choice.tiles or "auto", isa=choice.isa or "auto"):
        yield choice


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261120)


@pytest.fixture
def native() -> None:
    """Skip the test where the native engine is missing or was not asked for."""
    if _loader.why_not_native() or _select.current().engine == "python":
        pytest.skip("no native engine, or the Python engine was asked for")


@pytest.fixture
def many_cpus() -> Iterator[None]:
    """Let calls use up to 8 threads on a machine with fewer CPUs too."""
    if _loader.why_not_native():
        yield
        return
    _loader.native_module().assume_cpus(8)
    yield
    _loader.native_module().assume_cpus(0)
