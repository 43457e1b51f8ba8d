"""Measured choices of kernels, on the fake driver: what is noted, forced, selected and kept."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.core_api import GRADIENTS, forward, load
from tests.core_cases import BY_ID, output_layouts
from tests.gpu import fake_driver
from tests.gpu.fake_driver import Driver, driver_fixture  # noqa: F401
from tests.gpu.launch_cases import CASES
from tests.gpu.replay import FOLDER, GpuLender, Ran, aot
from tests.gpu.test_launches import check
from tests.problem import Case, build
from twinfuse import _core, _tuning
from twinfuse._tuning import Candidate, Problem, Session, Tuned

VECTORS = {f"{case.op} {case.id}": case for case in CASES}
LINEAR, DEEP = VECTORS["linear_relu vectors"], VECTORS["linear_relu vectors_deep"]
CONV = VECTORS["conv_relu vectors"]
STRIDED = BY_ID["linear_relu at_block"]
# Through descriptors and pointers, in splits, in boxes, by single elements, in phases of a stride.
TUNED = [
    LINEAR,
    DEEP,
    VECTORS["linear_relu vectors_few_rows_keras"],
    VECTORS["linear_relu vectors_grad_misaligned"],
    STRIDED,
    CONV,
    VECTORS["conv_relu vectors_stride_hwio"],
    VECTORS["conv_relu vectors_pointwise_deep"],
    BY_ID["conv_relu stem"],
]
WAYS = [["masked_where_read", "masked_once"], ["where_it_lies", "moved"]]


@pytest.fixture(autouse=True)
def forgetful(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No choices before, and none after."""
    monkeypatch.setenv("TWINFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(_tuning, "_read", set())
    load().twinfuse_tune_select(None)
    yield
    load().twinfuse_tune_end()
    load().twinfuse_tune_select(None)


def run(
    case: Case, dtype: str = "float16", wanted: tuple[str, ...] = GRADIENTS, **options: int
) -> list[Ran]:
    """Both passes, without computing them."""
    lender = check(case, dtype, output_layouts(case)[-1], compute=False, parts=[wanted], **options)
    return lender.ran


def run_forward(case: Case = LINEAR, **options: Any) -> str:
    """The kernel that a forward pass takes."""
    lender = GpuLender(interpret=False, dtype="float16", **options)
    forward(build(case, "float16"), lender, output_layouts(case)[-1])
    return next(ran.name for ran in lender.ran if ran.is_product)


def record(case: Case, dtype: str = "float16") -> list[Problem]:
    with Session(load()) as session:
        return session.record(lambda: run(case, dtype))


def select(problem: str, kernel: str, splits: int = 1) -> int:
    return _tuning.select(load(), [{"problem": problem, "kernel": kernel, "splits": splits}])


def products(ran: Sequence[Ran]) -> list[Candidate]:
    return [Candidate(each.name, each.values["splits"]) for each in ran if each.is_product]


@pytest.mark.parametrize("case", TUNED, ids=lambda case: f"{case.op}-{case.id}")
def test_notes_what_runs(driver: Driver, case: Case) -> None:
    with Session(load()) as session:
        ran: list[Ran] = []
        problems = session.record(lambda: ran.extend(run(case)))
        assert session.record(lambda: None) == []
    launched = set(products(ran))
    taken = [problem.candidates[problem.taken] for problem in problems]
    assert {candidate for candidate in taken if candidate.splits} == launched
    for problem in problems:
        assert len(set(problem.candidates)) == len(problem.candidates)
        assert problem.name.startswith("sm_90 ")
        roles = [c.kernel.rpartition("-")[0] for c in problem.candidates if c.splits]
        if roles:
            assert problem.name.split(" ")[1] == "+".join(dict.fromkeys(roles))
        assert problem.is_way == ([c.kernel for c in problem.candidates] in WAYS)


def to_try(problem: Problem) -> list[Candidate]:
    """Of numbers of splits, the least and the most."""
    found: dict[str, list[int]] = {}
    for candidate in problem.candidates:
        found.setdefault(candidate.kernel, []).append(candidate.splits)
    return [Candidate(k, n) for k, splits in found.items() for n in {min(splits), max(splits)}]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float16") for case in TUNED if case is not STRIDED), (CONV, "float32")],
    ids=lambda value: value if isinstance(value, str) else f"{value.op}-{value.id}",
)
def test_every_candidate_serves_its_problem(driver: Driver, case: Case, dtype: str) -> None:
    """Each runs when it is forced, and computes what it shall."""
    layout, tried = output_layouts(case)[-1], set()

    def try_all(session: Session, problems: list[Problem]) -> None:
        for problem in problems:
            if len(problem.candidates) == 1 or problem.is_way or problem.name in tried:
                continue
            tried.add(problem.name)
            for candidate in to_try(problem):
                session.force(problem.name, candidate)
                lender = check(case, dtype, layout)
                assert candidate in products(lender.ran), (problem.name, candidate)

    with Session(load()) as session:
        problems = session.record(lambda: run(case, dtype))
        try_all(session, problems)
        for way in problems:
            for candidate in way.candidates if way.is_way else ():
                session.force(way.name, candidate)
                met = {p.name: p for p in session.record(lambda: run(case, dtype))}
                assert met[way.name].candidates[met[way.name].taken] == candidate
                try_all(session, list(met.values()))
    assert tried


