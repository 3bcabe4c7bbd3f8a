// The products of the feed-forward layer for ctypes, by the library's own code.
#include "cuda/mlp_products.h"

#include <cstring>
#include <exception>

using namespace fastformer;

extern "C" {

void *cublaslt_open(const char *first, const char *second) { return new CublasLt({first, second}); }
void cublaslt_close(CublasLt *library) { delete library; }
const char *cublaslt_missing(CublasLt *library) { return library->missing().c_str(); }
void cublaslt_description(CublasLt *library, char *words, size_t bytes) {
  std::strncpy(words, library->description().c_str(), bytes - 1);
}

struct Memory {
  void *start;
  size_t asked;
};

// 1 or 0 as CublasLt::multiply returns, -1 where it raises, with its words.
int cublaslt_multiply(CublasLt *library, int which, const int64_t *sizes, int bf16, void **p,
                      int device, void *stream, Memory *workspace, char *words, size_t bytes) {
  const MlpSizes s{sizes[0], sizes[1], sizes[2], sizes[3]};
  const EpilogueProduct product = which == 0 ? hidden_product(s, bf16, p[0], p[1], p[2], p[3], p[4])
                                  : which == 1
                                      ? grad_pre_product(s, bf16, p[0], p[1], p[2], p[3], p[4])
                                      : grad_w2_product(s, bf16, p[0], p[1], p[2], p[3]);
  const auto allocate = [&](size_t asked) {
    workspace->asked = asked;
    return workspace->start;
  };
  try {
    return library->multiply(product, device, stream, allocate);
  } catch (const std::exception &error) {
    std::strncpy(words, error.what(), bytes - 1);
    return -1;
  }
}
}
