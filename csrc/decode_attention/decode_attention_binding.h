// The arguments of decode_attention, in the order of ops/decode_attention/native.py.
#pragma once

#include "../common/binding.h"
#include "decode_attention.h"

namespace nlhf {

// Addresses of query, keys and values, the caches' strides and the sizes come as a tuple each.
static DecodeAttention read_decode_attention(Arguments& arguments) {
  DecodeAttention p{};
  arguments >> p.dtype;
  arguments.nested() >> p.query >> p.keys.data >> p.values.data;
  for (Cache* cache : {&p.keys, &p.values}) {
    arguments.nested() >> cache->row_stride >> cache->head_stride >> cache->slot_stride;
  }
  arguments >> p.starts >> p.ends >> p.sinks;
  arguments.nested() >> p.rows >> p.heads >> p.kv_heads >> p.positions >> p.dim >> p.value_dim >> p.window;
  arguments >> p.scale >> p.softcap >> p.out;
  require(p.rows >= 0 && p.heads >= 1 && p.kv_heads >= 1 && p.positions >= 1 && p.dim >= 1 && p.value_dim >= 0 &&
              p.window >= 1,
          "decode_attention: sizes: expected at least one of each");
  require(p.heads % p.kv_heads == 0, "decode_attention: heads: expected a multiple of kv_heads");
  require(p.rows == 0 || (p.query && p.keys.data && p.ends), "decode_attention: expected addresses");
  require(p.rows == 0 || p.value_dim == 0 || (p.values.data && p.out), "decode_attention: expected addresses");
  return p;
}

}  // namespace nlhf
