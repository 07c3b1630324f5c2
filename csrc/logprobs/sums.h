// The sums of a row for logprobs on the CPU: exponentials relative to the largest score so far, and what entropy and KL
// need beside them. A tile is summed relative to the largest score before it; only where it exceeds that by far is it
// summed again.
#pragma once

#include <cmath>
#include <cstdint>

#include "scores.h"

namespace nlhf {
namespace NLHF_LEVEL {

// Sum of exp((score - top) / temperature) over the tiles so far.
struct Series {
  float top = -INFINITY;
  double sum = 0;
};

// The sums of a row. With a = (policy's score - top) / temperature and b the reference's:
struct RowSums {
  Series policy, reference, mixture;
  double moment = 0;  // sum of exp(a) a
  double gap = 0;     // sum of exp(a) (a - b): one sum, as both halves may be large where their difference is small
};

// Return the base of exponentials: the maximum, or 0 where there is none, as -inf - -inf is NaN.
static float finite_base(float top) { return top == -INFINITY ? 0.0f : top; }

// Raise the series' maximum to `top` if that is larger. Return (old top - new top) / temperature, 0 for an empty
// series.
static double raise(Series& series, float top, double temperature) {
  const float before = series.top;
  if (!(top > before)) return 0;
  series.top = top;
  if (before == -INFINITY) return 0;
  const double shift = (static_cast<double>(before) - top) / temperature;
  series.sum *= std::exp(shift);
  return shift;
}

// A lane sums this many floats before it adds to a double, so that a token far below the largest still counts.
constexpr int kLinks = 8;

struct TileSum {
  float top;   // of the tile
  double sum;  // relative to the caller's base
};

static TileSum sum_of_exponentials(const ScoreTile& tile, float base, float inverse) {
  constexpr int kChains = 4;
  constexpr int64_t kStep = kChains * kLanes;
  const int64_t count = padded(tile.count);
  const Floats bases = broadcast(base);
  double totals[kLanes] = {};
  Floats best[kChains];
  for (Floats& lanes : best) lanes = broadcast(-INFINITY);
  for (int64_t first = 0; first < count; first += kLinks * kStep) {
    const int64_t end = count < first + kLinks * kStep ? count : first + kLinks * kStep;
    Floats sums[kChains] = {};
    for (int64_t i = first; i < end; i += kStep) {
      for (int chain = 0; chain < kChains; ++chain) {
        fetch_ahead(tile, i + chain * kLanes);
        const Floats x = load(tile.scores + i + chain * kLanes);
        best[chain] = larger(x, best[chain]);
        sums[chain] += exp_nonpositive((x - bases) * inverse);
      }
    }
    add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]), totals);
  }
  return {largest_lane(larger(larger(best[0], best[1]), larger(best[2], best[3]))), sum_of_lanes(totals)};
}

// Return whether exponentials relative to `top` are too large, or undefined, for a tile of maximum `tile_top`. Up to
// this bound exp_nonpositive is as exact for positive arguments and lanes do not overflow.
static bool exceeds(float tile_top, float top, float inverse) {
  return tile_top > top && !((tile_top - top) * inverse < 16);
}

// Add a tile to a series that needs no moments.
static void add_tile(Series& series, const ScoreTile& tile, double temperature, float inverse) {
  if (series.top == -INFINITY) raise(series, maximum(tile), temperature);
  TileSum sum = sum_of_exponentials(tile, finite_base(series.top), inverse);
  if (exceeds(sum.top, series.top, inverse)) {
    raise(series, sum.top, temperature);
    sum = sum_of_exponentials(tile, series.top, inverse);
  }
  series.sum += sum.sum;
  raise(series, sum.top, temperature);
}

struct TileMoments {
  float top, reference_top;  // of the tiles
  double mass, moment, gap, reference_mass;
};

// Return the sums that entropy and, with a reference, KL need. A token of probability 0 contributes nothing.
template <bool kHasReference>
static TileMoments moments(const ScoreTile& u, const ScoreTile& v, float base_u, float base_v, float inverse) {
  enum { kMass, kMoment, kGap, kReferenceMass, kSums };
  constexpr int kChains = 2;
  constexpr int64_t kStep = kChains * kLanes;
  const int64_t count = padded(u.count);
  const Floats bases_u = broadcast(base_u), bases_v = broadcast(base_v);
  Floats best_u = broadcast(-INFINITY), best_v = best_u;
  double totals[kSums][kLanes] = {};
  for (int64_t first = 0; first < count; first += kLinks * kStep) {
    const int64_t end = count < first + kLinks * kStep ? count : first + kLinks * kStep;
    Floats sums[kSums][kChains] = {};
    for (int64_t i = first; i < end; i += kStep) {
      for (int chain = 0; chain < kChains; ++chain) {
        fetch_ahead(u, i + chain * kLanes);
        const Floats x = load(u.scores + i + chain * kLanes);
        const Floats a = (x - bases_u) * inverse, mass = exp_nonpositive(a);
        best_u = larger(x, best_u);
        sums[kMass][chain] += mass;
        sums[kMoment][chain] += mass == 0.0f ? Floats{} : mass * a;
        if (!kHasReference) continue;
        fetch_ahead(v, i + chain * kLanes);
        const Floats y = load(v.scores + i + chain * kLanes);
        const Floats b = (y - bases_v) * inverse;
        best_v = larger(y, best_v);
        sums[kReferenceMass][chain] += exp_nonpositive(b);
        sums[kGap][chain] += mass == 0.0f ? Floats{} : mass * (a - b);
      }
    }
    for (int sum = 0; sum < kSums; ++sum) add_lanes(sums[sum][0] + sums[sum][1], totals[sum]);
  }
  return {largest_lane(best_u),           largest_lane(best_v),        sum_of_lanes(totals[kMass]),
          sum_of_lanes(totals[kMoment]),  sum_of_lanes(totals[kGap]),  sum_of_lanes(totals[kReferenceMass])};
}

// Raise both maxima where the new ones are larger, and rescale all sums to them.
static void raise_tops(RowSums& sums, float top, float reference_top, double temperature) {
  const double mass = sums.policy.sum;
  const double policy = raise(sums.policy, top, temperature);
  const double reference = raise(sums.reference, reference_top, temperature);
  if (policy == 0 && reference == 0) return;
  const double factor = std::exp(policy);
  sums.moment = factor * (sums.moment + mass * policy);
  sums.gap = factor > 0 ? factor * (sums.gap + mass * (policy - reference)) : 0;  // it may be infinite: 0 * inf is NaN
}

template <bool kHasReference>
static void add_moments(RowSums& sums, const ScoreTile& u, const ScoreTile& v, double temperature, float inverse) {
  const float &top = sums.policy.top, &reference_top = sums.reference.top;
  if (top == -INFINITY || (kHasReference && reference_top == -INFINITY)) {
    raise_tops(sums, maximum(u), kHasReference ? maximum(v) : -INFINITY, temperature);
  }
  TileMoments tile = moments<kHasReference>(u, v, finite_base(top), finite_base(reference_top), inverse);
  if (exceeds(tile.top, top, inverse) || exceeds(tile.reference_top, reference_top, inverse)) {
    raise_tops(sums, tile.top, tile.reference_top, temperature);
    tile = moments<kHasReference>(u, v, finite_base(top), finite_base(reference_top), inverse);
  }
  sums.policy.sum += tile.mass;
  sums.moment += tile.moment;
  sums.gap += tile.gap;
  sums.reference.sum += tile.reference_mass;
  raise_tops(sums, tile.top, tile.reference_top, temperature);
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
