"""What a session keeps when a rival takes the device, or its capture fails; ours come first."""

import json

import pytest
import torch
from timing_fake import FakeTimer, of
from torch.overrides import TorchFunctionMode

from fusedmlp.bench import check, lost
from fusedmlp.bench.report.ledger import check_record
from fusedmlp.bench.rivals import RIVALS
from fusedmlp.bench.timing import command as timing, passed, session
from fusedmlp.bench.timing.clock import CaptureFailed, CudaTimer
from fusedmlp.bench.timing.session import Options
from fusedmlp.bench.work import ALL_CASES, Work, case_of
from fusedmlp.testing import CASES


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(session, "COPY_BYTES", 4096)


def options(**changes):
    return Options(**{
        "cases": ("gated_linear",), "shapes": ((8, 16, 24), (9, 16, 24)), "phases": ("forward",),
        "providers": ("eager", "fusedmlp", "eager-packed"), "rounds": 3, **changes,
    })  # fmt: skip


def run(records, timer=None, **changes):
    timing.run(options(**changes), records.append, timer or FakeTimer())


def rival(monkeypatch, function):
    """A rival that does `function` when its call is prepared."""

    class Bad(type(RIVALS["eager"])):
        name = "bad"

        def function(self, work):
            return lambda t: function()

    monkeypatch.setitem(session.RIVALS, "bad", Bad())


def test_ours_and_cublas_are_on_record_before_any_rival_is_prepared(monkeypatch):
    records = []

    def look():
        seen.append([(r["kind"], r.get("provider", r.get("name"))) for r in records])
        raise ValueError("no")

    seen = []
    rival(monkeypatch, look)
    run(records, providers=("bad", "fusedmlp"), shapes=((8, 16, 24),))
    assert ("time", "fusedmlp") in seen[0]
    assert ("peak", "cublas") in seen[0]
    assert ("time", "bad") not in seen[0]


def test_a_lost_context_costs_what_was_not_tried_and_nothing_else(monkeypatch):
    broken = []

    def illegal():
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rival(monkeypatch, illegal)
    monkeypatch.setattr(
        session, "why_lost", lambda device: "the CUDA context is lost" if broken else None
    )
    records = []
    with pytest.raises(lost.DeviceLost, match="the CUDA context is lost, at gated_linear 8x16x24"):
        run(records, providers=("bad", "fusedmlp", "eager"))
    for record in records:
        check_record(json.loads(json.dumps(record)), "record")
    latest = {(r["provider"], r["M"]): r["skipped"] for r in of(records, kind="time")}
    assert latest["fusedmlp", 8] is None
    assert latest["bad", 8].startswith("failed: RuntimeError: CUDA error: an illegal memory")
    for key in (("eager", 8), ("fusedmlp", 9), ("bad", 9), ("eager", 9)):
        assert latest[key].startswith("not run: the CUDA context is lost, at gated_linear"), key


def test_a_failed_capture_ends_the_process_s_timing(monkeypatch):
    class Timer(FakeTimer):
        def sampler(self, calls, graph):
            if len(self.made) == 4:  # the copy, cuBLAS, ours, the first of eager
                raise CaptureFailed("a CUDA graph could not be captured: dependency")
            return super().sampler(calls, graph)

    records = []
    with pytest.raises(lost.DeviceLost, match="could not be captured"):
        run(records, Timer(), providers=("eager-packed", "eager", "fusedmlp"))
    latest = {(r["provider"], r["M"]): r["skipped"] for r in of(records, kind="time")}
    assert latest["fusedmlp", 8] is None
    assert latest["eager", 8].startswith("failed: CaptureFailed")
    assert latest["fusedmlp", 9].startswith("not run: a CUDA graph could not be captured")


def test_a_failed_capture_of_cublas_does_so_too():
    class Timer(FakeTimer):
        def sampler(self, calls, graph):
            if len(self.made) == 1:  # after the copy
                raise CaptureFailed("a CUDA graph could not be captured: dependency")
            return super().sampler(calls, graph)

    records = []
    with pytest.raises(lost.DeviceLost, match="could not be captured.*, at gated_linear 8x16x24"):
        run(records, Timer())
    latest = {(r["provider"], r["M"]): r["skipped"] for r in of(records, kind="time")}
    assert latest.pop(("fusedmlp", 8)).startswith("failed: CaptureFailed")
    assert len(latest) == 5
    assert all(reason.startswith("not run: ") for reason in latest.values())


def test_the_command_shows_what_was_found_and_fails(monkeypatch, capsys, tmp_path):
    from fusedmlp.bench import cli

    def run(options, emit):
        emit({"kind": "peak", "name": "copy", "gbps": 1.0, "dtype": "float32"})
        raise lost.DeviceLost("the CUDA context is lost")

    monkeypatch.setattr(timing, "run", run)
    assert cli.main(["time", "--case", "gated_act", "--json", str(tmp_path / "t.json")]) == 1
    said = capsys.readouterr()
    assert "device copy" in said.out
    assert "Ended early: the CUDA context is lost" in said.err
    assert json.loads((tmp_path / "t.json").read_text())["records"][0]["gbps"] == 1.0


