// The kernels' parameters: how rows are divided into tiles and parts, and the layout of the workspace.
#pragma once

#include <algorithm>

#include "../common/cuda_launch.cuh"
#include "mixture_sample_sums.cuh"

namespace nlhf {
namespace {

// A row is divided into tiles; their sums are stored, and one of them is scanned again for the token. A warp processes
// one tile at a time. A part is the run of tiles that one block processes.
struct Plan {
  int tile_steps;  // of kStep elements
  int tiles;       // of a row
  int parts;       // of a row
  int part_tiles;  // of each part; the first `larger_parts` have one more
  int larger_parts;
};

constexpr int kMaxTileSteps = 4;
constexpr int kBins = 2048;              // of the histogram over a row, the first step of filters
constexpr int64_t kMaxVocabulary = (int64_t{1} << 31) - (1 << 16);

// What is still to be done for a row's filters. Pending: the row has some. Histogram: its counts are needed to find the
// bins that contain the thresholds.
enum Search : int { kSearchTopK = 1, kSearchTopP = 2, kSearchPending = 4, kSearchHistogram = 8 };

// A model's sum of e^logit over a row, e^top * e^log_mass; two numbers, since log_mass may be lost in a sum with top.
struct Normaliser {
  double log_mass;
  float top;
};

// A row's state between the passes of filters.
struct RowState {
  double total;                  // of e^(z - top)
  Normaliser normalisers[kMaxModels];  // where requested
  float top;                     // max z
  float floor;                   // min-p's threshold; -inf: none
  int search;                    // of Search; 0: the row's token is written
  int first_bin, last_bin;       // that contain the thresholds of top-k and top-p, or else min-p's
  unsigned above;                // elements in the bins before first_bin
};

struct Candidate {
  float z;
  int index;
};

enum Counter : int { kStreamed, kCounted, kGathered, kCandidates, kCounters };

// How a row's blocks find out that all of them have streamed: the last one by a counter in memory, or all by the
// hardware barrier of a cluster, which the row's blocks then are.
enum Arrival : int { kByCounter = 1, kByCluster = 2 };
constexpr int kLargestCluster = 8;  // that every GPU with clusters has

constexpr int kAllEx2 = 8, kLeastEx2 = 6;  // of every eight exponentials, those left to ex2

struct Params {
  MixtureSample p;
  Plan plan;
  int ex2;                      // of every eight exponentials, where some may be computed otherwise
  int arrival;                  // of Arrival
  int lookahead;                // 2: a step's lines are fetched into the second-level cache a step earlier
  unsigned* counters;           // (rows, kCounters), all 0 between calls
  float2* sums;                 // (rows, models + 1, tiles) top and mass, the mixture last
  RowState* states;             // (rows); from here on only with filters
  unsigned* bins;               // (rows, kBins), zeroed by the first kernel
  double* kept_mass;                 // (rows, tiles) mass above the bracket
  unsigned long long* candidate_mass;  // (rows, tiles) mass of the kept candidates, in fixed point
  Candidate* candidates;        // (rows, capacity)
  int capacity;

