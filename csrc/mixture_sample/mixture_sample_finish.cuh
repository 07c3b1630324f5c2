// The end of a row of mixture_sample, by the last of its blocks: from the tiles' sums to a tile, from the tile to the
// token, and the outputs.
#pragma once

#include "../common/philox.h"
#include "mixture_sample_select.cuh"

namespace nlhf {
namespace {

// Block-wide scratch of a row's last block; each piece is used by one step only, so that no barrier guards its reuse.
struct FinishScratch {
  float tops[kWarpSize];
  Normaliser normalisers[kMaxModels];
  CrossingScratch tile_crossing, element_crossing;
  int tile, token;
  double fraction;
};

NLHF_DEVICE double uniform_of(const MixtureSample& p, int64_t row) {
  if (p.uniforms != nullptr) return p.uniforms[row];
  return open_unit(random_bits(p.seed[row * p.seed_stride], p.row_ids[row], p.step[row * p.step_stride], p.stream));
}

// The sum of e^logit of each wanted model, a warp a model, into shared memory; a barrier must follow.
NLHF_DEVICE void sum_models(const Job& job, int64_t row, Normaliser* normalisers) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (warp >= job.p.models || !(job.p.wanted >> warp & 1)) return;
  const float2* tiles = job.tile_sums(row, warp);
  float top = -INFINITY;
  for (int t = lane; t < job.plan.tiles; t += kWarpSize) top = std::fmax(top, __ldcg(tiles + t).x);
  top = warp_max(top);
  double mass = 0;
  for (int t = lane; t < job.plan.tiles; t += kWarpSize) mass += mass_below(__ldcg(tiles + t), top);
  mass = warp_sum(mass);
  if (lane == 0) normalisers[warp] = {std::log(mass), top};  // NaN where the model is no distribution
}

// How a row's token is drawn: with weight e^(z - top) where z reaches `threshold`; or, greedy, as the first of the
// largest, which is the same walk with weight 1 there and a uniform of 0.
struct Draw {
  double uniform;
  float top;
  float threshold;
  bool greedy;
  __device__ __forceinline__ float weight(float z) const {
    if (greedy) return z == top ? 1.0f : 0.0f;
    return z >= threshold ? exp_below(z, top) : 0.0f;
  }
};

// Chooses a tile, equation (2) over tiles, with mass_of(tile) as their masses; returns the sum of all. Afterwards
// s.tile is the tile, -1 where there is no mass, and s.fraction how far into its mass the uniform points.
template <typename MassOf>
NLHF_DEVICE double choose_tile(int tiles, double uniform, MassOf mass_of, FinishScratch& s) {
  const int run = (tiles + kThreads - 1) / kThreads;
  const int first = threadIdx.x * run, end = first + run < tiles ? first + run : tiles;
  double mass = 0;
  for (int t = first; t < end; ++t) mass += mass_of(t);
  if (threadIdx.x == 0) s.tile = -1;
  const Crossing crossing = block_crossing(mass, uniform, s.tile_crossing);  // barriers inside
  if (crossing.thread == static_cast<int>(threadIdx.x)) {
    double running = crossing.before;
    for (int t = first; t < end; ++t) {
      const double own = mass_of(t);
      if (!(own > 0)) continue;  // where rounding leaves none beyond the target, the last that has mass
      s.tile = t;
      s.fraction = (crossing.target - running) / own;
      running += own;
      if (running > crossing.target) break;
    }
  }
  __syncthreads();
  return crossing.total;
}

// Walks the chosen tile; afterwards s.token is the row's token.
template <typename RowType>
NLHF_DEVICE void walk_tile(const Job& job, const RowType& row, const Draw& draw, FinishScratch& s) {
  constexpr int kRun = kMaxTileSteps * kStep / kThreads;
  const int run = job.tile_elements() / kThreads;
  const int first = s.tile * job.tile_elements() + threadIdx.x * run;
  const int end = first + run < row.vocabulary() ? first + run : row.vocabulary();
  float weights[kRun];
  read_run(row, first, end, weights);
  double mass = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    weights[i] = first + i < end ? draw.weight(weights[i]) : 0.0f;
    mass += weights[i];
  }
  if (threadIdx.x == 0) s.token = 0;
  // In units of what this walk sums up to, which differs by rounding from the tile's stored sum.
  const Crossing crossing = block_crossing(mass, std::fmax(s.fraction, 0.0), s.element_crossing);
  if (crossing.thread == static_cast<int>(threadIdx.x)) {
    double running = crossing.before;
    int token = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      running += weights[i];
      if (!found && weights[i] > 0) {
        token = first + i;
        found = running > crossing.target;
      }
    }
    s.token = token;
  }
  __syncthreads();
}

