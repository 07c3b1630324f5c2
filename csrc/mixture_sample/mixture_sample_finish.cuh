// The end of a row, by the last of its blocks: choose a tile by the tiles' sums, a token within the tile, and write the
// outputs.
//
// Its time is a chain of latencies, so the chain is short. The whole block loads the sums of all series into shared
// memory at once; one warp chooses the tile while each other warp adds up one normaliser; then one warp for each step
// of the tile scans it, with z in registers, and the warp whose step contains the token writes the row. There is one
// block barrier between these stages, and one more where a tile has several steps.
#pragma once

#include "../common/philox.h"
#include "mixture_sample_select.cuh"

namespace nlhf {
namespace {

constexpr int kStagedTiles = 2 * kThreads;  // of a series; rows with more tiles are read from global memory

// A series' sums by tile, for a warp whose lanes own runs of neighbouring tiles. In shared memory each run is followed
// by a gap, so that the lanes' reads fall into different banks.
struct TileSums {
  const float2* values;
  int run;  // tiles a lane
  bool staged;
  // Of a tile in the calling lane's run.
  __device__ __forceinline__ float2 operator()(int tile) const {
    return staged ? values[tile + threadIdx.x % kWarpSize] : __ldcg(values + tile);
  }
  __device__ __forceinline__ float2 of_any(int tile) const {
    return staged ? values[tile + tile / run] : __ldcg(values + tile);
  }
};
using StagedSums = float2[kStagedTiles + kWarpSize];

struct FinishScratch {
  Normaliser normalisers[kMaxModels + 1];  // of the models, and of z over the support at [models]
  int tile;         // the chosen one, or a NoTile
  double fraction;  // the share of the tile's mass below the uniform
  float row_top;    // the largest z
  double step_mass[kMaxTileSteps];
};

// Reasons why a row has no tile: it is no distribution, or its filters must be applied first.
enum NoTile : int { kInvalidRow = -1, kFiltersPending = -2 };

NLHF_DEVICE double uniform_of(const MixtureSample& p, int64_t row) {
  if (p.uniforms != nullptr) return p.uniforms[row];
  return open_unit(random_bits(p.seed[row * p.seed_stride], p.row_ids[row], p.step[row * p.step_stride], p.stream));
}

// The weights of a row's tokens: e^(z - top) where z reaches `threshold`; greedy, 1 for the largest z, so that the same
// scan with a uniform of 0 finds the first of the largest.
struct Draw {
  float top;
  float threshold;
  bool greedy;
  __device__ __forceinline__ float weight(float z) const {
    if (greedy) return z == top ? 1.0f : 0.0f;
    return z >= threshold ? exp_below(z, top) : 0.0f;
  }
};

// A lane's run of tiles.
struct TileRun {
  int first, end;
};
NLHF_DEVICE TileRun run_of(int tiles, int run) {
  const int first = static_cast<int>(threadIdx.x % kWarpSize) * run;
  return {first, first + run < tiles ? first + run : tiles};
}
NLHF_DEVICE int tiles_a_lane(int tiles) { return (tiles + kWarpSize - 1) / kWarpSize; }

// Sum a series over its tiles, by one warp.
NLHF_DEVICE void normalise(const TileSums& sums, int tiles, Normaliser& result) {
  const TileRun run = run_of(tiles, sums.run);
  float top = -INFINITY;
  for (int t = run.first; t < run.end; ++t) top = std::fmax(top, sums(t).x);
  top = warp_max_ordered(top);
  double mass = 0;
  for (int t = run.first; t < run.end; ++t) mass += mass_below(sums(t), top);
  mass = warp_sum(mass);
  if (threadIdx.x % kWarpSize == 0) result = {std::log(mass), top};  // NaN where the series is no distribution
}

// Choose a tile by equation (2) over tiles, by one warp, with masses mass_of(tile); return their sum. `tile` is set to
// the tile, or to kInvalidRow where there is no mass, and `fraction` to the share of its mass below the uniform.
template <typename MassOf>
NLHF_DEVICE double choose_tile(int tiles, int a_lane, double uniform, MassOf mass_of, int& tile, double& fraction) {
  const TileRun run = run_of(tiles, a_lane);
  double mass = 0;
  for (int t = run.first; t < run.end; ++t) mass += mass_of(t);
  const WarpSums<double> sums = warp_sums(mass);
  const double target = uniform * sums.all;
  const Crossing crossing = warp_crossing(sums.before, mass, target);
  const int chosen = crossing.first >= 0 ? crossing.first : crossing.last;
  const int lane = threadIdx.x % kWarpSize;
  if (chosen < 0 && lane == 0) tile = kInvalidRow;
  if (chosen == lane) {
    double running = sums.before, before = 0, own = 1;
    for (int t = run.first; t < run.end; ++t) {
      const double next = mass_of(t);
      if (!(next > 0)) continue;  // where rounding leaves none beyond the target, the last that has mass
      tile = t;
      before = running, own = next;
      running += next;
      if (running > target) break;
    }
    fraction = (target - before) / own;
  }
  return sums.all;
}

// Write a row's outputs, by one thread. `ok` false: the row is no distribution.
template <Storage kStorage, int kModels>
NLHF_DEVICE void write_row(const Row<kStorage, kModels>& row, bool ok, int token, float z, const Draw& draw,
                           const Normaliser* normalisers) {
  const MixtureSample& p = row.p;
  bool all_numbers = true;
#pragma unroll
  for (int m = 0; m <= kModels; ++m) {
    if (m > p.models || !(p.logprob_mask >> m & 1)) continue;
    double logprob = NAN;
    if (ok && m < p.models) {
      const float logit = load_element<kStorage>(row.model(m < kModels ? m : 0), token, row.vocabulary());
      logprob = (logit - normalisers[m].top) - normalisers[m].log_mass;
    } else if (ok) {
      logprob = draw.greedy ? 0.0 : (z - normalisers[m].top) - normalisers[m].log_mass;
    }
    if (logprob > 0) logprob = 0;  // the sum of a row with one likely token may be rounded to less than its term
    p.logprobs[m * p.rows + row.index] = static_cast<float>(logprob);
    all_numbers &= logprob == logprob;
  }
  p.tokens[row.index] = ok ? token : 0;
  p.ok[row.index] = ok && all_numbers;
}

// Scan the chosen tile, one warp a step, and write the row. All threads of the block call, after a barrier.
template <Storage kStorage, int kModels>
NLHF_DEVICE void draw_in_tile(const Params& params, const Row<kStorage, kModels>& row, const Draw& draw,
                              FinishScratch& s) {
  using S = Slice<kStorage>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, steps = params.plan.tile_steps;
  const int first = (s.tile * steps + warp) * kStep;
  float z[kPerLane];
  double mass[S::kChunks];
  WarpSums<double> chunks[S::kChunks];
  double own = 0;
  if (warp < steps) {
    read_step(row, first, z);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      double pairs[S::kWidth];
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) pairs[i] = draw.weight(z[c * S::kWidth + i]);
#pragma unroll
      for (int distance = S::kWidth / 2; distance > 0; distance /= 2) {  // a tree: additions overlap
#pragma unroll
        for (int i = 0; i < distance; ++i) pairs[i] += pairs[i + distance];
      }
      mass[c] = pairs[0];
      chunks[c] = warp_sums(mass[c]);
      own += chunks[c].all;
    }
  }
  // In units of this scan's own sum, which differs by rounding from the tile's stored sum.
  double before = 0, all = own;
  int chosen = 0;
  if (steps > 1) {
    if (warp < steps && lane == 0) s.step_mass[warp] = own;
    __syncthreads();
    all = 0;
#pragma unroll
    for (int w = 0; w < kMaxTileSteps; ++w) all += w < steps ? s.step_mass[w] : 0.0;
  }
  const double target = std::fmax(s.fraction, 0.0) * all;
  if (steps > 1) {
    double running = 0;
#pragma unroll
    for (int w = 0; w < kMaxTileSteps; ++w) {
      if (w >= steps || running > target || !(s.step_mass[w] > 0)) continue;  // as in choose_tile
      chosen = w;
      before = running;
      running += s.step_mass[w];
    }
  }
  if (warp != chosen) return;
  int chunk = -1, owner = 0, last_chunk = 0, last_owner = 0;
  double chunk_before = before, chosen_before = before;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const Crossing crossing = warp_crossing(chunk_before + chunks[c].before, mass[c], target);
    if (chunk < 0 && crossing.first >= 0) chunk = c, owner = crossing.first, chosen_before = chunk_before;
    if (crossing.last >= 0) last_chunk = c, last_owner = crossing.last;
    chunk_before += chunks[c].all;
  }
  if (chunk < 0) chunk = last_chunk, owner = last_owner;
  if (lane != owner) return;
  int token = first + S::offset(0);
  float z_of_token = z[0];
  bool is_beyond = false;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    if (c != chunk) continue;
    double running = chosen_before + chunks[c].before;
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) {
      const float weight = draw.weight(z[c * S::kWidth + i]);
      running += weight;
      if (is_beyond || !(weight > 0)) continue;
      token = first + S::offset(c * S::kWidth + i);
      z_of_token = z[c * S::kWidth + i];
      is_beyond = running > target;
    }
  }
  write_row(row, true, token, z_of_token, draw, s.normalisers);
}

