"""What is installed here, whether its numbers are right and how fast they come, what patch() would
do to a checkpoint, and the pages of the documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .version import __version__

OPTIONAL = ("transformers", "kernels", "numpy", "matplotlib", "rich")
CHECKED = ("gated_mlp", "mlp", "moe_mlp")


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def doctor() -> int:
    """Versions, explain(), and three ops against float64 on what `auto` takes. Exit code 1 where
    one is wrong, 2 where the chosen backend cannot run here."""
    from . import explain
    from .bench.render import say
    from .testing import CASES, judge

    for line in explain().splitlines():
        say(line)
    say(f"Python {sys.version.split()[0]}, {', '.join(map(_version, OPTIONAL))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    passed = True
    for name in CHECKED:
        case = next(c for c in CASES.values() if c.op == name)
        try:
            errors = judge(case, case.inputs(37, 64, 96, torch.float32, device))
        except Exception as error:  # of a setting, a driver, a compiler: it is what is asked
            what = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            say(f"nothing was checked: {what}{str(error).partition(chr(10))[0]}")
            return 2
        good = all(error.passed for error in errors.values())
        passed = passed and good
        print(f"{name} on {device}, float32, forward and backward: {'right' if good else 'WRONG'}")
    return 0 if passed else 1


def _wrong(message: str) -> int:
    print(f"fusedmlp patch-report: {message}", file=sys.stderr)
    return 2


def patch_report(folder: str) -> int:
    """patch() on a model without weights; the report. Exit code 1 where nothing is patched, 2 for a
    folder without a configuration that transformers knows."""
    from . import patch
    from .patching.checkpoint import empty_model

    if not (Path(folder) / "config.json").is_file():
        return _wrong(f"MODEL_DIR must hold a config.json, got {folder}")
    if importlib.util.find_spec("transformers") is None:
        return _wrong('needs transformers: pip install "fusedmlp[hf]"')
    try:
        model = empty_model(Path(folder))
    except Exception as error:  # whatever transformers raises at a configuration
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        return _wrong(f"config.json must describe a model of transformers, got {what}")
    report = patch(model)
    print(f"{type(model).__name__}: {report}")
    return 0 if report.patched else 1


def _pages() -> dict[str, Path]:
    """Each page by the name that `docs` takes, in the order of its list."""
    root = Path(__file__).parent
    pages = {p.stem: p for part in ("", "guides") for p in (root / "docs" / part).glob("*.md")}
    pages |= {f"api/{page.stem}": page for page in (root / "docs/api").glob("*.md")}
    pages |= {f"examples/{file.name}": file for file in (root / "examples").glob("*.*")}
    return dict(sorted(pages.items(), key=lambda item: ("/" in item[0], item[0])))


def _title(page: Path) -> str:
    """The first line of a page's heading, or of a script's docstring."""
    first = page.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ").removeprefix('"""').removesuffix('"""')


def _reference(line: re.Match[str]) -> str:
    """The signature and docstring of the public name on a line `::: name`."""
    module, _, name = line.group(1).rpartition(".")
    value = getattr(importlib.import_module(module), name)
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):  # no callable, or one without
        signature = ""
    return f"## {line.group(1)}{signature}\n\n{inspect.getdoc(value)}\n"


def docs(name: str | None) -> int:
    """The page of that name, which may be a link's path, or all names with their titles; exit code
    2 for no page's name."""
    pages = _pages()
    if name is None:
        for known, page in pages.items():
            print(f"{known:16} {_title(page)}")
        print(f"\nfusedmlp docs NAME prints one; the files are in {Path(__file__).parent / 'docs'}")
        return 0
    path = name.partition("#")[0].replace("../", "").removeprefix("docs/").removeprefix("guides/")
    found = pages.get(path) or pages.get(path.removesuffix(".md"))
    if found is None:
        names = ", ".join(pages)
        print(f"fusedmlp docs: PAGE must be one of {names}, got {name}", file=sys.stderr)
        return 2
    text = found.read_text(encoding="utf-8")
    print(re.sub(r"^::: (\S+)$", _reference, text, flags=re.MULTILINE), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedmlp", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fusedmlp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor", help="which copy runs, what runs where, and whether its numbers are right"
    )
    commands.add_parser(
        "bench", help="errors of every kernel, times or computed times; fusedmlp bench --help"
    )
    report = commands.add_parser("patch-report", help="what patch() would do to a checkpoint")
    report.add_argument("model_dir", metavar="MODEL_DIR", help="a folder with a config.json")
    pages = commands.add_parser("docs", help="the pages of the documentation, or one of them")
    pages.add_argument(
        "page",
        nargs="?",
        metavar="PAGE",
        help="say moe, api/moe or examples/moe_fsdp2.py; without it all names",
    )
    return parser


def _misspelt_backend() -> int:
    """2, once said, where FUSEDMLP_BACKEND names no backend; what still runs then runs as without
    it."""
    try:
        from .backends import choice  # noqa: F401 - it reads FUSEDMLP_BACKEND
    except ValueError as error:
        print(f"fusedmlp: {error}", file=sys.stderr)
        del os.environ["FUSEDMLP_BACKEND"]
        return 2
    return 0


def _run(arguments: Sequence[str]) -> int:
    if arguments[:1] != ["bench"]:
        args = _parser().parse_args(arguments)
    misspelt = _misspelt_backend()
    if misspelt and arguments != ["doctor"]:
        return 2
    if arguments[:1] == ["bench"]:
        from .bench.cli import main as bench
        from .bench.process import end_on_sigterm

        end_on_sigterm()
        return bench(arguments[1:])
    if args.command == "docs":
        return docs(args.page)
    return max(doctor(), misspelt) if args.command == "doctor" else patch_report(args.model_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 for a wrong result or nothing to patch; 2 for wrong usage or a
    backend that cannot run here; 130 after an interrupt."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe or a full disk can still be answered
        return code
    except BrokenPipeError:
        # `... | head` has seen enough.
        _discard_output()
        return 0
    except KeyboardInterrupt:
        print("fusedmlp: interrupted, and nothing was kept: type it again", file=sys.stderr)
        return 130
    except OSError as error:
        _discard_output()
        print(f"fusedmlp: {error}", file=sys.stderr)
        return 1


def _discard_output() -> None:
    """What is still buffered has nowhere to go; Python would try again at its end and complain."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