// Writes a row's outputs, by the first warp. `ok` false: the row is no distribution.
template <Storage kStorage, int kModels>
NLHF_DEVICE void write_row(const Job& job, const Row<kStorage, kModels>& row, int64_t index, bool ok, int token,
                           double mixture_logprob, const Normaliser* normalisers) {
  if (threadIdx.x >= kWarpSize) return;
  const MixtureSample& p = job.p;
  double logprob = mixture_logprob;
  const int lane = threadIdx.x;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    if (lane == m && row.is_wanted(m)) {
      const float logit = load_element<kStorage>(row.model(m), token, row.vocabulary());
      logprob = ok ? (logit - normalisers[m].top) - normalisers[m].log_mass : NAN;
    }
  }
  const bool wanted = lane <= p.models && p.wanted >> lane & 1;
  if (wanted) p.logprobs[lane * p.rows + index] = static_cast<float>(logprob);
  const bool all_numbers = !__any_sync(kWholeWarp, wanted && logprob != logprob);
  if (lane == 0) {
    p.tokens[index] = ok ? token : 0;
    p.ok[index] = ok && all_numbers;
  }
}

// Draws from the chosen tile and writes the row; `total` is the mass of the whole support in units of e^top.
template <typename RowType>
NLHF_DEVICE void draw_and_write(const Job& job, const RowType& row, int64_t index, const Draw& draw, float row_top,
                                double total, const Normaliser* normalisers, FinishScratch& s) {
  if (s.tile < 0) return write_row(job, row, index, false, 0, NAN, normalisers);
  walk_tile(job, row, draw, s);
  double logprob = 0;
  if (!draw.greedy) logprob = (read_one(row, s.token) - row_top) - std::log(total);
  write_row(job, row, index, true, s.token, logprob, normalisers);
}

// After the last of a row's sums: its token, or, where filters need further passes, its state for them.
template <Storage kStorage, int kModels>
__device__ __noinline__ void finish_streaming(const Job& job, int64_t index) {
  __shared__ FinishScratch s;
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(job.p, index);
  const MixtureSample& p = job.p;
  const double uniform = uniform_of(p, index);
  const float2* tiles = job.tile_sums(index, p.models);
  sum_models(job, index, s.normalisers);
  float top = -INFINITY;
  bool broken = false;
  for (int t = threadIdx.x; t < job.plan.tiles; t += kThreads) {
    const float2 sum = __ldcg(tiles + t);
    top = std::fmax(top, sum.x);
    broken |= sum.y != sum.y;
  }
  top = block_max(top, s.tops);
  Filters filters{0, 1.0f, -INFINITY};
  if (p.filtered) filters = filters_of(p, index, top);
  // No finite maximum, a NaN somewhere, or a min_p beyond 1, which keeps nothing.
  broken |= !(std::fabs(top) < INFINITY) || !(top >= filters.floor);
  broken = __syncthreads_or(broken);
  if (p.filtered && threadIdx.x == 0) job.states[index].search = 0;
  if (broken) return write_row(job, row, index, false, 0, NAN, s.normalisers);
  const bool greedy = row.is_greedy();
  const double total = choose_tile(job.plan.tiles, greedy ? 0.0 : uniform, [&](int t) {
    const float2 sum = __ldcg(tiles + t);
    return greedy ? static_cast<double>(sum.x == top) : mass_below(sum, top);
  }, s);
  if (!greedy && filters.any()) {
    if (threadIdx.x != 0) return;
    RowState& state = job.states[index];
    state.total = total;
    for (int m = 0; m < kMaxModels; ++m) state.normalisers[m] = s.normalisers[m];
    state.top = top;
    state.floor = filters.floor;
    const bool searched = filters.top_k > 0 || filters.top_p < 1.0f;
    state.search = kSearchPending | (searched ? kSearchTopK | kSearchTopP : 0);
    state.first_bin = state.last_bin = bins_of(row, top).of(filters.floor);
    state.above = 0;
    return;
  }
  // Within the tile in units of its own maximum, for small tiles to keep their digits.
  const Draw draw{uniform, greedy ? top : __ldcg(tiles + s.tile).x, -INFINITY, greedy};
  draw_and_write(job, row, index, draw, top, total, s.normalisers, s);
}

}  // namespace
}  // namespace nlhf
