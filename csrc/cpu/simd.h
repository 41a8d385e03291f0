// Vectors of one register, for the instruction set that this file is compiled for.
//
// Kernel files are compiled once per instruction set, each time in a namespace of its own (CAMTL_ISA: avx512,
// avx2 or baseline); dispatch.cpp picks one when the program runs. Only this file knows register widths. No
// standard-library template may be used in kernel files: one compiled for AVX-512 could be the copy that the
// linker keeps for all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "camtl/common.h"

#define CAMTL_INLINE inline __attribute__((always_inline))

namespace camtl::cpu::CAMTL_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif

// Storage types. bf16 and f16 hold bits: arithmetic happens after load().
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class S>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};
// What a storage type is computed in: float, or double for double.
template <class S>
using acc_t = typename AccOf<S>::type;

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(kRegisterBytes)));
    typedef int32_t ints __attribute__((vector_size(kRegisterBytes)));
    typedef uint16_t halves __attribute__((vector_size(kRegisterBytes / 2)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(kRegisterBytes)));
    typedef int64_t ints __attribute__((vector_size(kRegisterBytes)));
};
template <class A>
using vec = typename VecOf<A>::type;
template <class A>
using veci = typename VecOf<A>::ints;

// Lanes of a vector of A.
template <class A>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(A));

// A lane count known to the compiler; a plain int is one that is not (the end of a row).
template <int N>
struct Full {
    constexpr operator int() const { return N; }
};

// body(i, n) for the vectors of a row: n is Full for whole ones, an int for the rest.
template <class A, class F>
CAMTL_INLINE void each_vector(int64_t size, F&& body) {
    constexpr int W = kLanes<A>;
    int64_t i = 0;
    for (; i + W <= size; i += W) {
        body(i, Full<W>{});
    }
    if (i < size) {
        body(i, static_cast<int>(size - i));
    }
}

template <class A>
CAMTL_INLINE vec<A> splat(A value) {
    return value - vec<A>{};
}

CAMTL_INLINE vec<float> widen_bf16(typename VecOf<float>::halves bits) {
    typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));
    const words wide = __builtin_convertvector(bits, words) << 16;
    vec<float> value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

CAMTL_INLINE typename VecOf<float>::halves narrow_bf16(vec<float> value) {
    typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));
    words bits;
    std::memcpy(&bits, &value, sizeof bits);
    const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const words quiet = (bits >> 16) | 0x40u;                            // NaN stays NaN
    const words result = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    return __builtin_convertvector(result, typename VecOf<float>::halves);
}

CAMTL_INLINE vec<float> widen_f16(typename VecOf<float>::halves bits) {
#if defined(__AVX512F__)
    __m256i raw;
    std::memcpy(&raw, &bits, sizeof raw);
    return (vec<float>)_mm512_cvtph_ps(raw);
#elif defined(__F16C__)
    __m128i raw;
    std::memcpy(&raw, &bits, sizeof raw);
    return (vec<float>)_mm256_cvtph_ps(raw);
#else
    typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));
    const words wide = __builtin_convertvector(bits, words);
    const words magnitude = (wide & 0x7fffu) << 13;
    vec<float> value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;  // the exponent's new bias; exact, also for subnormal halves
    words result;
    std::memcpy(&result, &value, sizeof result);
    result = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : result;  // infinity, NaN
    result |= (wide & 0x8000u) << 16;
    std::memcpy(&value, &result, sizeof value);
    return value;
#endif
}

CAMTL_INLINE typename VecOf<float>::halves narrow_f16(vec<float> value) {
    typename VecOf<float>::halves bits;
#if defined(__AVX512F__)
    const __m256i raw = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(&bits, &raw, sizeof bits);
#elif defined(__F16C__)
    const __m128i raw = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(&bits, &raw, sizeof bits);
#else
    typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));
    words all;
    std::memcpy(&all, &value, sizeof all);
    const words sign = (all >> 16) & 0x8000u;
    const words magnitude = all & 0x7fffffffu;
    // Normal: rebias the exponent and round to even at bit 13. Subnormal: adding 0.5 leaves the rounded
    // mantissa in the low bits.
    const words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    vec<float> small;
    std::memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    words subnormal;
    std::memcpy(&subnormal, &small, sizeof subnormal);
    subnormal -= 0x3f000000u;
    words result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? (words{} + 0x7c00u) : result;  // rounds to infinity
    result = magnitude > 0x7f800000u ? (words{} + 0x7e00u) : result;   // NaN
    bits = __builtin_convertvector(result | sign, typename VecOf<float>::halves);