// Load the sums of z and of the requested models' tiles into shared memory; a barrier must follow.
template <int kModels>
NLHF_DEVICE void stage_sums(const Params& params, int64_t index, int run, StagedSums (&staged)[kModels + 1]) {
  constexpr int kRounds = kStagedTiles / kThreads;
  float2 own[kModels + 1][kRounds];  // all loads are issued before the first store
#pragma unroll
  for (int series = 0; series <= kModels; ++series) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int tile = round * kThreads + threadIdx.x;
      own[series][round] = {0, 0};
      if (series > params.p.models || tile >= params.plan.tiles) continue;
      if (series == params.p.models || params.p.logprob_mask >> series & 1) {
        own[series][round] = __ldcg(params.tile_sums(index, series) + tile);
      }
    }
  }
#pragma unroll
  for (int series = 0; series <= kModels; ++series) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int tile = round * kThreads + threadIdx.x;
      if (tile < params.plan.tiles) staged[series][tile + tile / run] = own[series][round];
    }
  }
}

// Choose the row's tile from the sums of z, by one warp; or find that the row is invalid, or that filters must be
// applied first, and then store what they need in the row's state.
template <typename RowType>
NLHF_DEVICE void choose_from_sums(const Params& params, const RowType& row, const TileSums& sums, double uniform,
                                  FinishScratch& s) {
  const MixtureSample& p = row.p;
  const TileRun run = run_of(params.plan.tiles, sums.run);
  const bool greedy = row.is_greedy();
  float top = -INFINITY;
  bool broken = false;
  for (int t = run.first; t < run.end; ++t) {
    const float2 sum = sums(t);
    top = std::fmax(top, sum.x);
    broken |= sum.y != sum.y;
  }
  top = warp_max_ordered(top);
  Filters filters{0, 1.0f, -INFINITY};
  if (p.filtered) filters = filters_of(p, row.index, top);
  // No finite maximum, a NaN somewhere, or a min_p beyond 1, which keeps nothing.
  broken |= !(std::fabs(top) < INFINITY) || !(top >= filters.floor);
  const int lane = threadIdx.x % kWarpSize;
  if (__any_sync(kWholeWarp, broken)) {
    if (lane == 0) s.tile = kInvalidRow;
    if (lane == 0 && p.filtered) params.states[row.index].search = 0;
    return;
  }
  const double total = choose_tile(params.plan.tiles, sums.run, greedy ? 0.0 : uniform, [&](int t) {
    const float2 sum = sums(t);
    if (greedy) return static_cast<double>(sum.x == top);
    return static_cast<double>(mass_below(sum, top));
  }, s.tile, s.fraction);
  __syncwarp();  // the chosen tile is written
  if (lane != 0) return;
  s.row_top = top;
  if (!p.filtered) return;
  RowState& state = params.states[row.index];
  state.search = 0;
  if (greedy || !filters.any()) return;
  const bool searched = filters.top_k > 0 || filters.top_p < 1.0f;
  state.search = kSearchPending | (searched ? kSearchHistogram : 0);
  state.total = total;
  state.top = top;
  state.floor = filters.floor;
  state.first_bin = state.last_bin = bins_of(row, top).of(filters.floor);
  state.above = 0;
  s.tile = kFiltersPending;
}

