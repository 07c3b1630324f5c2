// mirror_descent on the GPU: all iterations of all games in one launch, a block a game; or, where a few large games
// would leave most of the GPU idle, several blocks a game and a launch for each iteration.
//
// An iteration's cost is the product of the preference matrix with the opponent, so the matrix is kept during all
// iterations in the fastest memory that holds it:
//   up to 128 actions   in registers: 32 elements a thread, 1, 2 or 4 threads a row             (small_games)
//   while it fits       in shared memory, about 230 actions in float and 160 in double         (large_games<true>)
//   above               in global memory and the caches, read coalesced in every iteration    (large_games<false>),
//                       or by several blocks a game                                           (split_step)
//
// log_policy is normalised only at the end, since a constant added to a row changes no softmax. But that constant would
// grow with every step, to (mean preference) / tau, and cost float digits; so each iteration subtracts the maximum that
// its softmax has computed. A row of -inf only has no distribution and gives NaN, as in PyTorch's softmax.
#include <algorithm>

#include "../common/cuda_block.cuh"
#include "../common/cuda_launch.cuh"
#include "mirror_descent.h"

namespace nlhf {
namespace {

// Return (1 - b) log_policy + b log_reference. At b = 0 and b = 1 one side is not read: 0 * -inf is NaN.
template <typename Real>
NLHF_DEVICE Real mix(Real log_policy, Real log_reference, Real b) {
  if (b == Real(0)) return log_policy;
  if (b == Real(1)) return log_reference;
  return (Real(1) - b) * log_policy + b * log_reference;
}

// ------------------------------------------------------------------------------------------ matrix in registers

constexpr int kTile = 32;  // matrix elements in a thread's registers

// 16 bytes, one shared-memory load.
template <typename Real>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(Real);
  Real value[kSize];
};

// A game of up to kTile * kLanes actions: kLanes threads share a row and hold its chunks by turns.
template <typename Real, int kLanes>
struct SmallGame {
  static constexpr int kActions = kTile * kLanes;
  static constexpr int kThreads = kActions * kLanes;
  static constexpr int kWarps = kThreads / kWarpSize;
  // Registers for 1024 threads a multiprocessor in float, 512 in double: eight games of 64 actions then share one and
  // 1024 games are one wave on 132 of them; without this bound the compiler takes 91 registers a thread and five fit.
  // Every GPU allows 16 resident blocks a multiprocessor and some no more than 24, so the bound is at most 16.
  static constexpr int kBlocksThatFit = 4096 / sizeof(Real) / kThreads;
  static constexpr int kResidentBlocks = kBlocksThatFit < 16 ? kBlocksThatFit : 16;
  static constexpr int kChunks = kActions / Chunk<Real>::kSize;
};

template <typename Real>
struct Softmax {
  Real top;
  Real total;  // of exp(logit - top)
};

// Write exp(logit - top) of all actions into the calling warp's own `weights`. Every warp computes them all: a few more
// exponentials, but one barrier an iteration instead of three. `logit` is that of the calling thread's row.
template <typename Real, int kLanes>
NLHF_DEVICE Softmax<Real> share_softmax(Real logit, Real* published, Chunk<Real>* weights) {
  constexpr int kSize = Chunk<Real>::kSize;
  const int lane = threadIdx.x % kWarpSize;
  if (threadIdx.x % kLanes == 0) published[threadIdx.x / kLanes] = logit;
  __syncthreads();
  Real values[kLanes];
  Real top = -Real(INFINITY);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    values[i] = published[i * kWarpSize + lane];
    top = std::fmax(top, values[i]);
  }
  top = warp_max(top);
  Real total = 0;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const int action = i * kWarpSize + lane;
    const Real weight = std::exp(values[i] - top);
    weights[action / kSize].value[action % kSize] = weight;
    total += weight;
  }
  __syncwarp();
  return {top, warp_sum(total)};
}

// Load the calling thread's part of one matrix row; elements outside the matrix are 0.
template <typename Real, int kLanes>
NLHF_DEVICE void load_tile(const Real* matrix, int actions, Real (&tile)[kTile]) {
  constexpr int kSize = Chunk<Real>::kSize;
  const int row = threadIdx.x / kLanes, part = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int column = (i / kSize * kLanes + part) * kSize + i % kSize;
    tile[i] = row < actions && column < actions ? matrix[row * actions + column] : Real(0);
  }
}

