// The arguments of decode_attention as they come from Python (ops/decode_attention/native.py).
#pragma once

#include <array>

#include "decode_attention.h"

namespace nlhf {

static DecodeAttention decode_attention_problem(int dtype, const std::array<std::uintptr_t, 3>& tensors,
                                                const std::array<int64_t, 3>& key_strides,
                                                const std::array<int64_t, 3>& value_strides, std::uintptr_t starts,
                                                std::uintptr_t ends, std::uintptr_t sinks,
                                                const std::array<int64_t, 7>& sizes, float scale, float softcap,
                                                std::uintptr_t out) {
  const auto data = [&](int index) { return reinterpret_cast<const void*>(tensors[index]); };
  DecodeAttention problem{};
  problem.dtype = static_cast<CacheDtype>(dtype);
  problem.query = data(0);
  problem.keys = {data(1), key_strides[0], key_strides[1], key_strides[2]};
  problem.values = {data(2), value_strides[0], value_strides[1], value_strides[2]};
  problem.starts = reinterpret_cast<const int64_t*>(starts);
  problem.ends = reinterpret_cast<const int64_t*>(ends);
  problem.sinks = reinterpret_cast<const float*>(sinks);
  problem.rows = sizes[0];
  problem.heads = sizes[1];
  problem.kv_heads = sizes[2];
  problem.positions = sizes[3];
  problem.dim = sizes[4];
  problem.value_dim = sizes[5];
  problem.window = sizes[6];
  problem.scale = scale;
  problem.softcap = softcap;
  problem.out = reinterpret_cast<float*>(out);
  return problem;
}

}  // namespace nlhf
