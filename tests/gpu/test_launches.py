"""The core on a GPU, by way of the fake driver: both tables, and what calls ask of the driver."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.arrays import encode
from tests.conftest import Launched, skip
from tests.core_api import (
    GRADIENTS,
    UNSUPPORTED,
    CallFailed,
    MakeOutput,
    Output,
    backward,
    forward,
)
from tests.core_cases import BY_ID, every_case, output_layouts
from tests.gpu import fake_driver, launcher, replay
from tests.gpu.fake_driver import Driver, driver_fixture  # noqa: F401
from tests.gpu.launch_cases import CASES as VECTORS
from tests.gpu.replay import IEEE, TF32, GpuLender, architectures
from tests.problem import Case, ReluGrad, build, numpy_results, reference64
from tests.rule import assert_within_twice

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16"])
LINEAR, CONV = BY_ID["linear_relu at_block"], BY_ID["conv_relu three_by_three_stride_nhwc"]
every_op = pytest.mark.parametrize("case", [LINEAR, CONV], ids=lambda case: case.op)
# The interpreter takes minutes over more.
MOST_PIXELS, MOST_GROUPS = 600, 6
SOME = [LINEAR, CONV, *(BY_ID[f"conv_relu {name}"] for name in ("stem", "groups", "weight_hwio"))]
NO_BINARY = 209  # no kernel image is available for the device
PARTS = (GRADIENTS, ("grad_input",), ("grad_weight",))
COMPUTED = [*SOME, *VECTORS[:4]]


def interpreted(case: Case) -> bool:
    if case.op == "linear_relu":
        return True
    pixels = case.output_sizes[0] * np.prod(case.output_sizes[2:])
    return bool(pixels <= MOST_PIXELS and getattr(case, "groups", 1) <= MOST_GROUPS)


def why_not_served(case: Case) -> str | None:
    """Why the core leaves a case to the framework."""
    if case.id == "input_permuted" and case.op == "linear_relu":
        return "leading dimensions with strides of their own"
    return "more than 4 groups" if getattr(case, "groups", 1) > 4 else None


def outputs_of(case: Case) -> MakeOutput:
    """A gradient of the weight has the weight's layout where that is dense, as in TensorFlow."""

    def make(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        dense = case.weight_layout in ("transposed", "channels_last", "hwio")
        own = dense and sizes == case.weight_sizes
        return Output.poisoned(sizes, dtype, case.weight_layout if own else layout)

    return make


def layout_of(case: Case) -> str:
    """Of the output: the input's."""
    return str(case.input_layout) if case.op == "conv_relu" else "contiguous"


def check(
    case: Case,
    dtype: str,
    layout: str = "contiguous",
    *,
    compute: bool = True,
    parts: Sequence[tuple[str, ...]] = (GRADIENTS,),
    **options: Any,
) -> GpuLender:
    """Both passes of a case, within the rule where the interpreter computes them; `parts`: which
    gradients are asked for at a time."""
    problem = build(case, dtype)
    compute = compute and interpreted(case) and dtype != "bfloat16"
    lender = GpuLender(interpret=compute, dtype=dtype, **options)
    output = forward(problem, lender, layout)
    if not compute:
        output = encode(numpy_results(problem, "select").output, dtype)
    rules: list[ReluGrad] = ["select", "multiply"] if case.values == "nonfinite" else ["select"]
    for rule in rules:
        native, exact = numpy_results(problem, rule), reference64(problem, rule)
        results = {"output": output}
        for wanted in parts:
            results |= backward(
                problem, output, rule, lender, layout, wanted, make_output=outputs_of(case)
            )
            for name, ours in results.items() if compute else ():
                theirs, expected = getattr(native, name), getattr(exact, name)
                assert_within_twice(ours, theirs, expected, f"{name} ({rule})", dtype=dtype)
    return lender


@every_dtype
@every_case
def test_case(driver: Driver, case: Case, layout: str, dtype: str) -> None:
    reason = why_not_served(case)
    if reason is None:
        # The layouts decide about the same kernels in both types.
        compute = dtype == "float32" or layout == output_layouts(case)[-1]
        check(case, dtype, layout, compute=compute)
        return
    with pytest.raises(CallFailed, match=reason) as failure:
        check(case, dtype, layout)
    assert failure.value.status == UNSUPPORTED
    assert driver.launch_count == 0


@every_dtype
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case.op}-{case.id}")
def test_vectors(driver: Driver, case: Case, dtype: str) -> None:
    """How gradients are computed depends on which are wanted together."""
    check(case, dtype, layout_of(case), parts=PARTS)


# The last run the code of their older siblings.
OTHERS = [(case, arch) for arch in (80, 100, 120) for case in (*VECTORS, *SOME)]
OTHERS += [(case, arch) for arch in (86, 103, 121) for case in SOME]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "arch"), OTHERS, ids=[f"{case.op}-{case.id}-{arch}" for case, arch in OTHERS]
)
def test_other_architectures(driver: Driver, case: Case, arch: int, dtype: str) -> None:
    built = launcher.catalogue.code_for(arch)
    if built not in architectures():
        skip("kernels", f"none are built for architecture {built}")
    index = [device.arch for device in fake_driver.DEVICES].index(arch)
    layout, compute = layout_of(case), dtype == "float32" and case in COMPUTED
    lender = check(case, dtype, layout, index=index, compute=compute, parts=PARTS)
    assert {ran.kernel["arch"] for ran in lender.ran} == {built}
    assert {ran.launch.device for ran in lender.ran} == {index}


# Machine code by its target, and the devices that load it.
TARGETS = {
    "80": {80, 86},
    "90a": {90},
    "100f": {100, 103},
    "100a": {100},
    "120f": {120, 121},
    "120a": {120},
}