def of_forward(case: Case = LINEAR) -> Problem:
    with Session(load()) as session:
        (problem,) = session.record(lambda: run_forward(case))
    return problem


def other(problem: Problem) -> Candidate:
    """One that is not taken."""
    return next(c for i, c in enumerate(problem.candidates) if i != problem.taken)


def test_a_selected_kernel_is_taken(driver: Driver) -> None:
    problem = of_forward()
    before = problem.candidates[problem.taken].kernel
    for candidate in problem.candidates:
        assert select(problem.name, candidate.kernel, candidate.splits) == 1
        assert candidate in products(run(LINEAR))
    load().twinfuse_tune_select(None)
    assert run_forward() == before


def test_sizes_nearby_share_a_choice(driver: Driver) -> None:
    """Exact sizes come first."""
    problem = of_forward()
    chosen = other(problem)
    architecture, roles, extents = problem.name.split(" ")
    rows, *rest = extents.split("x")
    assert rows == "80"

    def named(rows: int) -> str:
        return " ".join([architecture, roles, "x".join([str(rows), *rest])])

    select(named(84), chosen.kernel, chosen.splits)  # both are 96, rounded
    assert run_forward() == chosen.kernel
    taken = problem.candidates[problem.taken]
    select(named(80), taken.kernel, taken.splits)
    select(named(88), chosen.kernel, chosen.splits)
    assert run_forward() == taken.kernel
    load().twinfuse_tune_select(None)
    select(named(120), chosen.kernel, chosen.splits)
    assert run_forward() == taken.kernel


def test_nonsense_is_ignored(driver: Driver) -> None:
    problem = of_forward()
    taken, name = problem.candidates[problem.taken], problem.name
    for text in ("", "sm_90", "sm_90  1x2x3", f"{name}x1x2x3x4x5x6", f"{name}y",
                 name.replace("sm_90", "90"), name.replace("80x", "-80x")):  # fmt: skip
        assert select(text, other(problem).kernel) == 0, text
    lines = ["nothing", "\t\t", f"{name}\t\t1", f"{name}\tkernel", f"{name}\tkernel\tmany", "\0"]
    assert load().twinfuse_tune_select("\n".join(lines).encode()) == 0
    assert load().twinfuse_tune_select(b"") == 0
    # Kernels that do not exist, or are another problem's.
    strange = of_forward(CONV).candidates[0].kernel
    for kernel in ("kernel", taken.kernel[:-1], strange, WAYS[0][0]):
        assert select(name, kernel) == 1
        assert run_forward() == taken.kernel
    with Session(load()) as session:
        session.force("nothing", taken)
        session.force(name, Candidate("nothing", -1))
        assert session.record(run_forward)[0].taken == problem.taken


def test_numbers_of_splits_stay_in_bounds(driver: Driver) -> None:
    (problem,) = [p for p in record(DEEP) if "bias_relu" in p.name]
    kernel = next(c.kernel for c in problem.candidates if c.splits > 1)
    for splits, least, most in ((0, 2, 2), (1, 2, 2), (1 << 30, 16, 32)):
        assert select(problem.name, kernel, splits) == 1
        (found,) = [c.splits for c in products(check(DEEP, "float16").ran) if c.kernel == kernel]
        assert least <= found <= most


def test_only_the_measuring_thread_is_forced(driver: Driver) -> None:
    problem, found = of_forward(), []
    candidate = other(problem)
    with Session(load()) as session:
        session.record(run_forward)
        session.force(problem.name, candidate)
        assert run_forward() == candidate.kernel
        # What the fake driver records belongs to all threads: one after the other.
        thread = threading.Thread(target=lambda: found.append(run_forward()))
        thread.start()
        thread.join()
        session.library.twinfuse_tune_force(problem.name.encode(), None, 0)
        found.append(run_forward())
        session.force(problem.name, candidate)
    found.append(run_forward())
    assert found == [problem.candidates[problem.taken].kernel] * 3


def way_of(ran: Sequence[Ran]) -> str:
    return WAYS[0][any("write" in each.name for each in ran)]


def decided(case: Case, prefer: set[str]) -> list[Tuned]:
    """Choices where calls without these kernels or ways take longer."""

    def measure(runs: Sequence[_tuning.Run]) -> list[float]:
        seconds = []
        for call in runs:
            ran.clear()
            call()
            missing = prefer - {each.name for each in ran} - {way_of(ran)}
            seconds.append(1.0 + len(missing))
        return seconds

    ran: list[Ran] = []
    with Session(load()) as session:
        return _tuning.decide(session, case.op, lambda: ran.extend(run(case)), measure)


