// What only tests ask of the C++ code: how kernels are launched. A submodule for each header, and a
// function here that fills it; the headers need neither torch nor CUDA.
#include "cuda/attention.h"
#include "cuda/attention_decode.h"
#include "cuda/layer_norm.h"
#include "cuda/mlp.h"

#include <pybind11/pybind11.h>

namespace {

namespace py = pybind11;
using namespace fastformer;

void bind_attention(py::module_ m) {
  m.def("fwd_launch", &attention_fwd_launch);
  m.def("bwd_launch", &attention_bwd_launch);
  m.def("bwd_sums", &attention_bwd_sums);
  m.def("chunk", &attention_chunk);
  py::class_<AttentionLaunch>(m, "Launch")
      .def_readonly("dim", &AttentionLaunch::dim)
      .def_readonly("threads", &AttentionLaunch::threads)
      .def_readonly("blocks", &AttentionLaunch::blocks)
      .def_readonly("shared_bytes", &AttentionLaunch::shared_bytes);
}

void bind_attention_decode(py::module_ m) {
  m.attr("max_queries") = kDecodeMaxQueries;
  m.def("launch", &decode_launch);
  m.def("scratch", &decode_scratch);
  py::class_<DecodeLaunch>(m, "Launch")
      .def_readonly("lanes", &DecodeLaunch::lanes)
      .def_readonly("queries", &DecodeLaunch::queries)
      .def_readonly("threads", &DecodeLaunch::threads)
      .def_readonly("chunk", &DecodeLaunch::chunk)
      .def_readonly("chunks", &DecodeLaunch::chunks)
      .def_readonly("blocks", &DecodeLaunch::blocks)
      .def_readonly("merge_blocks", &DecodeLaunch::merge_blocks);
}

void bind_layer_norm(py::module_ m) {
  m.attr("max_cols") = kLayerNormMaxCols;
  m.def("launch", [](int64_t N, int64_t C, bool has_16_bit, uint64_t address_bits, bool backward) {
    const LayerNormLaunch launch = layer_norm_launch(N, C, has_16_bit, address_bits, backward);
    return py::make_tuple(launch.mode, launch.threads, launch.blocks);
  });
}

void bind_mlp(py::module_ m) {
  m.attr("max_sums") = kMlpMaxSums;
  m.def("launch", &mlp_launch);
  py::class_<MlpLaunch>(m, "Launch")
      .def_readonly("wide", &MlpLaunch::wide)
      .def_readonly("rows_per_block", &MlpLaunch::rows_per_block)
      .def_readonly("row_blocks", &MlpLaunch::row_blocks)
      .def_readonly("blocks", &MlpLaunch::blocks);
}

} // namespace

PYBIND11_MODULE(native, m) {
  bind_attention(m.def_submodule("attention"));
  bind_attention_decode(m.def_submodule("attention_decode"));
  bind_layer_norm(m.def_submodule("layer_norm"));
  bind_mlp(m.def_submodule("mlp"));
}
