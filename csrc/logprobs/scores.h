// One tile of a row for logprobs on the CPU: logits as float32 scores, their mixture, and gradients on their way out.
//
// A tile stays in the first-level cache between the passes over it. Every loop runs over whole blocks of vectors: the
// end of a row is copied and padded with -inf, which no maximum and no sum sees.
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

// One row of a model: its logits and what makes scores of them.
struct ScoreRow {
  const char* data;
  LogitType type;
  float scale, softcap;
};

static inline int64_t bytes_of(LogitType type) { return type == LogitType::f32 ? 4 : 2; }

static inline ScoreRow score_row(const ModelLogits& model, int64_t row) {
  const char* data = static_cast<const char*>(model.data) + row * model.row_stride * bytes_of(model.type);
  return {data, model.type, model.scale, model.softcap};
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

// A score from a logit (equation 1). Rounded, so that one element alone gives what it gives among its tile.
static inline Floats transformed(Floats x, const ScoreRow& row) {
  return rounded(row.softcap == 0 ? x * row.scale : tanh(x * (row.scale / row.softcap)) * row.softcap);
}

static inline Floats mixed(Floats u, Floats v, float beta) { return rounded((1 - beta) * u) + rounded(beta * v); }

// Elements [first, first + count) as float32.
static inline void copy_logits(const ScoreRow& row, int64_t first, int64_t count, float* to) {
  const char* from = row.data + first * bytes_of(row.type);
  const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
  switch (row.type) {
    case LogitType::f32: std::memcpy(to, from, count * sizeof(float)); break;
    case LogitType::bf16:
      for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(half[i]);
      break;
    case LogitType::f16:
      for (int64_t i = 0; i < count; ++i) to[i] = f16_to_float(half[i]);
      break;
  }
}

// The tile's scores, padded to whole blocks: where the logits stand if that is what they are.
static inline const float* load_scores(const ScoreRow& row, int64_t first, int64_t count, float* scratch) {
  const bool plain = row.scale == 1 && row.softcap == 0;
  if (plain && row.type == LogitType::f32 && count % kBlock == 0) {
    return reinterpret_cast<const float*>(row.data) + first;
  }
  copy_logits(row, first, count, scratch);
  if (!plain) {
    for (int64_t i = 0; i < padded(count); i += kLanes) store(scratch + i, transformed(load(scratch + i), row));
  }
  pad(scratch, count);
  return scratch;
}

static inline float score_at(const ScoreRow& row, int64_t index) {
  float logit;
  copy_logits(row, index, 1, &logit);
  return row.scale == 1 && row.softcap == 0 ? logit : transformed(broadcast(logit), row)[0];
}

// (1 - beta) u + beta v; an end of the interval must not touch the other side: 0 * -inf is NaN.
static inline const float* load_mixture(const float* u, const float* v, float beta, int64_t count, float* scratch) {
  if (beta == 0 || beta == 1) return beta == 0 ? u : v;
  for (int64_t i = 0; i < padded(count); i += kLanes) store(scratch + i, mixed(load(u + i), load(v + i), beta));
  pad(scratch, count);
  return scratch;
}

static inline float mixture_at(float u, float v, float beta) {
  return beta == 0 ? u : beta == 1 ? v : mixed(broadcast(u), broadcast(v), beta)[0];
}

// The largest that is not NaN; -inf where there is none.
static inline float maximum(const float* x, int64_t count) {
  constexpr int kChains = 4;
  Floats best[kChains];
  for (Floats& lanes : best) lanes = broadcast(-INFINITY);
  for (int64_t i = 0; i < padded(count); i += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) best[chain] = larger(load(x + i + chain * kLanes), best[chain]);
  }
  return largest_lane(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

// `count` gradients in the policy's type. `half` is room for them.
static inline void store_gradients(const float* gradients, int64_t count, LogitType type, uint16_t* half, char* to) {
  if (type == LogitType::f32) {
    std::memcpy(to, gradients, count * sizeof(float));
    return;
  }
  if (type == LogitType::bf16) {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_bf16(gradients[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_f16(gradients[i]);
  }
  std::memcpy(to, half, count * sizeof(uint16_t));
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