@pytest.mark.parametrize("case", [LINEAR, DEEP, CONV], ids=lambda case: f"{case.op}-{case.id}")
def test_the_fastest_is_decided_on(driver: Driver, case: Case) -> None:
    problems = [p for p in record(case) if len(p.candidates) > 1]
    assert len(problems) > 1
    kernel = next(other(p).kernel for p in problems if not p.is_way)
    wanted = {kernel, *(other(p).kernel for p in problems if p.is_way)}
    rows = decided(case, wanted)
    assert wanted <= {row.kernel for row in rows}
    assert all(row.after <= row.before for row in rows)
    assert len({row.problem for row in rows}) == len(rows)
    assert _tuning.select(load(), [vars(row) for row in rows]) == len(rows)
    ran = run(case)
    assert wanted <= {each.name for each in ran} | {way_of(ran)}


def test_noise_decides_nothing(driver: Driver) -> None:
    """Nor do failures of all candidates."""
    taken = {p.name: p.candidates[p.taken] for p in record(LINEAR)}

    def decide(factor: float) -> list[Tuned]:
        def measure(runs: Sequence[_tuning.Run]) -> list[float]:
            return [factor * (1 - i / 1e3) for i in range(len(runs))]

        with Session(load()) as session:
            return _tuning.decide(session, "linear_relu", lambda: run(LINEAR), measure)

    for rows in (decide(1.0), decide(float("inf"))):
        found = {row.problem: Candidate(row.kernel, row.splits) for row in rows}
        same = taken.keys() & found.keys()
        assert len(same) > 2
        assert all(found[name] == taken[name] for name in same)


def test_a_new_device_takes_what_was_kept(driver: Driver) -> None:
    problem = of_forward()
    chosen = other(problem)
    row = Tuned("linear_relu", problem.name, chosen.kernel, chosen.splits, 2e-6, 1e-6)
    path = _tuning.keep(f"Fake GPU {fake_driver.SPARE}", [row])
    assert path == _tuning.path_of(f"Fake GPU {fake_driver.SPARE}")
    assert run_forward() != chosen.kernel
    with driver.stream(driver.new_context(fake_driver.SPARE)) as stream:
        assert run_forward(stream=stream, index=fake_driver.SPARE) == chosen.kernel


def test_file_is_merged_and_replaced(tmp_path: Path) -> None:
    rows = [Tuned("op", f"sm_90 role {i}x1x1", "kernel", i, 2e-6, 1e-6) for i in range(3)]
    path = _tuning.keep("GPU (one) / two", rows[:2])
    assert path.name.startswith("choices-GPU_one_two-")
    assert (
        _tuning.keep("GPU (one) / two", [*rows[2:], Tuned("op", rows[0].problem, "new", 1, 1, 1)])
        == path
    )
    found = {choice["problem"]: choice["kernel"] for choice in _tuning.read(path)}
    assert found == {rows[0].problem: "new", rows[1].problem: "kernel", rows[2].problem: "kernel"}
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["gpu"] == "GPU (one) / two"
    report = _tuning.TuneReport(rows)
    report.path = path
    assert "2x1x1" in str(report) and "1.0 us" in str(report) and str(path) in str(report)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 99, "choices": []}', '{"format": 1, "choices": [{}]}',
     '{"format": 1, "choices": [{"problem": "a", "kernel": 1, "splits": 1}]}', "\udcff"],
)  # fmt: skip
def test_corrupt_file(content: str) -> None:
    path = _tuning.path_of("GPU")
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="not the choices of twinfuse.tune"):
        _tuning.load("GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tuning.load("GPU")  # once
        _tuning._read.clear()
        _tuning._on_device(b"GPU")  # nothing may be raised through the core
        row = Tuned("op", "sm_90 role 1x1x1", "kernel", 1, 2e-6, 1e-6)
        assert [c["kernel"] for c in _tuning.read(_tuning.keep("GPU", [row]))] == ["kernel"]


def test_built_in_choices(tmp_path: Path) -> None:
    """What `tune` writes is built in by csrc/embed.py, for kernels that are there."""
    kernel = next(k["name"] for k in json.loads((FOLDER / "kernels.json").read_text()))
    rows = [("sm_90 role 1x2x3", kernel, 4), ("sm_90 way 1x2x3", WAYS[0][1], 0),
            ("sm_90 role 2x2x3", "absent", 1), ("sm_70 role 1x2x3", kernel, 1)]  # fmt: skip
    choices = [dict(zip(("problem", "kernel", "splits"), row)) for row in rows]
    measured = tmp_path / "measured"
    measured.mkdir()
    (measured / "sm_90.json").write_text(json.dumps({"format": 1, "choices": choices}))
    table, _ = aot.embed.write(FOLDER, tmp_path / "out", measured)
    _, _, tail = table.read_text().partition("kMeasured =")
    lines = [json.loads(line) for line in tail.partition(";")[0].split("\n") if line.strip()]
    assert lines == [f"{problem}\t{name}\t{splits}\n" for problem, name, splits in rows[:2]]
    for file in aot.embed.MEASURED.glob("*.json"):
        assert json.loads(file.read_text())["format"] == _tuning.FORMAT


def test_the_library_has_what_the_header_says() -> None:
    library, reason = _core.load()
    assert library is not None, reason
    for name in _tuning._SIGNATURES:
        assert hasattr(library, name)
