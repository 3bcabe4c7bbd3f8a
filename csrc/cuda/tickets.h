// Counters by which the last block of a launch knows that it is the last.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

namespace fastformer {

constexpr int64_t kMaxTickets = 64;

// Finds `count` counters at zero, at most kMaxTickets, which a launch leaves at zero. The launches
// of a stream come one after another and share theirs, so that none needs another that zeroes them.
// A CUDA graph may be replayed on any stream, beside launches on the one that it was captured on:
// its launches have their own counters, in `scratch`, zeroed by a node of the graph.
inline cudaError_t find_tickets(unsigned *scratch, int64_t count, cudaStream_t stream,
                                unsigned **tickets) {
  cudaStreamCaptureStatus capture;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, &capture))
    return error;
  if (capture != cudaStreamCaptureStatusNone) {
    *tickets = scratch;
    return cudaMemsetAsync(scratch, 0, count * sizeof(unsigned), stream);
  }
  int device;
  if (const cudaError_t error = cudaGetDevice(&device))
    return error;
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, unsigned *> kept; // for good
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned *&own = kept[{device, stream}];
  if (!own) {
    constexpr size_t kBytes = kMaxTickets * sizeof(unsigned);
    unsigned *fresh;
    if (const cudaError_t error = cudaMalloc(&fresh, kBytes))
      return error;
    if (const cudaError_t error = cudaMemsetAsync(fresh, 0, kBytes, stream))
      return error;
    own = fresh;
  }
  *tickets = own;
  return cudaSuccess;
}

} // namespace fastformer
