// One tile of a row for logprobs on the CPU: logits as float32 scores, their mixture, and the store of gradients.
//
// A tile stays in the first-level cache between the passes over it. Every loop runs over whole blocks of vectors: the
// end of a row is copied and padded with -inf, which changes no maximum and no sum.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/half.h"
#include "../common/simd_float.h"
#include "logprobs.h"

namespace nlhf {
namespace NLHF_LEVEL {

constexpr int64_t kTile = 2048;
constexpr int64_t kBlock = 64;  // tiles are padded to whole blocks

// One row of a model: its logits, and the scale and softcap that turn them into scores.
struct ScoreRow {
  const char* data;
  DType dtype;
  float scale, softcap;
};

// One tile of a row's scores, or of the mixture's.
struct ScoreTile {
  const float* scores;  // padded to whole blocks
  int64_t count;
  const char* ahead;  // the logits one tile ahead, to prefetch; at a row's end the next row's
  int64_t bytes;      // of a logit there; 0: nothing to prefetch
};

static inline ScoreRow score_row(const ModelLogits& model, int64_t row) {
  const char* data = static_cast<const char*>(model.data) + row * model.row_stride * bytes_of(model.dtype);
  return {data, model.dtype, model.scale, model.softcap};
}

static inline int64_t padded(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

static inline void pad(float* tile, int64_t count) {
  for (int64_t i = count; i < padded(count); ++i) tile[i] = -INFINITY;
}

// tanh(|u|) = -m / (2 + m), m = exp(-2 |u|) - 1.
static inline Floats tanh(Floats u) {
  const Words sign = (Words)u & 0x80000000u;
  const Floats m = expm1_nonpositive((Floats)((Words)u ^ sign) * -2.0f);
  return (Floats)((Words)(-m / (2.0f + m)) | sign);
}

// Return scores of logits (equation 1), rounded, so that an element alone and within its tile gives the same bits.
static inline Floats transformed(Floats x, const ScoreRow& row) {
  return rounded(row.softcap == 0 ? x * row.scale : tanh(x * (row.scale / row.softcap)) * row.softcap);
}

static inline Floats mixed(Floats u, Floats v, float beta) { return rounded((1 - beta) * u) + rounded(beta * v); }

// Copy elements [first, first + count) as float32.
static inline void copy_logits(const ScoreRow& row, int64_t first, int64_t count, float* to) {
  const char* from = row.data + first * bytes_of(row.dtype);
  const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
  switch (row.dtype) {
    case DType::f32: std::memcpy(to, from, count * sizeof(float)); break;
    case DType::bf16:
      for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(half[i]);
      break;
    case DType::f16:
      for (int64_t i = 0; i < count; ++i) to[i] = f16_to_float(half[i]);
      break;
  }
}

// Return the tile's scores: in place where the logits already are float32 scores, else in `scratch`.
static inline ScoreTile load_scores(const ScoreRow& row, int64_t first, int64_t count, float* scratch) {
  const int64_t bytes = bytes_of(row.dtype);
  ScoreTile tile{scratch, count, row.data + (first + kTile) * bytes, bytes};
  const bool plain = row.scale == 1 && row.softcap == 0;
  if (plain && row.dtype == DType::f32 && count % kBlock == 0) {
    tile.scores = reinterpret_cast<const float*>(row.data) + first;
    return tile;
  }
  copy_logits(row, first, count, scratch);
  if (!plain) {
    for (int64_t i = 0; i < padded(count); i += kLanes) store(scratch + i, transformed(load(scratch + i), row));
  }
  pad(scratch, count);
  return tile;
}

static inline float score_at(const ScoreRow& row, int64_t index) {
  float logit;
  copy_logits(row, index, 1, &logit);
  return row.scale == 1 && row.softcap == 0 ? logit : transformed(broadcast(logit), row)[0];
}

// Return (1 - beta) u + beta v. At beta 0 and 1 one side is not read: 0 * -inf is NaN.
static inline ScoreTile load_mixture(const ScoreTile& u, const ScoreTile& v, float beta, float* scratch) {
  if (beta == 0 || beta == 1) return {beta == 0 ? u.scores : v.scores, u.count, nullptr, 0};
  for (int64_t i = 0; i < padded(u.count); i += kLanes) {
    store(scratch + i, mixed(load(u.scores + i), load(v.scores + i), beta));
  }
  pad(scratch, u.count);
  return {scratch, u.count, nullptr, 0};
}

static inline float mixture_at(float u, float v, float beta) {
  return beta == 0 ? u : beta == 1 ? v : mixed(broadcast(u), broadcast(v), beta)[0];
}

// Prefetch the cache line of the logits that lie one tile ahead of the vector at `i`.
static inline void fetch_ahead(const ScoreTile& tile, int64_t i) {
  if (tile.bytes != 0) __builtin_prefetch(tile.ahead + i * tile.bytes);
}

// Return the largest score that is not NaN; -inf where there is none.
static inline float maximum(const ScoreTile& tile) {
  Floats best = broadcast(-INFINITY);
  for (int64_t i = 0; i < padded(tile.count); i += kLanes) best = larger(load(tile.scores + i), best);
  return largest_lane(best);
}

// Store `count` gradients in the policy's dtype, possibly over the logits that they belong to.
static inline void store_gradients(const float* gradients, int64_t count, DType dtype, char* to) {
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  switch (dtype) {
    case DType::f32: {
      float* out = reinterpret_cast<float*>(to);
      int64_t i = 0;  // not memcpy, which at this length is slower into uncached memory
      for (; i + kLanes <= count; i += kLanes) store(out + i, load(gradients + i));
      for (; i < count; ++i) out[i] = gradients[i];
      break;
    }
    case DType::bf16:
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_bf16(gradients[i]);
      break;
    case DType::f16:
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_f16(gradients[i]);
      break;
  }
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
