// Replaces NVIDIA's header of this name: IEEE half precision as storage, converted to and from float.
#pragma once

#include "cuda_runtime.h"

namespace emulation {

inline float half_to_float(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 0x3FFu;
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | mantissa << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
}

inline unsigned short float_to_half(float value) {
  const unsigned raw = __float_as_uint(value), sign = raw >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (value != value) return static_cast<unsigned short>(sign | 0x7E00u);
  if (magnitude >= 65520.0f) return static_cast<unsigned short>(sign | 0x7C00u);  // rounds beyond the largest half
  if (magnitude < 0x1p-14f) {  // subnormal: an integer multiple of 2^-24, and nearbyint rounds ties to even
    return static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(magnitude * 0x1p24f)));
  }
  const unsigned absolute = raw & 0x7FFFFFFFu;
  const unsigned rounded = absolute + 0xFFFu + (absolute >> 13 & 1u);
  return static_cast<unsigned short>(sign | ((rounded - (112u << 23)) >> 13));
}

}  // namespace emulation

struct __half {
  unsigned short bits;
  __half() = default;
  __half(float value) : bits(emulation::float_to_half(value)) {}
  operator float() const { return emulation::half_to_float(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};

typedef __half half;
typedef __half2 half2;

inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline __half2 __float22half2_rn(float2 pair) { return {pair.x, pair.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float __low2float(__half2 pair) { return pair.x; }
inline float __high2float(__half2 pair) { return pair.y; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return emulation::same_bits<__half>(bits); }