// Return the row's product with `weights`, in all kLanes threads of the row. Neighbouring lanes read neighbouring
// chunks and all rows of the warp the same ones, so each load is one conflict-free broadcast.
template <typename Real, int kLanes>
NLHF_DEVICE Real row_product(const Real (&tile)[kTile], const Chunk<Real>* weights) {
  constexpr int kSize = Chunk<Real>::kSize;
  const int part = threadIdx.x % kLanes;
  Real sums[4] = {};  // independent, so that the additions overlap
#pragma unroll
  for (int i = 0; i < kTile / kSize; ++i) {
    const Chunk<Real> chunk = weights[i * kLanes + part];
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums[(i * kSize + j) % 4] += tile[i * kSize + j] * chunk.value[j];
  }
  return warp_sum<kLanes>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Real, int kLanes, typename Game = SmallGame<Real, kLanes>>
__global__ void __launch_bounds__(Game::kThreads, Game::kResidentBlocks) small_games(const MirrorDescent<Real> p) {
  // Two buffers by turns: slow warps may still read one while fast warps write the other.
  __shared__ Real published[2][Game::kActions];
  __shared__ Chunk<Real> weights_of_warp[Game::kWarps][Game::kChunks];
  Chunk<Real>* weights = weights_of_warp[threadIdx.x / kWarpSize];
  const int actions = static_cast<int>(p.actions), row = threadIdx.x / kLanes;
  const bool is_action = row < actions;  // rows of padding have logit -inf, probability 0
  int turn = 0;
  for (int64_t game = blockIdx.x; game < p.games; game += gridDim.x) {
    Real tile[kTile];
    load_tile<Real, kLanes>(p.preference + game * actions * actions, actions, tile);
    Real log_policy = is_action ? p.log_policy[game * actions + row] : -Real(INFINITY);
    const Real log_reference = is_action ? p.log_reference[game * actions + row] : -Real(INFINITY);
    const bool is_fixed = p.opponent == Opponent::fixed;
    const Real log_opponent = is_fixed && is_action ? p.log_opponent[game * actions + row] : -Real(INFINITY);
    const Real tau = p.tau[game * p.tau_stride];
    Real next_step = p.iterations > 0 ? p.step_sizes[0] : Real(0);  // loaded one iteration ahead, to hide its latency
    for (int64_t k = 0; k < p.iterations; ++k) {
      const Real step = next_step;
      next_step = k + 1 < p.iterations ? p.step_sizes[k + 1] : Real(0);
      const Real mixture = mix(log_policy, log_reference, step * tau);
      const Real logit = is_fixed ? log_opponent : p.opponent == Opponent::mixture ? mixture : log_policy;
      const Softmax<Real> opponent =
          share_softmax<Real, kLanes>(is_action ? logit : -Real(INFINITY), published[turn], weights);
      turn ^= 1;
      log_policy = (mixture - opponent.top) + step / opponent.total * row_product<Real, kLanes>(tile, weights);
    }
    const Softmax<Real> softmax =
        share_softmax<Real, kLanes>(is_action ? log_policy : -Real(INFINITY), published[turn], weights);
    turn ^= 1;
    if (is_action && threadIdx.x % kLanes == 0) {
      p.out[game * actions + row] = log_policy - (softmax.top + std::log(softmax.total));
    }
  }
}

// ----------------------------------------------------------------------------- matrix in shared or global memory

// 16 warps with four rows and four columns a lane have 32 KB of float loads in flight, about one multiprocessor's share
// of the memory's bandwidth times its latency; 32 warps would spill registers.
constexpr int kLargeThreads = 512;

// target[a] += scale * sum_b matrix[a][b] weights[b] - top, for a from `begin` to `end`. A warp takes four rows at
// once: each load of the weights feeds four products, and its lanes run along the rows, so loads coalesce and meet no
// bank conflict at any row length.
template <typename Real>
NLHF_DEVICE void add_product(const Real* matrix, const Real* weights, Real scale, Real top, int actions, int begin,
                             int end, Real* target) {
  const int lane = threadIdx.x % kWarpSize;
  const int rows_per_pass = blockDim.x / kWarpSize * 4;
  for (int first = begin + threadIdx.x / kWarpSize * 4; first < end; first += rows_per_pass) {
    const Real* rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // past the end the last row is read again and its sum dropped
      rows[i] = matrix + static_cast<int64_t>(first + i < end ? first + i : end - 1) * actions;
    }
    Real sums[4] = {};
#pragma unroll 4
    for (int column = lane; column < actions; column += kWarpSize) {
      const Real weight = weights[column];
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += rows[i][column] * weight;
    }
    const Real sum = warp_sum_of_four(sums);
    const int row = first + lane / 8;
    if (lane % 8 == 0 && row < end) target[row] = (target[row] - top) + scale * sum;
  }
}

