// Matrix products that end in GELU, its derivative or the gradient of a bias, by cuBLASLt.
//
// The library is found at run time, where torch has loaded it: the build needs nothing of it, and
// where it is missing or refuses a product the caller does without.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace fastformer {

enum class Epilogue : uint32_t { // the values of cublasLtEpilogue_t
  kGeluAux = 32 | 128,           // aux = product, out = gelu(aux), in the tanh form
  kGeluAuxBias = 32 | 128 | 4,   // aux = product + bias
  kDgeluBgrad = 64 | 128 | 16,   // out = product * gelu'(aux), bias = column sums of out
  kBgradB = 512,                 // out = product, bias = sums of a over K
};

// out (M, N) = a b, of bfloat16 or float16 with float32 sums. All are row-major without gaps.
struct EpilogueProduct {
  const void *a, *b; // (M, K) and (K, N), or their transposes
  void *out;
  bool a_transposed, b_transposed;
  int64_t M, N, K;
  bool bf16;
  Epilogue epilogue;
  void *bias; // (N), of kBgradB (M)
  void *aux;  // (M, N); N is a multiple of 8
};

class CublasLt {
public:
  // The first of these libraries that the process has, else the first that is found.
  explicit CublasLt(const std::vector<std::string> &names);

  // Why nothing runs, empty where the library is usable.
  const std::string &missing() const { return missing_; }

  // Version, and what it refused last: words for people.
  std::string description() const;

  // Enqueues the product on `stream`; the device must be current. Returns false, with nothing
  // enqueued, where the library has no kernel for it; raises where the launch fails. `workspace` is
  // asked for device memory that lives until the stream has passed.
  bool multiply(const EpilogueProduct &product, int device, void *stream,
                const std::function<void *(size_t bytes)> &workspace);

private:
  struct Functions;

  void *handle(int device);
  void enqueue(const EpilogueProduct &product, int device, void *stream,
               const std::function<void *(size_t bytes)> &workspace);

  std::shared_ptr<const Functions> functions_;
  std::string missing_;
  mutable std::mutex mutex_;
  std::map<int, void *> handles_; // never destroyed: CUDA may be gone before we are
  std::string refusal_;
};

} // namespace fastformer
