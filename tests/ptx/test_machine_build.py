"""The machine is built once, however many processes ask for it."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusedmlp.bench.gate.ptx import library


def test_one_process_builds_the_machine_and_the_others_wait(monkeypatch, tmp_path):
    """Here two threads, whose locks exclude each other as two processes' do."""
    built = Path(library.machine()._name)
    builds = []

    def build(compiler, path):
        builds.append(path)
        time.sleep(0.1)
        Path(shutil.copy(built, path.with_suffix(f".{threading.get_ident()}"))).replace(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_build", build)
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(library.machine.__wrapped__) for _ in range(2)]
        assert {Path(f.result()._name) for f in found} == set(builds)
    assert len(builds) == 1