// Write the opponent's weights of a whole game, exp(logit - top), and the mixture of this iteration into `target`, for
// actions from `begin` to `end`; return the softmax. `target` may be `policy`: a thread reads an action before it writes
// it. All threads of the block call; before they return, all have written their weights.
template <typename Real>
NLHF_DEVICE Softmax<Real> find_opponent(const MirrorDescent<Real>& p, int64_t game, Real b, const Real* policy,
                                        Real* weights, Real* target, int begin, int end, Real* max_scratch,
                                        Real* sum_scratch) {
  const int actions = static_cast<int>(p.actions), threads = blockDim.x;
  Real top = -Real(INFINITY), total = 0;
  for (int a = threadIdx.x; a < actions; a += threads) {
    const Real own = policy[a], mixture = mix(own, p.log_reference[game * actions + a], b);
    weights[a] = p.opponent == Opponent::fixed     ? p.log_opponent[game * actions + a]
                 : p.opponent == Opponent::mixture ? mixture
                                                   : own;
    if (a >= begin && a < end) target[a] = mixture;
    top = std::fmax(top, weights[a]);
  }
  top = block_max(top, max_scratch);
  for (int a = threadIdx.x; a < actions; a += threads) total += weights[a] = std::exp(weights[a] - top);
  return {top, block_sum(total, sum_scratch)};
}

// Write log softmax of one game's `policy` to `out`, which may be the policy itself. All threads of the block call.
template <typename Real>
NLHF_DEVICE void normalise(const Real* policy, int actions, Real* out, Real* max_scratch, Real* sum_scratch) {
  const int threads = blockDim.x;
  Real top = -Real(INFINITY), total = 0;
  for (int a = threadIdx.x; a < actions; a += threads) top = std::fmax(top, policy[a]);
  top = block_max(top, max_scratch);
  for (int a = threadIdx.x; a < actions; a += threads) total += std::exp(policy[a] - top);
  const Real normaliser = top + std::log(block_sum(total, sum_scratch));
  for (int a = threadIdx.x; a < actions; a += threads) out[a] = policy[a] - normaliser;
}

// One block a game; its vectors are in shared memory and each thread owns every blockDim.x-th action. The policy of a
// game whose matrix is in global memory is kept in `out`: two vectors of 8192 doubles exceed some GPUs' shared memory.
template <typename Real, bool kMatrixInShared>
__global__ void __launch_bounds__(kLargeThreads, 1) large_games(const MirrorDescent<Real> p) {
  __shared__ Real max_scratch[kWarpSize], sum_scratch[kWarpSize];
  const int actions = static_cast<int>(p.actions), threads = blockDim.x;
  Real* weights = dynamic_shared<Real>();
  for (int64_t game = blockIdx.x; game < p.games; game += gridDim.x) {
    const Real* matrix = p.preference + game * actions * actions;
    Real* out = p.out + game * actions;
    Real* policy = kMatrixInShared ? weights + actions : out;
    const Real tau = p.tau[game * p.tau_stride];
    for (int a = threadIdx.x; a < actions; a += threads) policy[a] = p.log_policy[game * actions + a];
    if (kMatrixInShared) {
      Real* copy = weights + 2 * actions;
#pragma unroll 4
      for (int i = threadIdx.x; i < actions * actions; i += threads) copy[i] = matrix[i];
      matrix = copy;  // read only after the barriers of the first softmax
    }
    for (int64_t k = 0; k < p.iterations; ++k) {
      const Real step = p.step_sizes[k];
      const Softmax<Real> opponent =
          find_opponent(p, game, step * tau, policy, weights, policy, 0, actions, max_scratch, sum_scratch);
      add_product(matrix, weights, step / opponent.total, opponent.top, actions, 0, actions, policy);
      __syncthreads();  // the policy is complete, and the weights may be overwritten
    }
    normalise(policy, actions, out, max_scratch, sum_scratch);
  }
}

