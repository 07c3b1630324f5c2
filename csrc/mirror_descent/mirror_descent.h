// mirror_descent: K steps of regularised mirror descent on G preference games, one launch. See ops/mirror_descent.
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

int mirror_descent_f32_cuda(const MirrorDescent<float>& problem, void* cuda_stream);  // a cudaError_t
int mirror_descent_f64_cuda(const MirrorDescent<double>& problem, void* cuda_stream);

}  // namespace nlhf
