// What bindings.cpp has to ask the CUDA runtime that is linked into this library.
#include "cuda/launchers.h"

#include <cuda_runtime.h>

extern "C" const char *fastformer_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" int fastformer_cuda_runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}