// ------------------------------------------------------------------------------------------- several blocks a game

// Iteration k of all games; blockIdx.x is game * parts + part. Each block computes the opponent of its whole game from
// `from`, the log-policies after the iteration before, and writes its own rows of `to`. Its arithmetic is that of
// large_games, so results are the same bits for every number of parts.
template <typename Real>
__global__ void __launch_bounds__(kLargeThreads, 1)
    split_step(const MirrorDescent<Real> p, const Real* from, Real* to, int64_t k, int parts) {
  __shared__ Real max_scratch[kWarpSize], sum_scratch[kWarpSize];
  const int actions = static_cast<int>(p.actions);
  const int64_t game = blockIdx.x / static_cast<unsigned>(parts);
  const int rows = ((actions + parts - 1) / parts + 3) / 4 * 4;  // add_product takes four at once
  const int begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts)) * rows;
  const int end = begin + rows < actions ? begin + rows : actions;
  if (begin >= end) return;
  Real* weights = dynamic_shared<Real>();
  Real* target = to + game * actions;
  const Real step = p.step_sizes[k], tau = p.tau[game * p.tau_stride];
  const Softmax<Real> opponent = find_opponent(p, game, step * tau, from + game * actions, weights, target, begin, end,
                                               max_scratch, sum_scratch);
  add_product(p.preference + game * actions * actions, weights, step / opponent.total, opponent.top, actions, begin,
              end, target);
}

// Normalise the log-policies in p.out in place, a block a game.
template <typename Real>
__global__ void __launch_bounds__(kLargeThreads, 1) normalise_games(const MirrorDescent<Real> p) {
  __shared__ Real max_scratch[kWarpSize], sum_scratch[kWarpSize];
  Real* policy = p.out + int64_t{blockIdx.x} * p.actions;
  normalise(policy, static_cast<int>(p.actions), policy, max_scratch, sum_scratch);
}

// ---------------------------------------------------------------------------------------------------- launching

constexpr int64_t kMaxSmallActions = 128;

// Bytes of dynamic shared memory of large_games<kMatrixInShared>.
template <typename Real>
int64_t large_game_bytes(int64_t actions, bool matrix_in_shared) {
  const int64_t vector_bytes = actions * static_cast<int64_t>(sizeof(Real));
  return matrix_in_shared ? (actions + 2) * vector_bytes : vector_bytes;
}

template <typename Real>
bool fits(int64_t dynamic_bytes, const DeviceLimits& limits) {
  constexpr int64_t kScratchBytes = 2 * kWarpSize * sizeof(Real);  // static, but part of the same limit
  return dynamic_bytes + kScratchBytes <= limits.shared_bytes;
}

// Several blocks a game pay where the matrix is read from global memory in each iteration and the games are fewer than
// the multiprocessors; then a block keeps at least one pass of its warps. Derived from bytes in flight, not measured.
template <typename Real>
MirrorDescentPlan default_plan(int64_t games, int64_t actions, const DeviceLimits& limits) {
  MirrorDescentPlan plan{1, kLargeThreads};
  const bool matrix_is_near = actions <= kMaxSmallActions || fits<Real>(large_game_bytes<Real>(actions, true), limits);
  if (matrix_is_near || games == 0) return plan;
  const int64_t most = (actions + kLargeThreads / kWarpSize * 4 - 1) / (kLargeThreads / kWarpSize * 4);
  plan.parts = static_cast<int>(std::max<int64_t>(1, std::min(limits.multiprocessors / games, most)));
  return plan;
}

