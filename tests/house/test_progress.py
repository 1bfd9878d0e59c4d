"""The bar of long calls: what it shows on a terminal, and that it leaves nothing there."""

import io
import sys

import pytest

from fusedmlp.progress import Progress


class Terminal(io.StringIO):
    """What a line without an end writes is seen once it is flushed."""

    seen = ""

    def isatty(self):
        return True

    def flush(self):
        self.seen = self.getvalue()


def test_a_bar_clears_its_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("check", 3) as progress:
        progress.step("one [bold]")  # no markup
    shown = sys.stderr.seen
    assert "check one [bold]" in shown and "1/3" in shown and shown.endswith("\033[2K")


def test_a_line_in_the_place_of_a_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    shown, texts = Terminal(), []
    with Progress("check", 2, shown) as progress:
        for what in ("one", "two"):
            progress.step(what)
            texts.append(shown.seen)
    assert texts == ["\rcheck 1/2 one\033[K", texts[0] + "\rcheck 2/2 two\033[K"]
    assert shown.seen == texts[1] + "\r\033[K"
    with Progress("check", 1, alone := Terminal()) as progress:
        progress.step("all")
    assert alone.seen == "\rcheck 1/1 all\033[K\r\033[K"


@pytest.mark.parametrize("with_rich", (True, False))
@pytest.mark.parametrize("err, total", ((Terminal(), 0), (io.StringIO(), 1)))
def test_nothing_to_do_and_no_terminal_show_nothing(monkeypatch, with_rich, err, total):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    with Progress("check", total, err) as progress:
        progress.step()
    assert progress.done == 1 and err.getvalue() == ""
