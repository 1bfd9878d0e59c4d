#!/usr/bin/env bash
# Baselines for a GPU machine without a network, as one archive: Python 3.12 on x86-64, CUDA 13.
#
#   bench/rivals/pack.sh rivals.tar.xz [PACKAGE==VERSION ...]
#
# There: tar -xJf rivals.tar.xz -C /tmp
#        export PYTHONPATH=/tmp/rivals:/tmp/rivals/nvidia_cutlass_dsl/dsl_packages
# (the second folder is what a .pth file adds where packages are installed).
#
# All of them make about 62 MB. What no machine without a compiler for it would read is left out:
# stubs, CUDA 12, tests; but `import tvm_ffi` loads one library that is named like a test.
set -euo pipefail
archive=$(realpath -m "${1:?pack.sh ARCHIVE [PACKAGE==VERSION ...]}")
shift
[ -e "$archive" ] && { echo "pack.sh: $archive is there already; nothing was changed" >&2; exit 2; }
[ $# -gt 0 ] || set -- liger-kernel==0.8.5 flash-swiglu-mlp==0.4.3 quack-kernels==0.6.4 \
  sonicmoe==0.1.2.post1 einops==0.8.2 apache-tvm-ffi==0.1.15.post2 nvidia-cutlass-dsl==4.6.2 \
  nvidia-cutlass-dsl-libs-base==4.6.2 nvidia-cutlass-dsl-libs-core==4.6.2 \
  nvidia-cutlass-dsl-libs-cu13==4.6.2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
platforms=(--platform manylinux2014_x86_64)
for glibc in 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$folder/wheels" "$@"

mkdir "$folder/rivals"
for wheel in "$folder"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$folder/rivals"; done
find "$folder/rivals" -depth -type d \( -name stubs -o -name iket -o -name cu12 \) -exec rm -rf {} +
find "$folder/rivals" -name '*test*.so' ! -name libtvm_ffi_testing.so -delete
tar -C "$folder" -cf - rivals | xz --x86 --lzma2=preset=9 > "$archive"
du -h "$archive"