template <typename Real, int kLanes>
cudaError_t launch_small(const MirrorDescent<Real>& p, const DeviceLimits& limits, void* cuda_stream) {
  constexpr int kThreads = SmallGame<Real, kLanes>::kThreads;
  return launch(small_games<Real, kLanes>, {strided_grid(p.games, limits), kThreads, 0}, cuda_stream, p);
}

template <typename Real, bool kMatrixInShared>
cudaError_t launch_large(const MirrorDescent<Real>& p, const DeviceLimits& limits, unsigned threads,
                         void* cuda_stream) {
  const auto shared_bytes = static_cast<size_t>(large_game_bytes<Real>(p.actions, kMatrixInShared));
  return launch(large_games<Real, kMatrixInShared>, {strided_grid(p.games, limits), threads, shared_bytes}, cuda_stream,
                p);
}

// A launch for each iteration, whose log-policies alternate between the workspace and p.out and end in the latter.
template <typename Real>
cudaError_t launch_split(const MirrorDescent<Real>& p, MirrorDescentPlan plan, Real* workspace, void* cuda_stream) {
  if (p.games * plan.parts > INT32_MAX || workspace == nullptr) return cudaErrorInvalidValue;
  const auto threads = static_cast<unsigned>(plan.threads);
  const LaunchShape shape{static_cast<unsigned>(p.games * plan.parts), threads,
                          static_cast<size_t>(large_game_bytes<Real>(p.actions, false))};
  const Real* from = p.log_policy;
  for (int64_t k = 0; k < p.iterations; ++k) {
    Real* to = (p.iterations - k) % 2 == 1 ? p.out : workspace;
    const cudaError_t error = launch(split_step<Real>, shape, cuda_stream, p, from, to, k, plan.parts);
    if (error != cudaSuccess) return error;
    from = to;
  }
  return launch(normalise_games<Real>, {static_cast<unsigned>(p.games), threads, 0}, cuda_stream, p);
}

template <typename Real>
cudaError_t mirror_descent(const MirrorDescent<Real>& p, MirrorDescentPlan plan, void* workspace, void* cuda_stream) {
  if (p.games == 0 || p.actions == 0) return cudaSuccess;
  if (plan.parts < 1 || plan.threads < kWarpSize || plan.threads > kLargeThreads || plan.threads % kWarpSize != 0) {
    return cudaErrorInvalidValue;
  }
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const auto threads = static_cast<unsigned>(plan.threads);
  const bool in_shared = fits<Real>(large_game_bytes<Real>(p.actions, true), limits);
  if (!fits<Real>(large_game_bytes<Real>(p.actions, false), limits)) return cudaErrorInvalidValue;
  if (plan.parts > 1 && p.iterations > 0) return launch_split(p, plan, static_cast<Real*>(workspace), cuda_stream);
  if (p.actions <= 32) return launch_small<Real, 1>(p, limits, cuda_stream);
  if (p.actions <= 64) return launch_small<Real, 2>(p, limits, cuda_stream);
  if (p.actions <= kMaxSmallActions) return launch_small<Real, 4>(p, limits, cuda_stream);
  if (in_shared) return launch_large<Real, true>(p, limits, threads, cuda_stream);
  return launch_large<Real, false>(p, limits, threads, cuda_stream);
}

}  // namespace

int mirror_descent_plan(bool is_double, int64_t games, int64_t actions, MirrorDescentPlan* plan) {
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  *plan = is_double ? default_plan<double>(games, actions, limits) : default_plan<float>(games, actions, limits);
  return cudaSuccess;
}

int64_t mirror_descent_workspace(bool is_double, int64_t games, int64_t actions, int parts) {
  const int64_t element_bytes = is_double ? sizeof(double) : sizeof(float);
  return parts > 1 ? games * actions * element_bytes : 0;
}

int mirror_descent_f32_cuda(const MirrorDescent<float>& problem, MirrorDescentPlan plan, void* workspace,
                            void* cuda_stream) {
  return mirror_descent(problem, plan, workspace, cuda_stream);
}

int mirror_descent_f64_cuda(const MirrorDescent<double>& problem, MirrorDescentPlan plan, void* workspace,
                            void* cuda_stream) {
  return mirror_descent(problem, plan, workspace, cuda_stream);
}

}  // namespace nlhf