  __device__ __forceinline__ float2* tile_sums(int64_t row, int which) const {
    return sums + (row * (p.models + 1) + which) * plan.tiles;
  }
  __device__ __forceinline__ int tile_elements() const { return plan.tile_steps * kStep; }
};

inline int64_t steps_of(int64_t vocabulary) { return (vocabulary + kStep - 1) / kStep; }

// Divides the workspace into arrays; with a null start it only computes their size.
class Layout {
 public:
  explicit Layout(void* start) : start_(reinterpret_cast<std::uintptr_t>(start)) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    T* piece = reinterpret_cast<T*>(start_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  std::uintptr_t start_;
  int64_t used_ = 0;
};

// Lay out the workspace for rows of `tiles` tiles and return its size.
inline int64_t lay_out(Params& params, int64_t rows, int64_t vocabulary, int models, bool filtered, int64_t tiles,
                       void* workspace) {
  Layout layout(workspace);
  params.counters = layout.take<unsigned>(rows * kCounters);
  params.sums = layout.take<float2>(rows * (models + 1) * tiles);
  if (filtered) {
    // Gaussian logits have a few thousand candidates, a model's logits fewer; a row with more is searched whole.
    params.capacity = static_cast<int>(std::min<int64_t>(vocabulary, std::max<int64_t>(8192, vocabulary / 16)));
    params.states = layout.take<RowState>(rows);
    params.bins = layout.take<unsigned>(rows * kBins);
    params.kept_mass = layout.take<double>(rows * tiles);
    params.candidate_mass = layout.take<unsigned long long>(rows * tiles);
    params.candidates = layout.take<Candidate>(rows * params.capacity);
  }
  return layout.used();
}

// Blocks of a multiprocessor at once: registers for 768 threads, whose loads are enough to keep the memory busy.
constexpr int kResidentBlocks = 3;
// Four models' weights, addresses and sums do not fit into the registers of so many.
constexpr int resident_blocks(int models) { return models > 2 ? 2 : kResidentBlocks; }

// Divide a row into parts of at most `part_tiles` tiles, as equal as possible: the slowest block ends the launch.
inline Plan divide_row(int64_t vocabulary, int tile_steps, int part_tiles) {
  const int64_t tiles = (steps_of(vocabulary) + tile_steps - 1) / tile_steps;
  const int64_t parts = (tiles + part_tiles - 1) / part_tiles;
  return {tile_steps, static_cast<int>(tiles), static_cast<int>(parts), static_cast<int>(tiles / parts),
          static_cast<int>(tiles % parts)};
}

// Choose tiles and parts for the least time of the busiest multiprocessor, in cycles, on paper: the fewer blocks are
// resident, the more of the loads' latency it waits out (a closed queueing network of warps, loads and schedulers gives
// about 75 + 200 / blocks cycles a step); a block ends no earlier than the latency of its rounds (a tile for each of its
// warps); blocks beyond kResidentBlocks wait for others to end; a row's arrivals are counted one by one.
inline MixtureSamplePlan default_plan(int64_t rows, int64_t vocabulary, int multiprocessors) {
  constexpr int kPartTiles[] = {1, 2, 4, kWarps, 2 * kWarps, 3 * kWarps, 4 * kWarps, 6 * kWarps, 8 * kWarps};
  constexpr int64_t kTileCycles = 20, kLatency = 1500, kBlockCycles = 500, kArrivalCycles = 4;
  MixtureSamplePlan best{};
  int64_t least = INT64_MAX;
  for (int tile_steps = 1; tile_steps <= kMaxTileSteps; ++tile_steps) {
    for (const int part_tiles : kPartTiles) {
      const Plan plan = divide_row(vocabulary, tile_steps, part_tiles);
      const int64_t tiles = plan.part_tiles + (plan.larger_parts > 0);
      const int64_t blocks = std::max<int64_t>(1, (rows * plan.parts + multiprocessors - 1) / multiprocessors);
      const int64_t waves = (blocks + kResidentBlocks - 1) / kResidentBlocks;
      const int64_t step_cycles = 75 + 200 / std::min<int64_t>(blocks, kResidentBlocks);
      const int64_t work = blocks * tiles * (tile_steps * step_cycles + kTileCycles);
      const int64_t latency = waves * ((tiles + kWarps - 1) / kWarps) * tile_steps * kLatency;
      const int64_t cost = std::max(work, latency) + waves * kBlockCycles + plan.parts * kArrivalCycles;
      if (cost < least) {
        least = cost;
        best = {tile_steps, part_tiles, kAllEx2, kByCounter, 1};
      }
      if (plan.parts == 1) break;
    }
  }
  return best;
}

// Increment a counter, from `last` to 0, so that it is 0 again after the last arrival; return the count before. Writes
// of the thread's block are visible to blocks that arrive later.
NLHF_DEVICE unsigned count_arrival(unsigned* counter, unsigned last) {
#if defined(__CUDACC__)
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return before;
#else
  return atomicInc(counter, last);
#endif
}

// Return whether the calling block is the last of its row's `parts` to arrive; it then sees the others' earlier writes.
NLHF_DEVICE bool last_of_row(unsigned* arrived, int parts, bool* shared) {
  __syncthreads();
  if (parts == 1) return true;
  const unsigned last = static_cast<unsigned>(parts) - 1;
  if (threadIdx.x == 0) *shared = count_arrival(arrived, last) == last;
  __syncthreads();
  return *shared;
}

// Wait for all blocks of the cluster, whose earlier writes are then visible; return whether the calling one is its first.
NLHF_DEVICE bool first_of_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" : : : "memory");
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank == 0;
#else
  return false;  // there are no clusters to launch
#endif
}

// Return whether the calling block finishes its row. The emulated runtime runs blocks one after the other, so there the
// last one does in either way.
NLHF_DEVICE bool streamed_last(const Params& params, int64_t row, bool* shared) {
#if defined(__CUDACC__)
  if (params.arrival == kByCluster) return first_of_cluster();
#endif
  return last_of_row(params.counters + row * kCounters + kStreamed, params.plan.parts, shared);
}

}  // namespace
}  // namespace nlhf
