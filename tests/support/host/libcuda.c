/* A CUDA driver of one GPU that is not there: it takes every call and does nothing. What runs above it
   is what a launch costs the host, but for the driver's own part. */
#include <stdint.h>
#include <string.h>

typedef int CUresult;

enum { SHARED_PER_BLOCK = 97, SHARED_PER_MULTIPROCESSOR = 81, MULTIPROCESSORS = 16, REGISTERS = 12,
       MAJOR = 75, MINOR = 76 };

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case MAJOR: *value = 9; break;
    case MINOR: *value = 0; break;
    case SHARED_PER_BLOCK: *value = 232448; break;
    case SHARED_PER_MULTIPROCESSOR: *value = 233472; break;
    case MULTIPROCESSORS: *value = 132; break;
    case REGISTERS: *value = 65536; break;
    default: *value = 1024;
  }
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *f) { *value = attribute ? 0 : 1024; return 0; }
CUresult cuFuncSetAttribute(void *f, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *f, int config) { return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "none"; return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)8; return 0; }
CUresult cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)8; return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, void *f, void *config) { *count = 1; return 0; }
CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return 0;
}
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
CUresult cuTensorMapEncodeTiled(void *map) { memset(map, 0, 128); return 0; }
CUresult cuTensorMapEncodeIm2col(void *map) { memset(map, 0, 128); return 0; }
CUresult cuLaunchKernelEx(const void *config, void *f, void **arguments, void **extra) { return 0; }
CUresult cuGetProcAddress(const char *name, void **f, int version, uint64_t flags) { return 1; }
CUresult cuGetProcAddress_v2(const char *name, void **f, int version, uint64_t flags, int *status) {
  return 1;
}
