// As much of the CUDA driver as tests/ptx/card.py calls, with the memory of the host: whether the
// calls are right is seen without a GPU. The only kernel copies and writes down its launch.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr;
typedef unsigned u;
static int live, shared_limit, synchronized;
int cuInit(u flags) { return flags ? 1 : 0; }
int cuDeviceGet(int *device, int ordinal) {
  *device = 7;
  return ordinal;
}
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, "host", size);
  return device != 7;
}
int cuDeviceGetAttribute(int *value, int number, int device) {
  *value = number == 75 ? 8 : number == 76 ? 6 : -1;
  return device != 7;
}
int cuDriverGetVersion(int *version) {
  *version = 12040;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = &live;
  return device != 7;
}
int cuCtxSetCurrent(void *context) { return context != &live; }
int cuGetErrorString(int code, const char **text) {
  *text = "some words";
  return 0;
}
int cuModuleLoadDataEx(void **module, const void *ptx, u count, int *options, void **values) {
  if (count != 2 || options[0] != 5 || options[1] != 6)
    return 1;
  if (strstr(ptx, "broken")) {
    strncpy(values[0], "line 3: broken", (uintptr_t)values[1]);
    return 218;
  }
  *module = strdup(ptx);
  ++live;
  return strstr(ptx, ".target sm_86") ? 0 : 209;
}
int cuModuleUnload(void *module) {
  free(module);
  --live;
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = module;
  return strcmp(name, "copy") ? 500 : 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  shared_limit = value;
  return attribute == 8 ? 0 : 1;
}
int cuMemAlloc_v2(ptr *address, size_t size) {
  *address = (ptr)aligned_alloc(256, (size + 255) / 256 * 256);
  ++live;
  return 0;
}
int cuMemFree_v2(ptr address) {
  free((void *)address);
  --live;
  return 0;
}
int cuMemsetD8_v2(ptr address, unsigned char value, size_t size) {
  memset((void *)address, value, size);
  return 0;
}
int cuMemcpyHtoD_v2(ptr to, const void *from, size_t size) {
  memcpy((void *)to, from, size);
  return 0;
}
int cuMemcpyDtoH_v2(void *to, ptr from, size_t size) {
  if (!synchronized)
    return 1;
  memcpy(to, (void *)from, size);
  return 0;
}
int cuCtxSynchronize(void) {
  synchronized = 1;
  return 0;
}
int cuLaunchKernel(void *f, u gx, u gy, u gz, u bx, u by, u bz, u shared, void *stream,
                   void **params, void **extra) {
  if (stream || extra)
    return 1;
  uint32_t *from = *(uint32_t **)params[0], *to = *(uint32_t **)params[1],
           count = *(uint32_t *)params[2];
  memcpy(to, from, 4 * count);
  uint32_t launched[] = {gx, gy, gz, bx, by, bz, shared, (uint32_t)shared_limit, 0};
  memcpy(&launched[8], params[3], 4);
  memcpy(to + count, launched, sizeof launched);
  memcpy(to + count + 9, params[4], 128);
  return 0;
}
int cuTensorMapEncodeTiled(void *map, int type, u rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const u *box, const u *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  if ((uintptr_t)map % 64 || interleave || promotion)
    return 1;
  uint64_t out[16] = {type,   rank,   (uintptr_t)address, sizes[0], sizes[1], strides[0],
                      box[0], box[1], steps[0],           steps[1], swizzle,  fill};
  memcpy(map, out, 128);
  return 0;
}
