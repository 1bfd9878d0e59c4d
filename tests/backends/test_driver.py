"""The CUDA driver's version and the context of a thread, of a driver that is not there."""

import threading

import pytest
import torch

from fusedmlp.backends import driver, library


class Driver:
    """What `driver` asks of libcuda; each thread has a context of its own, at first none."""

    def __init__(self):
        self.threads = threading.local()
        self.calls = []

    def context(self):
        return getattr(self.threads, "context", None)

    def cuDriverGetVersion(self, number):
        number._obj.value = 13020
        return 0

    def cuCtxGetCurrent(self, context):
        self.calls.append("cuCtxGetCurrent")
        context._obj.value = self.context()
        return 0

    def cuDeviceGet(self, handle, device):
        handle._obj.value = 70 + device
        return 0

    def cuDevicePrimaryCtxRetain(self, context, handle):
        context._obj.value = 1000 + handle.value
        return 0

    def cuCtxSetCurrent(self, context):
        self.calls.append("cuCtxSetCurrent")
        self.threads.context = context.value
        return 0


@pytest.fixture
def fake(monkeypatch):
    found = Driver()
    monkeypatch.setattr(driver, "_library", lambda: found)
    monkeypatch.setattr(driver, "_thread", driver._Thread())
    driver.version.cache_clear()
    yield found
    driver.version.cache_clear()


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


class OnGpu:
    def get_device(self):
        return 0


def test_an_op_in_a_new_thread_has_a_context(fake, monkeypatch):
    """As Triton makes TMA descriptors: with what the thread has, before it looks for more."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    op = library.on_its_device(lambda x: fake.context())
    assert op(OnGpu()) == 1070
    assert in_a_thread(lambda: (fake.context(), op(OnGpu()))) == (None, 1070)


def test_a_thread_is_bound_once(fake):
    for _ in range(3):
        driver.bind(0)
    assert fake.calls == ["cuCtxGetCurrent", "cuCtxSetCurrent"]
    in_a_thread(lambda: driver.bind(0))
    assert fake.calls == 2 * ["cuCtxGetCurrent", "cuCtxSetCurrent"]


def test_a_context_that_is_there_stays(fake):
    fake.threads.context = 5
    driver.bind(0)
    assert fake.context() == 5
    assert fake.calls == ["cuCtxGetCurrent"]


def test_an_error_of_the_driver_is_said(fake, monkeypatch):
    monkeypatch.setattr(fake, "cuDevicePrimaryCtxRetain", lambda context, handle: 2)
    for _ in range(2):  # the failure is not remembered as done
        with pytest.raises(RuntimeError, match="cuDevicePrimaryCtxRetain .* failed with error 2"):
            driver.bind(0)


def test_version(fake, monkeypatch):
    assert driver.version() == 13020
    for broken in (
        lambda: monkeypatch.setattr(fake, "cuDriverGetVersion", lambda number: 35),
        lambda: monkeypatch.setattr(driver, "_library", lambda: None),
    ):
        driver.version.cache_clear()
        broken()
        assert driver.version() == 0
