"""What the core makes of a CUDA driver that fails, lacks something or is not there."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.core_api import (
    OK,
    OUT_OF_MEMORY,
    RELU_GRADS,
    UNSUPPORTED,
    Output,
    last_error,
    load,
    operand_tensor,
    settings,
)
from tests.core_cases import BY_ID
from tests.gpu import fake_driver, launcher
from tests.gpu.fake_driver import Driver, driver_fixture  # noqa: F401
from tests.gpu.replay import GpuLender
from tests.problem import Case, build

DRIVER_ERROR = 4
CASES = [BY_ID["linear_relu batch_of_digits_network"], BY_ID["conv_relu three_by_three_nhwc"]]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
every_pass = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
REASON = "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"
# These give back what was taken, also where they report the failure of work that ran before.
GIVING_BACK = ("cuCtxPopCurrent_v2", "cuThreadExchangeStreamCaptureMode")
MOST_CALLS = 200


def printed_by(script: str) -> str:
    """What it prints in a process of its own, where nothing has been loaded before."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=launcher.ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Call:
    """One pass of a case, as often as wanted; nothing is run."""

    def __init__(self, case: Case, backward: bool, dtype: str = "float32") -> None:
        problem = build(case, dtype)
        self.output = Output.poisoned(case.output_sizes, dtype)
        self.grads = [
            Output.poisoned(sizes, dtype)
            for sizes in (case.input_sizes, case.weight_sizes, case.weight_sizes[:1])
        ]
        self.problem, self.name = problem, f"twinfuse_{case.op}_{'forward' if not backward else ''}"
        operands = [problem.input, problem.weight, problem.bias]
        x, w, b = (operand_tensor(operand, dtype) for operand in operands if operand)
        if backward:
            self.name += "backward"
            g = operand_tensor(problem.grad_output, dtype)
            outputs = [grad.tensor for grad in self.grads]
            self.arguments: list[Any] = [*outputs, g, self.output.tensor, x, w]
        else:
            self.arguments = [self.output.tensor, x, w, b]
        self.arguments += settings(case)
        self.arguments += [RELU_GRADS["select"]] if backward else []

    def __call__(self, lender: GpuLender) -> int:
        return getattr(load(), self.name)(*self.arguments, lender.context())


def name_of(case: Case) -> str:
    """What texts begin with."""
    return getattr(case, "name", case.op)


def fail_once(driver: Driver, call: Call, case: Case, index: int, stream: int) -> str:
    """A call of which the driver fails the call of this index: what failed, or nothing if there are
    fewer."""
    driver.clear()
    held = driver.held
    driver.fail_call(index)
    status = call(GpuLender(stream=stream))
    failed, text = driver.failed, last_error()
    driver.clear()
    assert driver.held == held, f"after a failure of {failed}"
    if not failed or (failed in GIVING_BACK and status == OK):
        assert status == OK
        return failed
    assert status == DRIVER_ERROR, f"{failed}: {text}"
    assert text == f"{name_of(case)}: {failed.removesuffix('_v2')} failed: {REASON}"
    return failed


@every_pass
@every_op
def test_every_call_of_a_first_call_may_fail(driver: Driver, case: Case, backward: bool) -> None:
    """First on a device, that is: what happens once in a process is tested below."""
    call = Call(case, backward)
    for _ in range(2):
        with driver.stream() as stream:
            driver.clear()
            before = driver.modules
            assert call(GpuLender(stream=stream)) == OK, last_error()
            wanted, loaded = set(driver.calls), driver.modules - before
    assert {"cuModuleLoadData", "cuFuncSetAttribute", "cuDeviceGetAttribute"} <= wanted
    seen = set()
    for index in range(MOST_CALLS):
        with driver.stream() as stream:  # of a new context: everything happens for the first time
            before = driver.modules
            failed = fail_once(driver, call, case, index, stream)
            if not failed:
                break
            seen.add(failed)
            # The next call does what this one could not, and nothing twice.
            assert call(GpuLender(stream=stream)) == OK, f"{failed}: {last_error()}"
            assert driver.modules - before == loaded, failed
    assert seen == wanted


@every_pass
@every_op
def test_every_call_of_a_second_call_may_fail(driver: Driver, case: Case, backward: bool) -> None:
    call, seen = Call(case, backward), []
    with driver.stream() as stream:
        assert call(GpuLender(stream=stream)) == OK, last_error()
        before = driver.modules
        for index in range(MOST_CALLS):
            seen.append(fail_once(driver, call, case, index, stream))
            if not seen[-1]:
                break
            assert call(GpuLender(stream=stream)) == OK, last_error()
    assert seen[-1] == "" and "cuLaunchKernelEx" in seen
    assert driver.modules == before


@every_op
def test_what_goes_on_failing_is_told_each_time(driver: Driver, case: Case) -> None:
    call = Call(case, False)
    with driver.stream() as stream:
        for function in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"):
            before = driver.modules
            driver.fail_function(function, 2)
            for _ in range(3):
                assert call(GpuLender(stream=stream)) == DRIVER_ERROR
                assert f"{function} failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory" in last_error()
            assert driver.modules == before
            driver.fail_function(function, 0)
        assert call(GpuLender(stream=stream)) == OK


