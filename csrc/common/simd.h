// A vector of the level's width, by the compilers' vector extensions: values stay in registers, which for an array is
// up to the optimiser. Include in files that are compiled per level only.
#pragma once

#include <cstdint>
#include <utility>

namespace nlhf {
namespace NLHF_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Real>
struct VectorOf {
  typedef Real Type __attribute__((vector_size(kVectorBytes), aligned(sizeof(Real)), may_alias));
  static constexpr int64_t lanes = kVectorBytes / sizeof(Real);
};

template <typename Real>
using Vector = typename VectorOf<Real>::Type;

template <typename Real>
static inline Vector<Real> load(const Real* from) {
  return *reinterpret_cast<const Vector<Real>*>(from);
}

template <typename Real>
static inline void store(Real* to, Vector<Real> values) {
  *reinterpret_cast<Vector<Real>*>(to) = values;
}

template <typename Real>
static inline Vector<Real> broadcast(Real value) {
  return value - Vector<Real>{};
}

// Return the larger of each lane; `best` where `x` is NaN, so NaN loses against any number.
template <typename Values>
static inline Values larger(Values x, Values best) {
  return x > best ? x : best;
}

// Return a vector whose lane i is lane i ^ distance of `values`.
template <int distance, typename Values, int... lane>
static inline Values exchanged(Values values, std::integer_sequence<int, lane...>) {
  return Values{values[lane ^ distance]...};
}

// Combine all lanes by `combine`, with the result in every lane: a tree of exchanges between registers.
template <typename Real, int distance = VectorOf<Real>::lanes / 2, typename Combine>
static inline Vector<Real> over_lanes(Vector<Real> values, const Combine& combine) {
  if constexpr (distance == 0) {
    return values;
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, VectorOf<Real>::lanes>();
    return over_lanes<Real, distance / 2>(combine(values, exchanged<distance>(values, lanes)), combine);
  }
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
