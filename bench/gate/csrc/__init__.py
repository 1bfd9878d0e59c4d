"""The ahead-of-time gate of csrc/: look inside what CMake has built, with no GPU.

    python -m fusedmlp.bench.gate.csrc [--build FOLDER] [--update] [--json FILE]

Nothing is compiled here: the objects of the last build are read, and what ptxas said of each, which
the build keeps beside it. Of each kernel the gate reads registers, stack, spills, static shared
memory and opcodes. It fails on a spill; on a kernel of X_smNN.cu without that architecture's own
instructions; on wgmma that ptxas has serialised or a setmaxnreg that it ignored; on instructions
that are known to go wrong (bench/gate/hazards.py); and where a kernel takes more than
bench/gate/csrc.json says, which --update writes anew, or is not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ...machine import ROOT
from .. import hazards
from ..inspecting import tool

BASELINE = Path(__file__).parents[1] / "csrc.json"
BUILD = ROOT / "build" / str(sys.implementation.cache_tag)  # setup.py's

# What each kernel of a source X_smNN.cu must hold, by NN.
_OWN = {
    "90": ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"),
    "100": ("UTCHMMA", "UTMALDG", "UTMASTG"),
}
# Its epilogue stores from registers.
_NOT_OWN = {"cutlass_sm100": ("UTMASTG",)}
_BY_CUTLASS = "cutlass_"  # a source's name, which is built where the package is
_OPCODES = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "USETMAXREG")
# ptxas's numbers of what it did against the source: C7508, setmaxnreg ignored; C7510 and C7511,
# wgmma serialised; C7517 and C7519, a wait or an arrive of its own.
_COMPLAINT = re.compile(r"\((C75\d\d)\)(.*)")
_LIMITS = ("registers", "stack", "spills", "shared")  # more is worse


class BuildError(RuntimeError):
    """There is no build to look into, or an old one."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of one object, for one architecture. stack in bytes, spills in instructions (LDL,
    STL), shared memory static."""

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    spills: int
    opcodes: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.source} {self.arch} {self.name}"


def _demangled(names: list[str]) -> dict[str, str]:
    """mangled -> template and its arguments, without namespaces and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = {}
    for mangled, name in zip(names, text.splitlines(), strict=True):
        name = re.sub(r"\(anonymous namespace\)::|\bfusedmlp::|^void ", "", name)
        short[mangled] = _ours(name) or re.sub(r"\(.*", "", name).replace(" >", ">")
    return short


def _ours(name: str) -> str | None:
    """What distinguishes a kernel of CUTLASS, whose name is its type, of pages that c++filt may not
    read."""
    if "device_kernel" not in name or "cutlass" not in name:
        return None
    element = "bfloat16_t" if "bfloat16_t" in name else "half_t"
    return f"device_kernel<{element}, {str('PairMainloop' in name).lower()}>"


def _sections(text: str, function: str) -> Iterator[tuple[tuple[str, str], str]]:
    """(architecture, mangled name) and the text that follows, of a listing by cuobjdump."""
    here = ""
    parts = re.split(rf"arch = (sm_\w+)|{function}", text)
    # Each cut leaves the architecture, the function, one of them None, and the text up to the next.
    for found, name, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        here = found or here
        if name:
            yield (here, name), body


def _complaints(log: str, mangled: str) -> list[str]:
    """What ptxas said of a kernel, and what it said of none by name."""
    lines = [m.groups() for m in _COMPLAINT.finditer(log)]
    mine = {code for code, text in lines if mangled in text or "function '" not in text}
    return [f"ptxas {code}" for code in sorted(mine)]


def _faults(
    source: str, stack: int, spills: int, sass: str, opcodes: tuple[str, ...], assembler: str
) -> list[str]:
    faults = hazards.in_code(sass, assembler)
    if stack or spills:
        faults.append(f"spills ({stack} bytes of stack, {spills} LDL and STL)")
    own = re.search(r"_sm(\d+)$", source)
    needed = set(_OWN.get(own[1] if own else "", ())) - set(_NOT_OWN.get(source, ()))
    faults += [f"no {op}" for op in sorted(needed) if op not in opcodes]
    # One wait a K step and some between tiles; as many as products means one after each.
    products = len(re.findall(r"\bHGMMA\b", sass))
    if products and sass.count("WARPGROUP.DEPBAR") >= products:
        faults.append("serialised wgmma")
    return faults


def inspect(item: Path, assembler: str) -> list[Kernel]:
    """Every kernel of an object file X.cu.o, with what ptxas said of its source."""
    source = item.name.removesuffix(".cu.o")
    log = item.with_name(item.name + ".log").read_text()
    usage = dict(_sections(tool("cuobjdump", str(item), "-res-usage"), r"Function (\w+):"))
    sass = dict(_sections(tool("cuobjdump", str(item), "-sass"), r"Function : (\w+)"))
    names = _demangled([mangled for _, mangled in usage])
    kernels = []
    for key, text in usage.items():
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
        assert found is not None, text
        registers, stack, shared = map(int, found.groups())
        code = sass[key]
        opcodes = tuple(op for op in _OPCODES if re.search(rf"\b{op}\b", code))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        arch, mangled = key
        faults = _faults(source, stack, spills, code, opcodes, assembler)
        faults += _complaints(log, mangled)
        kernels.append(
            Kernel(source, names[mangled], arch, registers, stack, shared, spills, opcodes,
                   tuple(faults))
        )  # fmt: skip
    return sorted(kernels, key=lambda kernel: kernel.key)