def test_an_error_without_a_text(driver: Driver) -> None:
    with driver.stream() as stream:
        driver.fail_function("cuModuleLoadData", 12345)
        assert Call(CASES[0], False)(GpuLender(stream=stream)) == DRIVER_ERROR
    assert "cuModuleLoadData failed: error 12345" in last_error()


def test_a_stream_that_is_none(driver: Driver) -> None:
    stream = ctypes.addressof(ctypes.create_string_buffer(8))
    assert Call(CASES[0], False)(GpuLender(stream=stream)) == DRIVER_ERROR
    assert "cuStreamGetCtx failed: CUDA_ERROR_INVALID_HANDLE" in last_error()


@pytest.mark.parametrize("index", [-1, len(fake_driver.DEVICES), 1 << 30])
def test_a_device_that_is_none(driver: Driver, index: int) -> None:
    assert Call(CASES[0], False)(GpuLender(index=index)) in (UNSUPPORTED, DRIVER_ERROR)
    assert last_error().startswith("linear_relu: ")


def test_the_first_call_on_a_device_may_fail(driver: Driver) -> None:
    """That of its default stream, which has no context to tell."""
    call, seen = Call(CASES[0], False), []
    before = driver.retained
    for function in ("cuDeviceGet", "cuDevicePrimaryCtxRetain"):
        driver.fail_function(function)
        assert call(GpuLender(index=fake_driver.SPARE)) == DRIVER_ERROR
        assert f"{function} failed: {REASON}" in last_error()
        seen.append(function)
        driver.fail_function(function, 0)
    assert driver.retained == before
    for _ in range(3):
        assert call(GpuLender(index=fake_driver.SPARE)) == OK
    assert driver.retained == before + 1


@every_pass
@every_op
def test_every_allocation_may_fail(driver: Driver, case: Case, backward: bool) -> None:
    call = Call(case, backward)
    with driver.stream() as stream:
        for index in range(MOST_CALLS):
            held = driver.held
            lender = GpuLender(stream=stream, fail_allocation=index)
            status = call(lender)
            assert driver.held == held
            if len(lender.scratch) < index + 1 and status == OK:
                break
            assert status == OUT_OF_MEMORY
            assert last_error().startswith(name_of(case))
    assert index > 0 or not backward


@every_op
def test_an_architecture_without_kernels(driver: Driver, case: Case) -> None:
    for _ in range(2):
        assert Call(case, False)(GpuLender(index=fake_driver.OLD)) == UNSUPPORTED
        assert "7.5" in last_error()
    assert driver.launch_count == 0


@every_op
def test_no_kernel_takes_float64(driver: Driver, case: Case) -> None:
    assert Call(case, False, "float64")(GpuLender()) == UNSUPPORTED
    assert last_error() == f"{name_of(case)}: no GPU kernel takes float64"
    assert driver.calls == []


def in_a_process(driver: str | Path, setup: str = "") -> str:
    """The text that two calls leave in a process that has just begun, both UNSUPPORTED."""
    script = f"""
        from tests.gpu import fake_driver
        driver = fake_driver.load()
        {setup}
        import os
        os.environ[fake_driver.VARIABLE] = {str(driver)!r}
        from tests.gpu.test_driver_failures import CASES, UNSUPPORTED, Call, GpuLender, last_error
        call = Call(CASES[0], False)
        texts = []
        for _ in range(2):
            status = call(GpuLender())
            assert status == UNSUPPORTED, (status, last_error())
            texts.append(last_error())
        assert texts[0] == texts[1]
        print(texts[0])
    """
    text = printed_by(script).strip()
    assert text.startswith("linear_relu: ")
    return text


def test_no_driver(driver: Driver, tmp_path: Path) -> None:
    text = in_a_process(tmp_path / "libcuda.so.1")
    assert "the CUDA driver does not load" in text and str(tmp_path) in text


def test_something_else_than_a_driver(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"text")
    assert "the CUDA driver does not load" in in_a_process(tmp_path / "libcuda.so.1")


@pytest.mark.parametrize("function", ["cuLaunchKernelEx", "cuInit"])
def test_a_driver_that_lacks_a_function(driver: Driver, function: str) -> None:
    lacking = fake_driver.build(without=function)
    assert f"the CUDA driver has no function {function}" in in_a_process(lacking)


def test_an_old_driver(driver: Driver) -> None:
    text = in_a_process(fake_driver.build(), "driver.library.fake_set_version(12080)")
    assert "12.8" in text and "13.0" in text


@pytest.mark.parametrize("function", ["cuInit", "cuDriverGetVersion"])
def test_a_driver_that_does_not_start(driver: Driver, function: str) -> None:
    text = in_a_process(fake_driver.build(), f"driver.fail_function({function!r})")
    assert text == f"linear_relu: {function} failed: {REASON}"


def test_a_driver_without_devices(driver: Driver) -> None:
    text = in_a_process(fake_driver.build(), "driver.set_devices([])")
    assert "cuInit failed: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected" in text
