// mirror_descent on the CPU: games over threads; one game's preference matrix stays in the core's cache while all its
// iterations run, which is where the time against a PyTorch loop is won.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "../common/vector_math.h"
#include "mirror_descent.h"

namespace nlhf {
namespace NLHF_LEVEL {
namespace {

template <typename Real>
Real maximum(const Real* x, int64_t n) {
  Real best = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// out = exp(x - max x); returns the sum. A row of -inf only has no distribution: it gives NaN, as PyTorch's softmax.
template <typename Real>
Real exponentials(const Real* x, int64_t n, Real* out) {
  const Real top = maximum(x, n);
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real distance = x[i] - top;
    out[i] = distance == distance ? exp_nonpositive(distance) : distance;
    sum += out[i];
  }
  return sum;
}

// (1 - b) log_policy + b log_reference; an end of the interval must not touch the other side: 0 * -inf is NaN.
template <typename Real>
void mix(const Real* log_policy, const Real* log_reference, Real b, int64_t n, Real* out) {
  if (b == 0 || b == 1) {
    std::memcpy(out, b == 0 ? log_policy : log_reference, n * sizeof(Real));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (1 - b) * log_policy[i] + b * log_reference[i];
}

// Four rows a pass: each load of the opponent feeds four products.
template <typename Real>
void add_expected_preference(const Real* preference, const Real* opponent, Real scale, int64_t n, Real* target) {
  int64_t a = 0;
  for (; a + 4 <= n; a += 4) {
    const Real *row0 = preference + a * n, *row1 = row0 + n, *row2 = row1 + n, *row3 = row2 + n;
    Real sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < n; ++i) {
      sum0 += row0[i] * opponent[i];
      sum1 += row1[i] * opponent[i];
      sum2 += row2[i] * opponent[i];
      sum3 += row3[i] * opponent[i];
    }
    target[a] += scale * sum0;
    target[a + 1] += scale * sum1;
    target[a + 2] += scale * sum2;
    target[a + 3] += scale * sum3;
  }
  for (; a < n; ++a) {
    const Real* row = preference + a * n;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += row[i] * opponent[i];
    target[a] += scale * sum;
  }
}

// All iterations of one game. log_policy stays unnormalised until the end: a constant of the row changes no softmax.
template <typename Real>
void solve_game(const MirrorDescent<Real>& p, int64_t game, Real* opponent, Real* mixture) {
  const int64_t n = p.actions;
  const Real* preference = p.preference + game * n * n;
  const Real* log_reference = p.log_reference + game * n;
  const Real tau = p.tau[game * p.tau_stride];
  Real* log_policy = p.out + game * n;
  std::memcpy(log_policy, p.log_policy + game * n, n * sizeof(Real));
  for (int64_t k = 0; k < p.iterations; ++k) {
    const Real step = p.step_sizes[k];
    mix(log_policy, log_reference, step * tau, n, mixture);
    const Real sum = exponentials(p.opponent_is_mixture ? mixture : log_policy, n, opponent);
    add_expected_preference(preference, opponent, step / sum, n, mixture);
    std::memcpy(log_policy, mixture, n * sizeof(Real));
  }
  const Real top = maximum(log_policy, n);
  const Real normaliser = top + std::log(exponentials(log_policy, n, opponent));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) log_policy[i] -= normaliser;
}

template <typename Real>
void solve(const MirrorDescent<Real>& problem, int threads) {
  const MirrorDescent<Real> p = problem;
  bool out_of_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1 && p.games > 1)
  {
    Real* scratch = static_cast<Real*>(std::malloc(2 * p.actions * sizeof(Real)));
    if (scratch == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp for schedule(static)
    for (int64_t game = 0; game < p.games; ++game) {
      if (scratch != nullptr) solve_game(p, game, scratch, scratch + p.actions);
    }
    std::free(scratch);
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void mirror_descent_f32(const MirrorDescent<float>& problem, int threads) { solve(problem, threads); }
void mirror_descent_f64(const MirrorDescent<double>& problem, int threads) { solve(problem, threads); }

}  // namespace NLHF_LEVEL
}  // namespace nlhf
