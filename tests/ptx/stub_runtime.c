// The few functions of the CUDA runtime that a launcher calls, without a GPU: a launch goes to the
// hook that launchers.py sets. Kernels are known by the names under which nvcc's code registers
// them when the library is loaded.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
typedef struct {
  unsigned x, y, z;
} dim3;
typedef void (*hook_t)(const char *kernel, const dim3 *grid, const dim3 *block, void **arguments,
                       size_t shared);
enum { SUCCESS = 0, INVALID_DEVICE_FUNCTION = 98, KERNELS = 4096 };
static hook_t hook;
static const void *functions[KERNELS];
static const char *names[KERNELS];
static int count;
static struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} pushed;
void stub_set_hook(hook_t new_hook) { hook = new_hook; }
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name,
                            int threads, void *a, void *b, void *c, void *d, int *size) {
  if (count < KERNELS) {
    functions[count] = function;
    names[count++] = name;
  }
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return SUCCESS;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
  return SUCCESS;
}
int __cudaGetKernel(const void **kernel, const void *function) {
  *kernel = function;
  return SUCCESS;
}
int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                     void *stream) {
  for (int i = 0; i < count; ++i)
    if (functions[i] == function) {
      hook(names[i], &grid, &block, arguments, shared);
      return SUCCESS;
    }
  return INVALID_DEVICE_FUNCTION;
}
int __cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                       void *stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}
int cudaGetLastError(void) { return SUCCESS; }
int stub_is_capturing, stub_device;
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = stub_is_capturing;
  return SUCCESS;
}
int cudaGetDevice(int *device) {
  *device = stub_device;
  return SUCCESS;
}
int cudaMalloc(void **memory, size_t bytes) {
  *memory = malloc(bytes);
  memset(*memory, 0xFF, bytes); // whatever was there
  return SUCCESS;
}
int cudaMemsetAsync(void *memory, int value, size_t bytes, void *stream) {
  memset(memory, value, bytes);
  return SUCCESS;
}