#endif
    return bits;
}

// load: n elements of storage type S as a vector of acc_t<S>, the rest 0. Any alignment.
template <class N>
CAMTL_INLINE vec<float> load(const float* p, N n) {
    vec<float> v{};
    std::memcpy(&v, p, sizeof(float) * static_cast<std::size_t>(static_cast<int>(n)));
    return v;
}
template <class N>
CAMTL_INLINE vec<double> load(const double* p, N n) {
    vec<double> v{};
    std::memcpy(&v, p, sizeof(double) * static_cast<std::size_t>(static_cast<int>(n)));
    return v;
}
template <class N>
CAMTL_INLINE vec<float> load(const bf16* p, N n) {
    typename VecOf<float>::halves bits{};
    std::memcpy(&bits, p, sizeof(bf16) * static_cast<std::size_t>(static_cast<int>(n)));
    return widen_bf16(bits);
}
template <class N>
CAMTL_INLINE vec<float> load(const f16* p, N n) {
    typename VecOf<float>::halves bits{};
    std::memcpy(&bits, p, sizeof(f16) * static_cast<std::size_t>(static_cast<int>(n)));
    return widen_f16(bits);
}

// store: the first n lanes, rounded to nearest even.
template <class N>
CAMTL_INLINE void store(float* p, vec<float> v, N n) {
    std::memcpy(p, &v, sizeof(float) * static_cast<std::size_t>(static_cast<int>(n)));
}
template <class N>
CAMTL_INLINE void store(double* p, vec<double> v, N n) {
    std::memcpy(p, &v, sizeof(double) * static_cast<std::size_t>(static_cast<int>(n)));
}
template <class N>
CAMTL_INLINE void store(bf16* p, vec<float> v, N n) {
    const auto bits = narrow_bf16(v);
    std::memcpy(p, &bits, sizeof(bf16) * static_cast<std::size_t>(static_cast<int>(n)));
}
template <class N>
CAMTL_INLINE void store(f16* p, vec<float> v, N n) {
    const auto bits = narrow_f16(v);
    std::memcpy(p, &bits, sizeof(f16) * static_cast<std::size_t>(static_cast<int>(n)));
}

// Sum of all lanes, always in the same order (a tree).
template <class A>
CAMTL_INLINE A sum(vec<A> v) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof v);
    for (int half = kLanes<A> / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

template <class A>
CAMTL_INLINE vec<A> vmax(vec<A> a, vec<A> b) {
    return a > b ? a : b;
}

template <class A>
CAMTL_INLINE A largest(vec<A> v) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof v);
    for (int half = kLanes<A> / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
        }
    }
    return lanes[0];
}

// e^x to about 1 ulp; 0 below -87.33 (also for -inf), infinity above 88.72. x = n ln 2 + r, |r| <= ln 2 / 2: the
// Taylor series of e^r to r^7 leaves a relative error of 5e-9. 2^n in two factors, as n may be 128.
CAMTL_INLINE vec<float> vexp(vec<float> x) {
    constexpr float kLowest = -87.33654f, kHighest = 88.72284f;
    vec<float> y = x < kLowest ? splat(kLowest) : x;
    y = y > kHighest ? splat(kHighest) : y;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const vec<float> shifted = y * 1.44269504f + kRound;
    const vec<float> n = shifted - kRound;
    vec<float> r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec<float> p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const veci<float> whole = __builtin_convertvector(n, veci<float>);
    const veci<float> first = whole >> 1;
    const veci<float> factor_bits_1 = (first + 127) << 23;
    const veci<float> factor_bits_2 = (whole - first + 127) << 23;
    vec<float> factor_1, factor_2;
    std::memcpy(&factor_1, &factor_bits_1, sizeof factor_1);
    std::memcpy(&factor_2, &factor_bits_2, sizeof factor_2);
    p = p * factor_1 * factor_2;
    p = x < kLowest ? splat(0.0f) : p;
    p = x > kHighest ? splat(INFINITY) : p;
    return x == x ? p : x;
}
// float64 is for checks and gradients of gradcheck, not for speed: the C library, lane by lane.
CAMTL_INLINE vec<double> vexp(vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) {
        x[i] = std::exp(x[i]);
    }
    return x;
}

}  // namespace camtl::cpu::CAMTL_ISA