// Bound the threshold of top-k by the tiles' maxima, by the block, so that the row needs no histogram: if k tiles have
// their maximum at `bound` or above, the k-th largest element is there, too. The bound is found by bisection, one barrier
// a step; a lower one only adds candidates. Only for a k of at most a tile a thread.
template <typename RowType>
NLHF_DEVICE void bound_top_k(const Params& params, const RowType& row, const TileSums& sums, float row_top) {
  constexpr int kHalvings = 10;
  const Filters filters = filters_of(row.p, row.index, row_top);
  if (filters.top_k == 0 || filters.top_k > kThreads) return;
  float own = -INFINITY;  // of several tiles the largest: it stands for one element
  for (int t = threadIdx.x; t < params.plan.tiles; t += kThreads) own = std::fmax(own, sums.of_any(t).x);
  float reach = -kSmallestExponent / kLog2E;  // what is further below the maximum has no mass
  float bound = row_top - reach;
  if (__syncthreads_count(own >= bound && has_mass(own, row_top)) < filters.top_k) return;
#pragma unroll 1
  for (int i = 0; i < kHalvings; ++i) {
    reach *= 0.5f;
    if (__syncthreads_count(own >= bound + reach) >= filters.top_k) bound += reach;
  }
  if (threadIdx.x != 0) return;
  RowState& state = params.states[row.index];
  state.first_bin = state.above = 0;
  state.last_bin = bins_of(row, row_top).of(bound);
  state.search = kSearchPending | kSearchTopK | (filters.top_p < 1.0f ? kSearchTopP : 0);
}

