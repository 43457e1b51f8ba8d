"""Fixtures shared by all tests, and the rules for what may be missing.

A test that needs a framework asks for it with `require("torch")` at the top of its module (or in
its body). Where the framework is absent the test is skipped with that reason, unless
TWINFUSE_TEST_REQUIRE (comma-separated: torch, tensorflow, keras, core, kernels for those of GPUs,
nvcc, gpu) names it: then it fails, so that CI cannot pass by skipping.

The tables are large: `--sample N` runs N cases of each test, always the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import ModuleType

import pytest

# Inductor imports it in the middle of a test, and it refuses to come after the distutils of Python
# 3.11 and older, which something else may have imported by then.
with suppress(ImportError):
    import setuptools  # type: ignore[import-untyped]  # noqa: F401

# Read when TensorFlow is imported; its start-up messages hide the reasons for skips.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

REQUIRED = {n.strip() for n in os.environ.get("TWINFUSE_TEST_REQUIRE", "").split(",")} - {""}
DISTRIBUTIONS = ("numpy", "torch", "tensorflow", "tensorflow-cpu", "keras", "triton", "hypothesis")

Launched = Callable[..., AbstractContextManager[None]]


class MissingRequirement(Exception):
    """Something that TWINFUSE_TEST_REQUIRE names is absent."""


def skip(name: str, reason: str) -> None:
    """Skip the calling test or module because `name` is missing, or fail if it is required."""
    if name in REQUIRED:
        raise MissingRequirement(f"TWINFUSE_TEST_REQUIRE names {name}, but {reason}")
    pytest.skip(f"needs {name}: {reason}", allow_module_level=True)


def require(name: str) -> ModuleType:
    """Import framework `name`, or skip (see the module's docstring)."""
    if name in ("tensorflow", "keras"):
        # Both carry LLVM: in one process, Triton (which torch.compile needs) crashes when it is
        # imported after TensorFlow. The other order works.
        with suppress(ImportError):
            importlib.import_module("triton")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        skip(name, f"it cannot be imported: {error}")
        raise AssertionError("unreachable") from error


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        type=int,
        metavar="N",
        help="run no more than N cases of each test (default: all)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (most := config.getoption("--sample")):
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item.nodeid)
    # By a hash: those side by side in a table are alike.
    kept = {
        name
        for names in cases.values()
        for name in sorted(names, key=lambda name: zlib.crc32(name.encode()))[:most]
    }
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "allow_fallback: the test may take the reference path (elsewhere that is an error)",
    )
    config.addinivalue_line("markers", "slow: takes seconds, mostly in subprocesses")


def pytest_report_header() -> list[str]:
    versions = []
    for name in DISTRIBUTIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [f"versions: {', '.join(versions)}", f"twinfuse: {_describe_core()}"]


def _describe_core() -> str:
    from twinfuse import _core

    library, reason = _core.load()
    if library is None:
        return reason
    note = f" ({_core.isa_note()})" if _core.isa_note() else ""
    return (
        f"{_core.version()}, ISA {_core.isa()}{note}, built for {', '.join(_core.built_isas())}, "
        f"{os.cpu_count()} processors, {platform.machine()}"
    )


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raise on any fall-back: a test of a fused op must not pass on the framework's own layers."""
    import twinfuse
    from twinfuse import _backend

    allowed = request.node.get_closest_marker("allow_fallback") is not None
    # A reason is warned about once per process; each test sees its own.
    _backend._warned.clear()
    with nullcontext() if allowed else twinfuse.strict(), twinfuse.use_backend(None):
        yield


@pytest.fixture
def launched() -> Launched:
    """Assert that kernels ran inside a `with` block: `with launched("linear_relu_forward_"):`.

    `times` is the exact number of launches expected (0: none); without it, at least one.
    """
    import twinfuse

    @contextmanager
    def check(prefix: str, times: int | None = None) -> Iterator[None]:
        before = twinfuse.launches()
        assert times == 0 or any(name.startswith(prefix) for name in before), (
            f"no kernel is named {prefix}*: the table holds {', '.join(before) or 'nothing'}"
        )
        yield
        after = twinfuse.launches()
        ran = {name: count - before[name] for name, count in after.items() if count > before[name]}
        count = sum(n for name, n in ran.items() if name.startswith(prefix))
        wanted = count > 0 if times is None else count == times
        assert wanted, (
            f"expected {'a launch' if times is None else f'{times} launches'} of {prefix}*, got "
            f"{count}; launched: {ran or 'nothing'}"
        )

    return check
