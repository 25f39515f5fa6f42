// The types of CUDA's headers that the kernels use, for the CPU build.
#pragma once

#include <cstdint>
#include <cstring>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace shim {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float widen(Bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// To the nearest, ties to even; a NaN stays one.
inline Bfloat16 to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float widen(Float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3FF;
    if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 0x1p-24f;  // exact
    return sign ? -small : small;
}

// To the nearest, ties to even; too large is infinite; a NaN stays one.
inline Float16 to_float16(float value) {
    const uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
    if (size >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65520 and above
    if (size < 0x38800000) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits
        const uint32_t shifted = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
        return {static_cast<uint16_t>(sign | shifted)};
    }
    const uint32_t rounded = size + 0xFFF + (size >> 13 & 1);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
}

}  // namespace shim
