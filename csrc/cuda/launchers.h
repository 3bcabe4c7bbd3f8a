// The plain C interface between bindings.cpp and the CUDA kernels. No torch header on this side, so
// a .cu file compiles in seconds and its object is the same for every torch.
//
// A launcher enqueues on `stream`, allocates nothing (but for layer_norm_bwd, once for a stream,
// its counters), never synchronises, and returns a cudaError_t (0 is success) that
// fastformer_cuda_error puts in words.
#pragma once
#include <cstdint>

typedef struct CUstream_st *fastformer_stream; // cudaStream_t

extern "C" {

const char *fastformer_cuda_error(int error);
int fastformer_cuda_runtime_version();

// keep: rows * cols bytes. rng: (seed, offset) on the device.
int fastformer_dropout_mask(bool *keep, const int64_t *rng, int64_t rows, int64_t cols,
                            int64_t site, uint32_t threshold, fastformer_stream stream);

enum fastformer_dtype { FASTFORMER_FLOAT32, FASTFORMER_BFLOAT16, FASTFORMER_FLOAT16 };

// Matrices are (N, C) and contiguous, of the types named; the other floats are float32. Of dropout:
// rng (seed, offset) on the device, null where nothing is dropped; scale is that of kept elements.
struct fastformer_layer_norm_fwd_args {
  const void *x;              // the branch that is added to the residual; null without addition
  const void *residual;       // the rows to be normalised, where nothing is added
  const float *weight, *bias; // bias may be null
  void *new_residual, *normed;
  float *mean, *rstd;
  const int64_t *rng;
  int64_t N, C, site;
  float eps, scale;
  uint32_t threshold;
  int x_type, residual_type, normed_type; // without addition x_type is that of residual
};

struct fastformer_layer_norm_bwd_args {
  const void *grad_normed, *grad_new_residual; // the latter may be null
  const void *rows;                            // what was normalised
  const float *weight, *mean, *rstd;
  void *grad_x; // null without addition
  void *grad_rows, *grad_weight, *grad_bias;
  float *sums; // fastformer_layer_norm_scratch(N, C) of them
  const int64_t *rng;
  int64_t N, C, site;
  float scale;
  uint32_t threshold;
  int x_type, residual_type, normed_type, weight_type;
};

// Whether there are kernels for these types (fastformer_dtype).
int fastformer_layer_norm_takes(int x, int residual, int normed);
int64_t fastformer_layer_norm_max_cols();
int64_t fastformer_layer_norm_scratch(int64_t N, int64_t C);
int fastformer_layer_norm_fwd(const fastformer_layer_norm_fwd_args *args, fastformer_stream stream);
int fastformer_layer_norm_bwd(const fastformer_layer_norm_bwd_args *args, fastformer_stream stream);

// In elements, those of sequences, tokens and heads; the elements of a head lie side by side.
struct fastformer_strides {
  int64_t b, t, h;
};

// Attention from at most kDecodeMaxQueries queries, see cuda/attention_decode.h: q (B, T, H, D),
// k and v (B, S, H, D), all at addresses and strides of whole 16 bytes; out (B, T, H, D) and lse
// (B, H, T), contiguous.
struct fastformer_attention_decode_args {
  const void *q, *k, *v;
  const int32_t *key_lengths; // (B,), or null
  void *out;
  float *lse;
  float *scratch; // decode_scratch() elements, unused where that is 0
  fastformer_strides of_q, of_k, of_v;
  int64_t B, T, S, H, D;
  float scale;
  int causal, type; // of q, k, v and out
};

int fastformer_attention_decode(const fastformer_attention_decode_args *args,
                                fastformer_stream stream);

// Matrices are (N, F) and contiguous, of the type named; dropout is as above.
struct fastformer_gelu_fwd_args {
  const void *pre;
  void *hidden;
  const int64_t *rng;
  int64_t N, F, site;
  float scale;
  uint32_t threshold;
  int type, tanh;
};

struct fastformer_gelu_bwd_args {
  const void *pre;
  void *grad; // of hidden on entry, of pre on return
  void *hidden, *grad_bias;
  float *sums; // scratch: fastformer_mlp_sum_rows(N) * F
  const int64_t *rng;
  int64_t N, F, site;
  float scale;
  uint32_t threshold;
  int type, tanh;
};

struct fastformer_column_sums_args {
  const void *rows;
  void *out;
  float *sums; // as above
  int64_t N, F;
  int type;
};

int64_t fastformer_mlp_sum_rows(int64_t N);
int fastformer_gelu_fwd(const fastformer_gelu_fwd_args *args, fastformer_stream stream);
int fastformer_gelu_bwd(const fastformer_gelu_bwd_args *args, fastformer_stream stream);
int fastformer_column_sums(const fastformer_column_sums_args *args, fastformer_stream stream);

// Rows of D elements side by side: (B, tokens, H, D), or packed (tokens, H, D). Strides count
// elements; they are multiples of 8, that of tokens less than 2**31, and `data` is one of 16 bytes.
struct fastformer_attention_rows {
  void *data;
  int64_t batch_stride, token_stride, head_stride;
};

struct fastformer_dropout {
  const int64_t *rng; // null where nothing is dropped; then scale is 1
  int64_t site;
  float scale;
  uint32_t threshold;
};

// One call of attention, forward or backward, in bfloat16 or float16.
struct fastformer_attention_args {
  fastformer_attention_rows q, k, v, out;
  fastformer_attention_rows grad_out, grad_q, grad_k, grad_v; // of backward
  float *lse;  // (B, H, T), or (H, N) of packed sequences
  float *sums; // scratch of backward: fastformer_attention_bwd_sums floats
  const int32_t *key_lengths, *cu_seqlens_q, *cu_seqlens_k; // the latter of packed sequences
  fastformer_dropout dropout;
  int64_t B, H, N; // N: query tokens of packed sequences
  int32_t T, S, D; // T, S: of the longest sequence
  int32_t causal, type;
  float scale;
};

int64_t fastformer_attention_bwd_sums(int64_t heads, int64_t T, int64_t S, int64_t D);
int fastformer_attention_fwd(const fastformer_attention_args *args, fastformer_stream stream);
int fastformer_attention_bwd(const fastformer_attention_args *args, fastformer_stream stream);
}
