#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <stdexcept>

// After NVIDIA's documentation of cuBLASLt; enumerations are int. Nothing of it is linked.
extern "C" {
struct cublasLtMatmulAlgo {
  uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult {
  cublasLtMatmulAlgo algo;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};
size_t cublasLtGetVersion();
const char *cublasLtGetStatusString(int status);
int cublasLtCreate(void **handle);
int cublasLtMatmulDescCreate(void **desc, int compute_type, int scale_type);
int cublasLtMatmulDescDestroy(void *desc);
int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t bytes);
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t cols, int64_t ld);
int cublasLtMatrixLayoutDestroy(void *layout);
int cublasLtMatmulPreferenceCreate(void **preference);
int cublasLtMatmulPreferenceDestroy(void *preference);
int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value,
                                         size_t bytes);
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted,
                                   cublasLtMatmulHeuristicResult *results, int *found);
int cublasLtMatmul(void *handle, void *desc, const void *alpha, const void *a, void *a_layout,
                   const void *b, void *b_layout, const void *beta, const void *c, void *c_layout,
                   void *d, void *d_layout, const cublasLtMatmulAlgo *algo, void *workspace,
                   size_t workspace_bytes, void *stream);
}

#define FASTFORMER_CUBLASLT(EACH)                                                                  \
  EACH(cublasLtGetVersion)                                                                         \
  EACH(cublasLtGetStatusString)                                                                    \
  EACH(cublasLtCreate)                                                                             \
  EACH(cublasLtMatmulDescCreate)                                                                   \
  EACH(cublasLtMatmulDescDestroy)                                                                  \
  EACH(cublasLtMatmulDescSetAttribute)                                                             \
  EACH(cublasLtMatrixLayoutCreate)                                                                 \
  EACH(cublasLtMatrixLayoutDestroy)                                                                \
  EACH(cublasLtMatmulPreferenceCreate)                                                             \
  EACH(cublasLtMatmulPreferenceDestroy)                                                            \
  EACH(cublasLtMatmulPreferenceSetAttribute)                                                       \
  EACH(cublasLtMatmulAlgoGetHeuristic)                                                             \
  EACH(cublasLtMatmul)

namespace fastformer {
namespace {

constexpr int kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14; // cudaDataType
constexpr int kCompute32F = 68;                           // cublasComputeType_t
constexpr int kTransposeA = 3, kTransposeB = 4, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11,
              kAuxLd = 12; // cublasLtMatmulDescAttributes_t
constexpr int kMaxWorkspace = 1, kReductionSchemes = 3, kAlignmentA = 5, kAlignmentB = 6,
              kAlignmentC = 7, kAlignmentD = 8; // cublasLtMatmulPreferenceAttributes_t
constexpr uint32_t kInComputeType = 2;          // cublasLtReductionScheme_t
constexpr int kInvalidValue = 7, kArchMismatch = 8, kNotSupported = 15; // cublasStatus_t
constexpr uint64_t kMaxWorkspaceBytes = uint64_t{32} << 20; // what NVIDIA advises for Hopper

// What the library answers where it cannot do a thing, as opposed to one that went wrong.
struct Refusal {
  std::string words;
};

using Object = std::unique_ptr<void, int (*)(void *)>;

uint32_t alignment(const void *address) {
  uint32_t bytes = 256; // more is of no use to it
  while (reinterpret_cast<uintptr_t>(address) % bytes)
    bytes /= 2;
  return bytes;
}

} // namespace

struct CublasLt::Functions {
#define FASTFORMER_DECLARE(name) decltype(&::name) name;
  FASTFORMER_CUBLASLT(FASTFORMER_DECLARE)
#undef FASTFORMER_DECLARE

  // Returns the name of the function that `library` lacks, or null.
  const char *load(void *library) {
#define FASTFORMER_LOAD(name)                                                                      \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name));                                  \
  if (name == nullptr)                                                                             \
    return #name;
    FASTFORMER_CUBLASLT(FASTFORMER_LOAD)
#undef FASTFORMER_LOAD
    return nullptr;
  }

  void check(int status, const char *function) const {
    if (status != 0)
      throw Refusal{std::string(function) + ": " + cublasLtGetStatusString(status)};
  }

  template <typename T> void set(const Object &desc, int attribute, T value) const {
    check(cublasLtMatmulDescSetAttribute(desc.get(), attribute, &value, sizeof value),
          "cublasLtMatmulDescSetAttribute");
  }

  template <typename T> void prefer(const Object &preference, int attribute, T value) const {
    check(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
          "cublasLtMatmulPreferenceSetAttribute");
  }

  Object desc() const {
    void *made = nullptr;
    check(cublasLtMatmulDescCreate(&made, kCompute32F, kFloat32), "cublasLtMatmulDescCreate");
    return Object(made, cublasLtMatmulDescDestroy);
  }

  Object layout(bool bf16, int64_t rows, int64_t cols) const {
    void *made = nullptr;
    check(cublasLtMatrixLayoutCreate(&made, bf16 ? kBFloat16 : kFloat16,
                                     static_cast<uint64_t>(rows), static_cast<uint64_t>(cols),
                                     rows),
          "cublasLtMatrixLayoutCreate");
    return Object(made, cublasLtMatrixLayoutDestroy);
  }