def test_checks_after_a_lost_context_are_not_run(monkeypatch):
    calls = []

    def judge(case, inputs, **rest):
        calls.append(case.name)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {}

    monkeypatch.setattr(check, "judge", judge)
    monkeypatch.setattr(
        check, "why_lost", lambda device: "the CUDA context is lost" if len(calls) > 1 else None
    )
    records = []
    cases = ("gated_act", "gated_linear", "mlp", "gated_mlp")
    asked = check.CheckOptions(
        cases=cases, shapes=((4, 8, 8),), backend="reference", dtypes=("float32",)
    )
    assert check.run(asked, records.append) is False
    assert calls == ["gated_act", "gated_linear"]
    assert [r["passed"] for r in records] == [True, False, False, False]
    for record in records[2:]:
        assert record["error"] == (
            "not run: the CUDA context is lost, at gated_linear float32 4x8x8"
        )
        check_record(json.loads(json.dumps(record)), "record")


def test_a_check_shows_what_a_kernel_did_not_write(monkeypatch):
    case = CASES["gated_act"]
    lazy = lambda g, u, *, activation="silu": torch.empty_like(g)  # noqa: E731
    lazy.__name__ = "gated_act"
    work = Work(check.dataclasses.replace(case, fn=lazy), "silu", "float32", 4, 8, 8)
    record = check.check_one(work, backward=False)
    assert not record["passed"]
    assert record["tensors"]["out"]["max"] == float("inf")


def test_a_context_is_asked_only_on_a_gpu(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert lost.why_lost("cpu") is None
    assert lost.why_lost("cuda") == (
        "the CUDA context is lost: CUDA error: an illegal memory access was encountered"
    )


# ---- what is checked already


def test_a_passing_check_of_the_same_campaign_is_not_repeated(monkeypatch, tmp_path):
    first = []
    run(first, providers=("fusedmlp",))
    book = tmp_path / "ledger.json"
    book.write_text(json.dumps({"records": of(first, kind="check", M=8)}))
    monkeypatch.setenv(passed.LEDGER, str(book))
    judged, (check_of_9,) = [], of(first, kind="check", M=9)
    monkeypatch.setattr(session, "check_one", lambda work: judged.append(work.M) or check_of_9)
    again = []
    run(again, providers=("fusedmlp",))
    assert judged == [9]
    (timed,) = of(again, kind="time", M=8)
    assert timed["skipped"] is None
    assert timed["backend"] == "reference"


def test_a_failed_check_is_repeated(monkeypatch, tmp_path):
    first = []
    run(first, providers=("fusedmlp",))
    (record, *_) = of(first, kind="check")
    book = tmp_path / "ledger.json"
    book.write_text(json.dumps({"records": [{**record, "passed": False}]}))
    monkeypatch.setenv(passed.LEDGER, str(book))
    again = []
    run(again, providers=("fusedmlp",))
    assert len(of(again, kind="check")) == 2


def test_inputs_are_drawn_once_for_all_rivals(monkeypatch):
    drawn = []
    case = case_of("gated_linear")
    inputs = type(case).inputs

    def counted(self, M, D, H, *rest, **options):
        drawn.append((self.name, M))
        return inputs(self, M, D, H, *rest, **options)

    monkeypatch.setattr(type(case), "inputs", counted)
    for name in ("eager", "eager-packed"):
        monkeypatch.setattr(RIVALS[name], "trusted", False)
    run([])
    assert drawn == [("gated_linear", 8), ("gated_linear", 9)]


# ---- graphs


class Waiting(TorchFunctionMode):
    """Notes what would wait for a GPU: reading a value on the host."""

    READS = {"tolist", "item", "nonzero", "cpu", "__bool__", "__int__", "__float__", "__index__"}

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen |= self.READS & {getattr(function, "__name__", "")}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL_CASES)
def test_eager_is_captured_only_where_it_does_not_wait(name):
    work = Work(ALL_CASES[name], "silu", "float32", 16, 128, 8)
    inputs = work.case.inputs(work.M, work.D, work.H, torch.float32)
    with Waiting() as waiting:
        work.case.run_reference(inputs, **work.options)
    assert RIVALS["eager"].waits(work) == bool(waiting.seen), waiting.seen


class Cuda:
    """torch.cuda as far as a sampler needs it; capture fails where it is told to."""

    def __init__(self, monkeypatch, fails=False):
        self.mode, self.fails = 0, fails
        for name in ("synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, lambda *a: None)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", lambda g, stream: self)

    def set(self, mode):
        self.mode = mode

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.fails:
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")


def timer():
    made = CudaTimer.__new__(CudaTimer)
    made._stream = None
    return made


def test_a_call_that_waits_is_refused_before_a_capture_begins(monkeypatch):
    cuda = Cuda(monkeypatch)

    def call():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "graph", lambda g, stream: pytest.fail("it captured"))
    with pytest.raises(RuntimeError, match="called a synchronizing"):
        timer().sampler([call], graph=True)
    assert cuda.mode == 0


def test_a_capture_that_fails_says_so(monkeypatch):
    Cuda(monkeypatch, fails=True)
    message = "a CUDA graph could not be captured: CUDA error: operation not permitted$"
    with pytest.raises(CaptureFailed, match=message):
        timer().sampler([lambda: None], graph=True)
