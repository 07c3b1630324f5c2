// decode_attention: one new token a row over a preallocated key/value cache, grouped queries. See
// nlhf_kernels/ops/decode_attention.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace nlhf {

struct Cache {
  const void* data;  // (rows, kv_heads, positions, dim), the last dimension contiguous
  int64_t row_stride, head_stride, slot_stride;  // in elements
};

struct DecodeAttention {
  DType dtype;     // of query, keys and values
  const void* query;    // (rows, heads, dim)
  Cache keys, values;
  const int64_t* starts;  // (rows), or null: all 0
  const int64_t* ends;    // (rows)
  const float* sinks;     // (heads), or null
  int64_t rows, heads, kv_heads, positions, dim, value_dim;
  int64_t window;  // a row reads at most this many positions before its end
  float scale, softcap;  // softcap 0: none
  float* out;  // (rows, heads, value_dim)
};

NLHF_DECLARE_CPU(decode_attention, DecodeAttention)

}  // namespace nlhf
