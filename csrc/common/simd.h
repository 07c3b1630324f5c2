// A vector of the level's width, through the compilers' vector extensions: values stay in registers where an array
// would be left to the optimiser. Include in files that are compiled per level only.
#pragma once

#include <cstdint>

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

}  // namespace NLHF_LEVEL
}  // namespace nlhf
