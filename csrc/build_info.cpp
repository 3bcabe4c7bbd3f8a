#include "build_info.h"

namespace fastformer {

const char *const kBuildFacts = "version=" FASTFORMER_VERSION "\nsource=" FASTFORMER_SOURCE
                                "\ncuda_archs=" FASTFORMER_CUDA_ARCHS;

} // namespace fastformer