  Object preference() const {
    void *made = nullptr;
    check(cublasLtMatmulPreferenceCreate(&made), "cublasLtMatmulPreferenceCreate");
    return Object(made, cublasLtMatmulPreferenceDestroy);
  }
};

CublasLt::CublasLt(const std::vector<std::string> &names) {
  void *library = nullptr;
  for (const std::string &name : names)
    if (library == nullptr)
      library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  for (const std::string &name : names)
    if (library == nullptr && (library = dlopen(name.c_str(), RTLD_LAZY)) == nullptr) {
      const char *error = dlerror();
      missing_ += (missing_.empty() ? "" : "; ") + (error ? std::string(error) : name);
    }
  if (library == nullptr)
    return;
  missing_.clear();
  const auto functions = std::make_shared<Functions>();
  if (const char *lacking = functions->load(library))
    missing_ = std::string("this libcublasLt has no ") + lacking;
  else
    functions_ = functions;
}

std::string CublasLt::description() const {
  if (!functions_)
    return missing_;
  const std::string version = std::to_string(functions_->cublasLtGetVersion());
  const std::lock_guard<std::mutex> lock(mutex_);
  return "cuBLASLt " + version + (refusal_.empty() ? "" : ", which refused " + refusal_);
}

void *CublasLt::handle(int device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  void *&handle = handles_[device];
  if (handle == nullptr)
    functions_->check(functions_->cublasLtCreate(&handle), "cublasLtCreate");
  return handle;
}

bool CublasLt::multiply(const EpilogueProduct &product, int device, void *stream,
                        const std::function<void *(size_t)> &workspace) {
  if (!functions_)
    return false;
  try {
    enqueue(product, device, stream, workspace);
    return true;
  } catch (const Refusal &refusal) {
    const std::lock_guard<std::mutex> lock(mutex_);
    refusal_ = "(" + std::to_string(product.M) + ", " + std::to_string(product.N) + ", " +
               std::to_string(product.K) + ") with epilogue " +
               std::to_string(static_cast<uint32_t>(product.epilogue)) + " (" + refusal.words + ")";
    return false;
  }
}

void CublasLt::enqueue(const EpilogueProduct &p, int device, void *stream,
                       const std::function<void *(size_t)> &workspace) {
  const Functions &lt = *functions_;
  void *const handle = this->handle(device);
  // It counts by columns: what we call a row-major matrix it calls the transpose of one, and the
  // transpose of our product is b^T a^T.
  const Object first = lt.layout(p.bf16, p.b_transposed ? p.K : p.N, p.b_transposed ? p.N : p.K);
  const Object second = lt.layout(p.bf16, p.a_transposed ? p.M : p.K, p.a_transposed ? p.K : p.M);
  const Object out = lt.layout(p.bf16, p.N, p.M);

  const Object desc = lt.desc();
  lt.set<int32_t>(desc, kTransposeA, p.b_transposed);
  lt.set<int32_t>(desc, kTransposeB, p.a_transposed);
  lt.set(desc, kEpilogue, static_cast<uint32_t>(p.epilogue));
  if (p.bias != nullptr)
    lt.set(desc, kBiasPointer, p.bias);
  if (p.aux != nullptr) {
    lt.set(desc, kAuxPointer, p.aux);
    lt.set(desc, kAuxLd, p.N);
  }

  const Object preference = lt.preference();
  lt.prefer(preference, kMaxWorkspace, kMaxWorkspaceBytes);
  lt.prefer(preference, kReductionSchemes, kInComputeType); // parts of sums stay in float32
  lt.prefer(preference, kAlignmentA, alignment(p.b));
  lt.prefer(preference, kAlignmentB, alignment(p.a));
  lt.prefer(preference, kAlignmentC, alignment(p.out));
  lt.prefer(preference, kAlignmentD, alignment(p.out));

  // It keeps what it has found for other calls of the same sizes.
  cublasLtMatmulHeuristicResult best{};
  int found = 0;
  lt.check(lt.cublasLtMatmulAlgoGetHeuristic(handle, desc.get(), first.get(), second.get(),
                                             out.get(), out.get(), preference.get(), 1, &best,
                                             &found),
           "cublasLtMatmulAlgoGetHeuristic");
  lt.check(found > 0 ? best.status : kNotSupported, "cublasLtMatmulAlgoGetHeuristic");

  const float alpha = 1.0f, beta = 0.0f;
  void *const scratch = best.workspace_bytes ? workspace(best.workspace_bytes) : nullptr;
  const int status = lt.cublasLtMatmul(handle, desc.get(), &alpha, p.b, first.get(), p.a,
                                       second.get(), &beta, p.out, out.get(), p.out, out.get(),
                                       &best.algo, scratch, best.workspace_bytes, stream);
  if (status == kInvalidValue || status == kArchMismatch || status == kNotSupported)
    lt.check(status, "cublasLtMatmul");
  if (status != 0)
    throw std::runtime_error(std::string("cublasLtMatmul: ") + lt.cublasLtGetStatusString(status));
}

} // namespace fastformer
