// bfloat16 and float16 as float32, from their bits and without a branch, so that loops over them vectorise at every
// level. Both conversions are exact; infinities and NaN stay what they are.
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

// The exponent and mantissa, moved to where float32 has them, are the number times 2^-112: 2^112 puts the exponent
// right, subnormals included. Exponent 31, infinity and NaN, must become 255.
NLHF_HOST_DEVICE float f16_to_float(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  uint32_t result;
  std::memcpy(&result, &scaled, sizeof result);
  result = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : result;
  return float_from_bits(result | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

}  // namespace nlhf