def objects(build: Path) -> list[Path]:
    """The CUDA objects of a build; BuildError where there are none or a source is newer."""
    found = sorted(build.glob("CMakeFiles/*.dir/csrc/**/*.cu.o"))
    if not found:
        raise BuildError(
            f"{build}: no CUDA objects; build them with `FUSEDMLP_CUDA=1 pip install -e .`"
        )
    built = max(path.stat().st_mtime for path in (*found, build / "build.ninja"))
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    newer = [p.name for p in sources if p.stat().st_mtime > built]
    if newer:
        raise BuildError(f"{build}: older than {', '.join(sorted(newer))}; build again")
    return found


def compiler(build: Path) -> str:
    """nvcc's version, as CMake found it; as the last one did, where several have built here."""
    files = build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")
    path = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if path is None:
        raise BuildError(f"{build}: CMake has found no nvcc for it; build again")
    found = re.search(r'CMAKE_CUDA_COMPILER_VERSION "([\d.]+)"', path.read_text())
    assert found is not None, path
    return found[1]


def compare(kernels: list[Kernel], baseline: dict[str, dict[str, int]]) -> list[str]:
    """What is worse than the baseline, or is not in both."""
    now = {kernel.key: kernel for kernel in kernels}
    worse = [f"{key}: not in the baseline" for key in now.keys() - baseline.keys()]
    worse += [f"{key}: gone" for key in baseline.keys() - now.keys()]
    for key in now.keys() & baseline.keys():
        for limit in _LIMITS:
            got, was = getattr(now[key], limit), baseline[key][limit]
            if got > was:
                worse.append(f"{key}: {limit} {got}, were {was}")
    return sorted(worse)


def _not_built(kernels: list[Kernel], baseline: dict[str, dict[str, int]]) -> set[str]:
    """Rows of the baseline whose source is built where nvidia-cutlass is, and was not."""
    built = {kernel.source for kernel in kernels}
    return {k for k in baseline if k.startswith(_BY_CUTLASS) and k.split()[0] not in built}


def _write_baseline(version: str, kernels: list[Kernel]) -> None:
    before = json.loads(BASELINE.read_text())["kernels"] if BASELINE.exists() else {}
    rows = {key: before[key] for key in _not_built(kernels, before)}
    rows |= {k.key: {limit: getattr(k, limit) for limit in _LIMITS} for k in kernels}
    rows = dict(sorted(rows.items()))
    # A line per kernel, for diffs.
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    text = f'{{\n "nvcc": {json.dumps(version)},\n "kernels": {{\n{lines}\n }}\n}}\n'
    BASELINE.write_text(text)


def _row(k: Kernel) -> str:
    return (
        f"{k.source:20} {k.arch:8} {k.name:52} {k.registers:4} {k.stack:5} {k.spills:6} "
        f"{k.shared:6}  {' '.join(k.opcodes):36} {'; '.join(k.faults)}"
    ).rstrip()


def _judged(version: str, kernels: list[Kernel]) -> list[str]:
    """What the baseline has against them; it speaks for its own nvcc alone."""
    if not BASELINE.exists():
        return [f"no {BASELINE.name}; --update writes it"]
    baseline = json.loads(BASELINE.read_text())
    if baseline["nvcc"] != version:
        print(f"not compared: {BASELINE.name} is of nvcc {baseline['nvcc']}")
        return []
    rows = baseline["kernels"]
    left_out = _not_built(kernels, rows)
    if left_out:
        print(f"not built, so not compared: {', '.join(sorted(left_out))}")
    return compare(kernels, {key: row for key, row in rows.items() if key not in left_out})


def main(argv: list[str] | None = None) -> int:
    name = "python -m fusedmlp.bench.gate.csrc"
    parser = argparse.ArgumentParser(name, description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=BUILD, help="CMake's build folder")
    parser.add_argument("--update", action="store_true", help=f"write {BASELINE.name} anew")
    parser.add_argument("--json", metavar="FILE", help="also write every row to FILE")
    args = parser.parse_args(argv)
    try:
        items = objects(args.build)
    except BuildError as error:
        parser.error(str(error))
    version = compiler(args.build)
    kernels = [kernel for item in items for kernel in inspect(item, version)]
    print(f"nvcc {version}")
    print(
        f"{'source':20} {'arch':8} {'kernel':52} {'regs':>4} {'stack':>5} {'spills':>6} "
        f"{'static':>6}  {'opcodes':36} faults"
    )
    print("\n".join(map(_row, kernels)))
    if args.json:
        Path(args.json).write_text(json.dumps([dataclasses.asdict(k) for k in kernels], indent=1))
    if args.update:
        _write_baseline(version, kernels)
    worse = _judged(version, kernels)
    for line in worse:
        print(f"worse: {line}")
    faulty = sum(bool(kernel.faults) for kernel in kernels)
    print(f"{len(kernels)} kernels, {faulty} with faults, {len(worse)} worse than the baseline")
    return 1 if faulty or worse else 0
