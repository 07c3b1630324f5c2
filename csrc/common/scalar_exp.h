// exp of one double, bit for bit the same on the CPU and on a GPU: no table, no branch, no libm. The vectorised forms
// are in simd_float.h and simd_double.h.
//
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, with exp(r) as its Taylor polynomial of degree 13, which
// leaves 4e-18: under half an ulp. Adding 1.5 * 2^52 rounds to an integer and leaves n in the low bits of the sum,
// and a shift turns n into the exponent of 2^n.
//
// Arguments are at most 0 here (a maximum was subtracted); below `flush` the result is exactly 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace nlhf {

NLHF_HOST_DEVICE double exp_nonpositive(double x) {
  constexpr double flush = -708.0, magic = 0x1.8p52;
  const double clamped = x < flush ? flush : x;
  const double shifted = clamped * 0x1.71547652b82fep0 + magic;
  const double n = shifted - magic;
  const double r = (clamped - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;  // ln 2 in two pieces
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int64_t>(static_cast<uint64_t>(bits + 1023) << 52);
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < flush ? 0.0 : p * scale;
}

}  // namespace nlhf
