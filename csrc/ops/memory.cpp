#include "ops/memory.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastformer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kSmallest = size_t{1} << 18, kHugePage = size_t{1} << 21;

// Sizes are rounded up to an eighth of their power of two, so that a block fits its next tensor
// although a batch is a little larger or smaller.
size_t rounded(size_t bytes) {
  size_t step = kSmallest / 8;
  while (bytes > step * 16)
    step *= 2;
  return (bytes + step - 1) / step * step;
}

class Blocks {
public:
  static Blocks &get() {
    static Blocks *const blocks = new Blocks; // tensors may die after static objects do
    return *blocks;
  }

  bool keeps(size_t bytes) const { return enabled_ && bytes >= kSmallest; }

  void *take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto found = idle_.find(size);
      if (found != idle_.end() && !found->second.empty()) {
        void *block = found->second.back();
        found->second.pop_back();
        return block;
      }
    }
    void *block = allocate(size);
    if (block == nullptr && release() > 0)
      block = allocate(size);
    STD_TORCH_CHECK(block != nullptr, "fastformer: out of memory for ", size, " bytes");
    return block;
  }

  void give_back(void *block, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_[size].push_back(block);
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t bytes = 0;
    for (auto &[size, blocks] : idle_)
      for (void *block : blocks) {
        std::free(block);
        bytes += static_cast<int64_t>(size);
      }
    idle_.clear();
    return bytes;
  }

private:
  Blocks() {
    const char *setting = std::getenv("FASTFORMER_CPU_CACHE");
    enabled_ = setting == nullptr || std::strcmp(setting, "0") != 0;
  }

  static void *allocate(size_t size) {
    if (size < kHugePage)
      return std::aligned_alloc(64, size);
    const size_t whole = (size + kHugePage - 1) / kHugePage * kHugePage;
    void *block = std::aligned_alloc(kHugePage, whole);
#ifdef MADV_HUGEPAGE
    if (block != nullptr)
      madvise(block, size / kHugePage * kHugePage, MADV_HUGEPAGE); // fewer faults, fewer TLB misses
#endif
    return block;
  }

  bool enabled_;
  std::mutex mutex_;
  std::map<size_t, std::vector<void *>> idle_;
};

size_t item_size(ScalarType dtype) {
  switch (dtype) {
  case ScalarType::Float:
  case ScalarType::Int:
    return 4;
  case ScalarType::BFloat16:
    return 2;
  case ScalarType::Bool:
  case ScalarType::Byte:
    return 1;
  default:
    return 0; // not one of ours
  }
}

// Tests set it, to find memory that is read before it is written: every byte 255 is NaN in every
// floating type.
bool poisons() {
  static const bool set = std::getenv("FASTFORMER_POISON") != nullptr;
  return set;
}

} // namespace

Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  size_t count = 1;
  for (const int64_t size : sizes)
    count *= static_cast<size_t>(size);
  const size_t bytes = count * item_size(dtype);
  Blocks &blocks = Blocks::get();
  if (!blocks.keeps(bytes))
    return torch::stable::empty(sizes, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i)
    strides[i - 1] = strides[i] * sizes[i];
  const size_t size = rounded(bytes);
  void *block = blocks.take(size);
  if (poisons())
    std::memset(block, 0xff, bytes);
  return torch::stable::from_blob(block, sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [size](void *data) { Blocks::get().give_back(data, size); });
}

int64_t release_memory() { return Blocks::get().release(); }

} // namespace fastformer
