// One tile of a row for mixture_sample on the CPU: logits as float32, their mixture z, maxima, sums of exponentials.
//
// A tile stays in the first-level cache between the pass that finds the maxima and the passes that sum. Every loop
// runs over whole blocks of vectors: the end of a row is copied and padded with -inf, which changes no maximum or sum.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../common/half.h"
#include "../common/simd_float.h"
#include "mixture_sample.h"

namespace nlhf {
namespace NLHF_LEVEL {

constexpr int64_t kTile = 2048;
constexpr int64_t kBlock = 64;     // tiles are padded to whole blocks
constexpr int kBias = kMaxModels;  // the bias is mixed like a model
constexpr int kMaxTerms = kMaxModels + 1;
constexpr int kMixture = kMaxModels;  // the index of z's statistics, after those of the models
constexpr int kSeries = kMaxModels + 1;

// One row of a model, or of the bias.
struct Source {
  const void* data;
  DType dtype;
};

struct Term {
  const float* x;
  float weight;
};

// A thread's memory: converted or padded tiles, the mixture, and exponentials.
struct TileScratch {
  float inputs[kMaxTerms][kTile];
  float z[kTile];
  float exponentials[kTile];
};

static inline int64_t tiles_of(int64_t vocabulary) { return (vocabulary + kTile - 1) / kTile; }

// Return the number of elements of the tile that begins at `first`.
static inline int64_t tile_length(int64_t vocabulary, int64_t first) {
  return vocabulary - first < kTile ? vocabulary - first : kTile;
}

static inline int64_t padded(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

static inline float element(const Source& source, int64_t index) {
  switch (source.dtype) {
    case DType::bf16: return bf16_to_float(static_cast<const uint16_t*>(source.data)[index]);
    case DType::f16: return f16_to_float(static_cast<const uint16_t*>(source.data)[index]);
    default: return static_cast<const float*>(source.data)[index];
  }
}

// Return elements [first, first + count) as float32, padded to whole blocks: in place where they have that form.
static inline const float* load_tile(const Source& source, int64_t first, int64_t count, float* scratch) {
  const bool is_float = source.dtype == DType::f32;
  if (is_float && count % kBlock == 0) return static_cast<const float*>(source.data) + first;
  if (is_float) {
    std::memcpy(scratch, static_cast<const float*>(source.data) + first, count * sizeof(float));
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(source.data) + first;
    if (source.dtype == DType::bf16) {
      for (int64_t i = 0; i < count; ++i) scratch[i] = bf16_to_float(half[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) scratch[i] = f16_to_float(half[i]);
    }
  }
  for (int64_t i = count; i < padded(count); ++i) scratch[i] = -INFINITY;
  return scratch;
}

// Return the largest value that is not NaN; -inf where there is none.
static inline float maximum(const float* x, int64_t count) {
  constexpr int kChains = 4;
  Floats best[kChains];
  for (Floats& lanes : best) lanes = broadcast(-INFINITY);
  for (int64_t i = 0; i < count; i += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) best[chain] = larger(load(x + i + chain * kLanes), best[chain]);
  }
  return largest_lane(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

// Compute z = (sum of weight * x over the terms) / temperature, every product and sum rounded as in the oracle, and
// maxima of the terms, then of z. (1)
template <int kTerms, bool kDivide>
static void mix(const Term* terms, float temperature, int64_t count, float* z, float* maxima) {
  constexpr int kChains = 2;
  const float inverse = 1 / temperature;
  const Floats scale = broadcast(kDivide ? temperature : inverse < FLT_MAX ? inverse : FLT_MAX);  // 0 * inf is NaN
  Floats best[kTerms + 1][kChains], weights[kTerms + 1];
  for (auto& chains : best) {
    for (Floats& lanes : chains) lanes = broadcast(-INFINITY);
  }
  for (int term = 0; term < kTerms; ++term) weights[term] = broadcast(terms[term].weight);
  for (int64_t i = 0; i < count; i += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) {
      Floats sum{};
      for (int term = 0; term < kTerms; ++term) {
        const Floats x = load(terms[term].x + i + chain * kLanes);
        best[term][chain] = larger(x, best[term][chain]);
        const Floats product = rounded(weights[term] * x);
        sum = term == 0 ? product : sum + product;
      }
      sum = kDivide ? sum / scale : sum * scale;
      best[kTerms][chain] = larger(sum, best[kTerms][chain]);
      store(z + i + chain * kLanes, sum);
    }
  }
  for (int term = 0; term <= kTerms; ++term) maxima[term] = largest_lane(larger(best[term][0], best[term][1]));
}

template <bool kDivide>
static void mix(int count_of_terms, const Term* terms, float temperature, int64_t count, float* z, float* maxima) {
  switch (count_of_terms) {
    case 0: return mix<0, kDivide>(terms, temperature, count, z, maxima);
    case 1: return mix<1, kDivide>(terms, temperature, count, z, maxima);
    case 2: return mix<2, kDivide>(terms, temperature, count, z, maxima);
    case 3: return mix<3, kDivide>(terms, temperature, count, z, maxima);
    case 4: return mix<4, kDivide>(terms, temperature, count, z, maxima);
    default: return mix<5, kDivide>(terms, temperature, count, z, maxima);
  }
}

// Return the base of exponentials: the maximum, or 0 where there is none, as -inf - -inf is NaN.
static inline float finite_base(float top) { return top == -INFINITY ? 0.0f : top; }

// Return the sum of exp(x - base). A lane sums 8 floats before it adds to a double, so that a token far below the
// largest still counts; the next tile's cache lines are prefetched meanwhile.
static inline double sum_of_exponentials(const float* x, float base, int64_t count, const char* ahead,
                                         int64_t bytes_ahead) {
  constexpr int kChains = 4, kLinks = 8;
  constexpr int64_t kStep = kChains * kLanes;
  const Floats top = broadcast(base);
  double totals[kLanes] = {};
  for (int64_t first = 0; first < count; first += kLinks * kStep) {
    const int64_t end = count < first + kLinks * kStep ? count : first + kLinks * kStep;
    Floats sums[kChains] = {};
    for (int64_t i = first; i < end; i += kStep) {
      for (int chain = 0; chain < kChains; ++chain) {
        sums[chain] += exp_nonpositive(load(x + i + chain * kLanes) - top);
      }
      for (int64_t byte = 0; byte < bytes_ahead * kStep; byte += 64) __builtin_prefetch(ahead + i * bytes_ahead + byte);
    }
    add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]), totals);
  }
  return sum_of_lanes(totals);
}

// Return the first of `count` values at which the running sum of exp(z - base) exceeds `residual`; else the last whose
// exponential is not 0. By blocks first: one chain of additions would take microseconds.
static inline int64_t walk(const float* z, float base, int64_t count, double residual, float* exponentials) {
  const Floats top = broadcast(base);
  for (int64_t i = 0; i < count; i += kLanes) store(exponentials + i, exp_nonpositive(load(z + i) - top));
  double passed = 0;
  int64_t last = 0;
  for (int64_t block = 0; block < count; block += kBlock) {
    double sums[8] = {};
    for (int64_t i = 0; i < kBlock; ++i) sums[i % 8] += exponentials[block + i];
    const double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    if (!(sum > 0)) continue;
    const bool here = passed + sum > residual;
    double running = passed;
    for (int64_t v = block; here && v < block + kBlock; ++v) {
      running += exponentials[v];
      if (exponentials[v] > 0) last = v;
      if (running > residual && exponentials[v] > 0) return v;
    }
    if (here) return last;
    passed += sum;
    last = block;
  }
  for (int64_t v = last; v < count; ++v) {
    if (exponentials[v] > 0) last = v;
  }
  return last;
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
