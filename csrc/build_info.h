// What the build knew: facts that change with every build live in one small source, so that an edit
// of a kernel does not recompile the bindings.
#pragma once

namespace fastformer {

// "key=value" lines: version, source (hash of csrc/), cuda_archs.
extern const char *const kBuildFacts;

} // namespace fastformer
