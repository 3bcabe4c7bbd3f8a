// The plain C interface between bindings.cpp and the CUDA kernels. No torch header on this side, so
// a .cu file compiles in seconds and its object is the same for every torch.
//
// A launcher enqueues on `stream`, allocates nothing, never synchronises, and returns a cudaError_t
// (0 is success) that fastformer_cuda_error puts in words.
#pragma once
#include <cstdint>

typedef struct CUstream_st *fastformer_stream; // cudaStream_t

extern "C" {

const char *fastformer_cuda_error(int error);
int fastformer_cuda_runtime_version();

// keep: rows * cols bytes. rng: (seed, offset) on the device.
int fastformer_dropout_mask(bool *keep, const int64_t *rng, int64_t rows, int64_t cols,
                            int64_t site, uint32_t threshold, fastformer_stream stream);
}
