// The arguments of decode_attention as they come from Python (ops/decode_attention/native.py).
#pragma once

#include <array>

#include "../common/binding.h"
#include "decode_attention.h"

namespace nlhf {

static DecodeAttention decode_attention_problem(int dtype, const std::array<std::uintptr_t, 3>& tensors,
                                                const std::array<int64_t, 3>& key_strides,
                                                const std::array<int64_t, 3>& value_strides, std::uintptr_t starts,
                                                std::uintptr_t ends, std::uintptr_t sinks,
                                                const std::array<int64_t, 7>& sizes, float scale, float softcap,
                                                std::uintptr_t out) {
  const auto data = [&](int index) { return reinterpret_cast<const void*>(tensors[index]); };
  require(dtype >= 0 && dtype <= 2, "decode_attention: dtype: expected 0, 1 or 2");
  const auto [rows, heads, kv_heads, positions, dim, value_dim, window] = sizes;
  require(rows >= 0 && heads >= 1 && kv_heads >= 1 && positions >= 1 && dim >= 1 && value_dim >= 0 && window >= 1,
          "decode_attention: sizes: expected at least one of each");
  require(heads % kv_heads == 0, "decode_attention: heads: expected a multiple of kv_heads");
  require(rows == 0 || (tensors[0] != 0 && tensors[1] != 0 && ends != 0), "decode_attention: expected addresses");
  require(rows == 0 || value_dim == 0 || (tensors[2] != 0 && out != 0), "decode_attention: expected addresses");
  DecodeAttention problem{};
  problem.dtype = static_cast<CacheDtype>(dtype);
  problem.query = data(0);
  problem.keys = {data(1), key_strides[0], key_strides[1], key_strides[2]};
  problem.values = {data(2), value_strides[0], value_strides[1], value_strides[2]};
  problem.starts = reinterpret_cast<const int64_t*>(starts);
  problem.ends = reinterpret_cast<const int64_t*>(ends);
  problem.sinks = reinterpret_cast<const float*>(sinks);
  problem.rows = rows;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.positions = positions;
  problem.dim = dim;
  problem.value_dim = value_dim;
  problem.window = window;
  problem.scale = scale;
  problem.softcap = softcap;
  problem.out = reinterpret_cast<float*>(out);
  return problem;
}

}  // namespace nlhf