@pytest.mark.parametrize("target", TARGETS)
def test_code_runs_on_the_devices_of_its_target(driver: Driver, target: str) -> None:
    """On the fake driver, so that no other test passes with code that a device would not load."""
    arch, suffix = int(target.rstrip("af")), target.lstrip("0123456789")
    if arch not in architectures():
        skip("kernels", f"none are built for architecture {arch}")
    file = next(replay.FOLDER.glob(f"*.sm_{arch}.cubin"))
    image = file.read_bytes().replace(b"-arch sm_%df " % arch, f"-arch sm_{arch}{suffix} ".encode())
    loaded = set()
    for index, device in enumerate(fake_driver.DEVICES):
        with driver.current(driver.primary(index)):
            module = ctypes.c_void_p()
            status = driver.library.cuModuleLoadData(ctypes.byref(module), image)
            assert status in (0, NO_BINARY)
            if status == 0:
                loaded.add(device.arch)
                assert driver.library.cuModuleUnload(module) == 0
    assert loaded == TARGETS[target]


@every_op
def test_precision_of_float32(driver: Driver, case: Case) -> None:
    for precision, name in ((IEEE, "tf32x3"), (TF32, "tf32")):
        # Rounded operands are off by more than the rule allows.
        lender = check(case, "float32", precision=precision, compute=precision == IEEE)
        found = {ran.variant.precision for ran in lender.ran if ran.is_product}
        assert found == {name}


@every_op
def test_calls_are_counted(driver: Driver, case: Case, launched: Launched) -> None:
    with (
        launched(f"{case.op}_forward_f32_cuda", times=1),
        launched(f"{case.op}_backward_f32_cuda", times=1),
        launched(f"{case.op}_forward_f16_cuda", times=0),
    ):
        check(case, "float32")


@every_op
def test_work_goes_to_the_stream_of_the_call(driver: Driver, case: Case) -> None:
    """In the stream's context, whichever is current."""
    context, other = driver.new_context(), driver.primary(fake_driver.LARGE)
    with driver.stream(context) as stream, driver.current(other):
        lender = check(case, "float32", stream=stream, index=fake_driver.LARGE)
        assert driver.held["current"] == other
    assert {ran.launch.stream for ran in lender.ran} == {stream}
    assert {ran.launch.context for ran in lender.ran} == {context}


@pytest.mark.parametrize("stream", [None, 1, 2], ids=["default", "legacy", "per_thread"])
def test_default_streams_are_those_of_the_device(driver: Driver, stream: int | None) -> None:
    lender = check(LINEAR, "float32", stream=stream, index=fake_driver.LARGE)
    assert {ran.launch.stream for ran in lender.ran} == {stream}
    assert {ran.launch.context for ran in lender.ran} == {driver.primary(fake_driver.LARGE)}


def loads(driver: Driver) -> int:
    return driver.calls.count("cuModuleLoadData")


@every_op
def test_kernels_are_loaded_once_on_each_device(driver: Driver, case: Case) -> None:
    for device in (fake_driver.PLAIN, fake_driver.LARGE):
        with driver.stream(driver.new_context(device)) as stream:
            driver.clear()
            lender = check(case, "float32", stream=stream, index=device)
            assert loads(driver) == len(set(lender.names))
            before = driver.modules
            check(case, "float32", stream=stream, index=device)
            assert loads(driver) == len(set(lender.names))
            assert driver.modules == before


class Recorder(GpuLender):
    """Leaves the launches to the test."""

    def check(self) -> None:
        assert not self.errors


def test_kernels_are_loaded_once_by_many_threads(driver: Driver) -> None:
    problem = build(LINEAR, "float32")
    context, count = driver.new_context(), 8
    streams = [driver.library.fake_create_stream(context, False) for _ in range(count)]
    barrier, held = threading.Barrier(count), []
    driver.clear()
    driver.set_load_delay(3000)

    def work(stream: int) -> None:
        before = driver.held
        barrier.wait()
        for _ in range(2):
            output = forward(problem, Recorder(stream=stream))
            backward(problem, output, lender=Recorder(stream=stream))
        held.append((before, driver.held))

    threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = driver.launches()
    assert len(held) == count and all(before == after for before, after in held)
    assert loads(driver) == len({launch.image for launch in launches})
    one = [launch.entry for launch in launches if launch.stream == streams[0]]
    assert len(one) > 4
    for stream in streams:
        assert [launch.entry for launch in launches if launch.stream == stream] == one
        driver.library.fake_destroy_stream(stream)


def test_a_thread_without_a_context_needs_none(driver: Driver) -> None:
    """And is left without one."""
    seen = []

    def work() -> None:
        before = driver.held
        check(LINEAR, "float32")
        seen.append((before, driver.held))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((before, after),) = seen
    assert before == after
    assert (before["depth"], before["current"]) == (0, None)


@pytest.mark.parametrize("mode", [0, 1], ids=["global", "thread_local"])
@pytest.mark.parametrize("own", [True, False], ids=["own_stream", "other_stream"])
@every_op
def test_first_calls_while_a_stream_is_captured(
    driver: Driver, case: Case, own: bool, mode: int
) -> None:
    """Kernels are loaded without spoiling the capture, and the mode is put back."""
    context = driver.new_context()
    with (
        driver.stream(context) as stream,
        driver.stream(context) as other,
        driver.capture_mode(mode),
        driver.capture(stream if own else other),
    ):
        lender = check(case, "float32", stream=stream)
        assert driver.held["mode"] == mode
    assert {ran.launch.captured for ran in lender.ran} == {own}
    assert loads(driver) > 0
