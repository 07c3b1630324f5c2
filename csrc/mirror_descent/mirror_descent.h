// mirror_descent: K steps of regularised mirror descent on G preference games. See nlhf_kernels/ops/mirror_descent.
#pragma once

#include <cstdint>

#include "../common/levels.h"

namespace nlhf {

// fixed: the same log_opponent in every iteration.
enum class Opponent : int { policy = 0, mixture = 1, fixed = 2 };

template <typename Real>
struct MirrorDescent {
  const Real* log_policy;     // (games, actions)
  const Real* preference;     // (games, actions, actions), [a][b] = P(a > b)
  const Real* log_reference;  // (games, actions)
  const Real* tau;
  int64_t tau_stride;      // 0: one tau for all games
  const Real* step_sizes;  // (iterations)
  int64_t games;
  int64_t actions;
  int64_t iterations;
  Opponent opponent;
  const Real* log_opponent;  // (games, actions) where the opponent is fixed, unnormalised is fine; else unused
  Real* out;                 // (games, actions), normalised log-probabilities; may not alias log_policy
};

NLHF_DECLARE_CPU(mirror_descent_f32, MirrorDescent<float>)
NLHF_DECLARE_CPU(mirror_descent_f64, MirrorDescent<double>)

// How games are launched on a GPU.
struct MirrorDescentPlan {
  int parts;    // blocks a game; beyond 1 every iteration is a launch of its own
  int threads;  // of a block: a multiple of 32, at most 512; not used for one block a game of at most 128 actions
};

// Write the default plan for the current device. Return a cudaError_t, as the functions below do.
int mirror_descent_plan(bool is_double, int64_t games, int64_t actions, MirrorDescentPlan* plan);
// Return the bytes of device memory that a launch needs beside its output.
int64_t mirror_descent_workspace(bool is_double, int64_t games, int64_t actions, int parts);
int mirror_descent_f32_cuda(const MirrorDescent<float>& problem, MirrorDescentPlan plan, void* workspace,
                            void* cuda_stream);
int mirror_descent_f64_cuda(const MirrorDescent<double>& problem, MirrorDescentPlan plan, void* workspace,
                            void* cuda_stream);

}  // namespace nlhf
