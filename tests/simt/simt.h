// The host SIMT runner: a CUDA .cu compiled by g++, its kernels run with one fiber per CUDA thread.
// README.md says what that proves.
#pragma once
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The headers above define these as nothing for a compiler that is not nvcc.
#undef __shared__
#define __shared__ static thread_local
#undef __constant__
#define __constant__ static
#define __launch_bounds__(...)

#include "intrinsics.h"
#include "launch.h"
#include "memory.h"
#include "mma.h"

#define threadIdx (simt::self().thread)
#define blockIdx (simt::self().block->index)
#define blockDim (simt::grid.block)
#define gridDim (simt::grid.grid)
