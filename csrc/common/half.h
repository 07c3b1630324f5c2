// bfloat16 and float16 as float32, from their bits and without a branch, so that loops over them vectorise at every
// level, and back, rounded to nearest even. Infinities and NaN are preserved.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace nlhf {

NLHF_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

NLHF_HOST_DEVICE float bf16_to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// Exponent and mantissa, shifted to their places in float32, read as the number times 2^-112; the product with 2^112
// corrects that, subnormals included. Exponent 31 (infinity and NaN) must become 255.
NLHF_HOST_DEVICE float f16_to_float(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  uint32_t result;
  std::memcpy(&result, &scaled, sizeof result);
  result = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : result;
  return float_from_bits(result | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

NLHF_HOST_DEVICE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

NLHF_HOST_DEVICE uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : nearest);
}

// Normal numbers are rounded in place and their exponent is re-biased; below 2^-14 the sum with 0.5 is rounded to
// float16's smallest step and has the result in its low bits; from 65536 on the result is infinity, as it is by
// rounding from 65520 on.
NLHF_HOST_DEVICE uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of_float(float_from_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  const uint32_t beyond = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? beyond : result;
  return static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

}  // namespace nlhf
