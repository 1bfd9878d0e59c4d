"""What waits for another library's module, and transformers' table of experts as one that waits."""

import importlib
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest

from fusedmlp.arrival import once_loaded

IMPORTS = ("import fusedmlp", "from transformers import AutoModelForCausalLM, MixtralConfig")
USE = """
config = MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=9,
                       num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
model = AutoModelForCausalLM.from_config(config, experts_implementation="fusedmlp")
print(model.config._experts_implementation)
"""


@pytest.mark.parametrize("order", [1, -1], ids=["fusedmlp first", "transformers first"])
def test_experts_are_in_the_table_of_a_usual_script(order):
    script = "\n".join((*IMPORTS[::order], USE))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["fusedmlp"], done.stderr


def test_a_call_follows_the_module_once(tmp_path, monkeypatch):
    (tmp_path / "late_library.py").write_text("value = 1\n")
    (tmp_path / "other_library.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before, calls = list(sys.meta_path), []
    once_loaded("late_library", lambda: calls.append(sys.modules["late_library"].value))
    importlib.import_module("other_library")
    assert calls == []
    late = importlib.import_module("late_library")
    assert calls == [1]
    assert sys.meta_path == before
    importlib.reload(late)
    assert calls == [1]
    once_loaded("late_library", lambda: calls.append(2))  # it is there: at once
    assert calls == [1, 2]
    for name in ("late_library", "other_library"):
        del sys.modules[name]


def test_whoever_finds_it_too_comes_later(tmp_path, monkeypatch):
    (tmp_path / "late_library.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [PathFinder, *sys.meta_path])
    calls = []
    once_loaded("late_library", lambda: calls.append(1))
    importlib.import_module("late_library")
    del sys.modules["late_library"]
    assert calls == [1]


def test_a_folder_that_has_nothing_to_run_is_loaded_as_ever(tmp_path, monkeypatch):
    (tmp_path / "late_namespace").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    once_loaded("late_namespace", lambda: pytest.fail("it does not run"))
    assert list(importlib.import_module("late_namespace").__path__) == [
        f"{tmp_path}/late_namespace"
    ]
    del sys.modules["late_namespace"]


def test_a_module_that_there_is_not_is_still_none(monkeypatch):
    once_loaded("no_such_library", lambda: pytest.fail("it never came"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_library")
