// Test only: half precision by its bits, slowly.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half v) {
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    float value = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                  : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                  : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return v.bits & 0x8000 ? -value : value;
}

inline __half __float2half_rn(float v) {
    const uint16_t sign = static_cast<uint16_t>(__float_as_uint(v) >> 16 & 0x8000);
    const float magnitude = std::fabs(v);
    if (v != v) {
        return {0x7fff};
    }
    if (magnitude == 0.0f) {
        return {sign};
    }
    if (magnitude >= 65520.0f) {
        return {static_cast<uint16_t>(sign | 0x7c00)};
    }
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // the last bit's weight; subnormal below 2^-14
    const float steps = std::nearbyint(std::ldexp(magnitude, -unit));  // ties to even
    const int whole = static_cast<int>(steps);
    const int biased = unit + 24;  // 0: subnormal, or the first binade
    return {static_cast<uint16_t>(sign + (biased << 10) + whole)};
}