// After the last of a row's sums: sample its token or, where filters need further passes, store its state for them.
template <Storage kStorage, int kModels>
__device__ __noinline__ void finish_streaming(const Params& params, int64_t index, double uniform) {
  __shared__ StagedSums staged_sums[kModels + 1];
  __shared__ FinishScratch s;
  const MixtureSample& p = params.p;
  const int warp = threadIdx.x / kWarpSize, tiles = params.plan.tiles;
  const int a_lane = tiles_a_lane(tiles);
  const bool staged = tiles <= kStagedTiles;
  const auto sums_of = [&](int series) {
    return TileSums{staged ? staged_sums[series] : params.tile_sums(index, series), a_lane, staged};
  };
  if (staged) stage_sums<kModels>(params, index, a_lane, staged_sums);
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(p, index);
  __syncthreads();
  const int series = warp - 1;
  if (warp == 0) {
    choose_from_sums(params, row, sums_of(p.models), uniform, s);
  } else if (series <= p.models && p.logprob_mask >> series & 1) {
    normalise(sums_of(series), tiles, s.normalisers[series]);
  }
  __syncthreads();
  Draw draw{s.row_top, -INFINITY, row.is_greedy()};
  if (s.tile == kFiltersPending) {
    bound_top_k(params, row, sums_of(p.models), s.row_top);
    if (threadIdx.x == 0) {
      for (int m = 0; m < kMaxModels; ++m) params.states[index].normalisers[m] = s.normalisers[m];
    }
  } else if (s.tile == kInvalidRow) {
    if (threadIdx.x == 0) write_row(row, false, 0, 0.0f, draw, s.normalisers);
  } else {
    // Within the tile, weights are relative to its own maximum, so that tiles of little mass keep their digits.
    if (!draw.greedy) draw.top = sums_of(p.models).of_any(s.tile).x;
    draw_in_tile(params, row, draw, s);
  }
}

}  // namespace
}  // namespace nlhf
