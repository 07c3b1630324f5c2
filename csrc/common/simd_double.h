// exp on whole vectors of float64, in registers. Include in files that are compiled per level only.
#pragma once

#include <cstdint>

#include "simd.h"

namespace nlhf {
namespace NLHF_LEVEL {
using Doubles = Vector<double>;

// exp of arguments at most 0, to 1 ulp; 0 below -708, NaN for NaN. As for float32 in simd_float.h; the polynomial is
// the minimax one of degree 11 with p(0) = p'(0) = 1 (relative error 1e-17).
static inline Doubles exp_nonpositive(Doubles x) {
  constexpr double flush = -708.0, magic = 0x1.8p52 + 1023.0;
  const Doubles shifted = x * 0x1.71547652b82fep0 + magic;
  const Doubles n = shifted - magic;
  const Doubles r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;
  Doubles p = r * 0x1.ad7f754cee86ap-26 + 0x1.28ad68af958e1p-22;
  p = p * r + 0x1.71df253d8f312p-19;
  p = p * r + 0x1.a0199a16d5e8ep-16;
  p = p * r + 0x1.a01a012a684f4p-13;
  p = p * r + 0x1.6c16c18426709p-10;
  p = p * r + 0x1.1111111127b9fp-7;
  p = p * r + 0x1.555555555088cp-5;
  p = p * r + 0x1.55555555554fap-3;
  p = p * r + 0x1.000000000000ap-1;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const Doubles scale = (Doubles)((Vector<uint64_t>)shifted << 52);
  return x < flush ? Doubles{} : p * scale;
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
