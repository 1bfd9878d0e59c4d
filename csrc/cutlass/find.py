"""Print "version;folder" of CUTLASS's headers in the package nvidia-cutlass, for CMake; why not, on
stderr, and exit code 1 where they are not to be used."""

import importlib.metadata
import sys

try:
    package = importlib.metadata.distribution("nvidia-cutlass")
except importlib.metadata.PackageNotFoundError:
    sys.exit("the package nvidia-cutlass is not installed: pip install 'nvidia-cutlass>=4.2,<4.3'")
if package.version.split(".")[:2] != ["4", "2"]:
    sys.exit(f"nvidia-cutlass must be 4.2, got {package.version}")
folder = package.locate_file("cutlass_library/source/include")
if not folder.joinpath("cutlass/cutlass.h").is_file():
    sys.exit(f"nvidia-cutlass {package.version} holds no headers in {folder}")
print(f"{package.version};{folder}")
