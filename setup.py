"""The optional CUDA build, and the links of the pages that ship; all else is in pyproject.toml.

FUSEDMLP_CUDA=auto builds the extension iff nvcc is found (CUDACXX, CUDA_HOME, PATH), 1 fails
without nvcc, 0 leaves the extension out. FUSEDMLP_CUDA_ARCHS overrides CMakeLists.txt's
architectures. FUSEDMLP_CUTLASS=auto builds fusedmlp._cutlass too iff nvidia-cutlass is installed
where the build runs, 1 asks for it and fails without, 0 leaves it out.

This file is two things. Installers import it as the build backend, setuptools' own but for what it
asks for: CMake's tools, where there is an extension to build. Setuptools then runs it as a script.
"""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

__all__ = [  # the hooks of PEP 517 and PEP 660
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent
# Kept between installs, so that a second one compiles only what has changed.
BUILD = ROOT / "build" / str(sys.implementation.cache_tag)
NEEDS = ["cmake>=3.25", "ninja>=1.11", "pybind11>=2.13"]  # of the extra "cuda"
CUTLASS = "nvidia-cutlass>=4.2,<4.3"  # in that extra too, and asked for by FUSEDMLP_CUTLASS=1
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(?:#[^)]*)?\)")  # to a file, not to an address
WITHOUT = "FUSEDMLP_CUDA=0 installs fusedmlp without its CUDA extension"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    asked = os.environ.get("CUDACXX") or (home and f"{home}/bin/nvcc") or "nvcc"
    return shutil.which(asked)


class Pages(build_py):
    """Names a file that stays in the repository where a page that ships has a link to it, as
    docs/hooks.py does on the site."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the pages are the repository's own
            return
        package = Path(self.build_lib, "fusedmlp")
        for page in package.rglob("*.md"):

            def named(link: re.Match[str], page: Path = page) -> str:
                text, target = link.groups()
                if (page.parent / target).exists():
                    return link.group(0)
                folder = page.parent.relative_to(package).as_posix()
                path = posixpath.normpath(posixpath.join(folder, target))
                return f"`{path}`" if text == path else f"{text} (`{path}` in the repository)"

            text = page.read_text(encoding="utf-8")
            page.write_text(LINK.sub(named, text), encoding="utf-8")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if not (cmake and ninja and importlib.util.find_spec("pybind11")):
            raise SystemExit(f"fusedmlp: building needs {', '.join(NEEDS)}; {WITHOUT}")
        archs = os.environ.get("FUSEDMLP_CUDA_ARCHS")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            # Under build isolation both lie in a folder that is gone by the next install.
            *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"),
            *("-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CUDA_COMPILER={NVCC}"),
            f"-DFUSEDMLP_CUDA_STRICT={'ON' if WANTED == '1' else 'OFF'}",
            f"-DFUSEDMLP_CUTLASS={BY_CUTLASS[WANTED_CUTLASS]}",
            f"-DFUSEDMLP_CUDA_ARCHS={archs}" if archs else "-UFUSEDMLP_CUDA_ARCHS",
        ]
        cache = BUILD / "CMakeCache.txt"
        if cache.exists() and not {f"={NVCC}", f"={ROOT}"} <= {
            line[line.find("=") :] for line in cache.read_text().splitlines()
        }:
            configure.append("--fresh")
        into = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        jobs = str(min(8, len(os.sched_getaffinity(0))))
        environment = {"CMAKE_BUILD_PARALLEL_LEVEL": jobs, **os.environ}
        try:
            for command in (
                configure,
                [cmake, "--build", str(BUILD)],
                [cmake, "--install", str(BUILD), "--prefix", str(into)],
            ):
                subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"fusedmlp: the CUDA extension did not build; {WITHOUT}") from error


WANTED = os.environ.get("FUSEDMLP_CUDA", "auto")
if WANTED not in ("auto", "1", "0"):
    raise SystemExit(f"fusedmlp: FUSEDMLP_CUDA must be auto, 1 or 0, got {WANTED!r}")
BY_CUTLASS = {"auto": "AUTO", "1": "ON", "0": "OFF"}  # as CMakeLists.txt calls it
WANTED_CUTLASS = os.environ.get("FUSEDMLP_CUTLASS", "auto")
if WANTED_CUTLASS not in BY_CUTLASS:
    raise SystemExit(f"fusedmlp: FUSEDMLP_CUTLASS must be auto, 1 or 0, got {WANTED_CUTLASS!r}")
NVCC = None if WANTED == "0" else find_nvcc()
if WANTED == "1" and NVCC is None:
    raise SystemExit(
        "fusedmlp: FUSEDMLP_CUDA=1 needs nvcc: put it on PATH, or set CUDA_HOME or CUDACXX"
    )
if WANTED_CUTLASS == "1" and NVCC is None:
    raise SystemExit("fusedmlp: FUSEDMLP_CUTLASS=1 needs nvcc, as FUSEDMLP_CUDA=1 does")


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*NEEDS, *([CUTLASS] if WANTED_CUTLASS == "1" else [])] if NVCC else []


get_requires_for_build_editable = get_requires_for_build_wheel

if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fusedmlp._C", sources=[])] if NVCC else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": Pages},
    )
