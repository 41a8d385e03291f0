// What is done with vectors, beside their operators: conversions, loads and stores, sums of lanes, exponentials.
#pragma once

#include "vec.h"

namespace camtl::cpu::CAMTL_ISA {

CAMTL_INLINE vec<float> widen_bf16(typename VecOf<float>::halves bits) {
#if defined(__AVX512F__)
    return (vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
    return (vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));
    const words wide = __builtin_convertvector(bits, words) << 16;
    vec<float> value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
#endif
}

CAMTL_INLINE typename VecOf<float>::halves narrow_bf16(vec<float> value) {
    typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));
    words bits;
    std::memcpy(&bits, &value, sizeof bits);
    words result = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    result = (value == value ? result : bits | 0x400000u) >> 16;  // NaN stays NaN
#if defined(__AVX512F__)
    return (VecOf<float>::halves)_mm512_cvtepi32_epi16((__m512i)result);
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)result, (__m256i)result);
    return (VecOf<float>::halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
#else
    return __builtin_convertvector(result, typename VecOf<float>::halves);
#endif
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

// v with 0 in the lanes from n on.
template <class A, class N>
CAMTL_INLINE vec<A> first_lanes(vec<A> v, N n) {
    if constexpr (kIsFull<N>) {
        return v;
    } else {
        return lane_numbers<A>() < n ? v : vec<A>{};
    }
}

// Parts of vectors, 0 < n < their lanes: by mask where the instruction set can. A memcpy of n elements would be a
// call of the C library.
#if defined(__AVX512F__)
CAMTL_INLINE __mmask16 mask_of(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
CAMTL_INLINE vec<float> load_part(const float* p, int n) { return (vec<float>)_mm512_maskz_loadu_ps(mask_of(n), p); }
CAMTL_INLINE vec<double> load_part(const double* p, int n) {
    return (vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask_of(n)), p);
}
CAMTL_INLINE VecOf<float>::halves load_part(const uint16_t* p, int n) {
    return (VecOf<float>::halves)_mm256_maskz_loadu_epi16(mask_of(n), p);
}
CAMTL_INLINE void store_part(float* p, vec<float> v, int n) { _mm512_mask_storeu_ps(p, mask_of(n), (__m512)v); }
CAMTL_INLINE void store_part(double* p, vec<double> v, int n) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask_of(n)), (__m512d)v);
}
CAMTL_INLINE void store_part(uint16_t* p, VecOf<float>::halves v, int n) {
    _mm256_mask_storeu_epi16(p, mask_of(n), (__m256i)v);
}
#else
// The first `bytes`, an even number, of a vector of Size bytes, in pieces of sizes that the compiler knows.
template <int Size>
CAMTL_INLINE void copy_part(void* to, const void* from, int bytes) {
    char* t = static_cast<char*>(to);
    const char* f = static_cast<const char*>(from);
    const auto piece = [&](auto size) {
        if constexpr (size < Size) {
            if ((bytes & size) != 0) {
                std::memcpy(t, f, static_cast<std::size_t>(static_cast<int>(size)));
                t += size;
                f += size;
            }
        }
    };
    piece(Full<16>{});
    piece(Full<8>{});
    piece(Full<4>{});
    piece(Full<2>{});
}
#if defined(__AVX2__)
CAMTL_INLINE vec<float> load_part(const float* p, int n) {
    return (vec<float>)_mm256_maskload_ps(p, (__m256i)(lane_numbers<float>() < n));
}
CAMTL_INLINE vec<double> load_part(const double* p, int n) {
    return (vec<double>)_mm256_maskload_pd(p, (__m256i)(lane_numbers<double>() < n));
}
CAMTL_INLINE void store_part(float* p, vec<float> v, int n) {
    _mm256_maskstore_ps(p, (__m256i)(lane_numbers<float>() < n), (__m256)v);
}
CAMTL_INLINE void store_part(double* p, vec<double> v, int n) {
    _mm256_maskstore_pd(p, (__m256i)(lane_numbers<double>() < n), (__m256d)v);
}
#else
template <class A>
CAMTL_INLINE vec<A> load_part(const A* p, int n) {
    vec<A> v{};
    copy_part<sizeof v>(&v, p, static_cast<int>(sizeof(A)) * n);
    return v;
}
template <class A>
CAMTL_INLINE void store_part(A* p, vec<A> v, int n) {
    copy_part<sizeof v>(p, &v, static_cast<int>(sizeof(A)) * n);
}
#endif
CAMTL_INLINE VecOf<float>::halves load_part(const uint16_t* p, int n) {
    VecOf<float>::halves v{};
    copy_part<sizeof v>(&v, p, 2 * n);
    return v;
}
CAMTL_INLINE void store_part(uint16_t* p, VecOf<float>::halves v, int n) { copy_part<sizeof v>(p, &v, 2 * n); }
#endif

template <class V, class E, class N>
CAMTL_INLINE V load_lanes(const E* p, N n) {
    if constexpr (kIsFull<N>) {
        static_assert(static_cast<int>(sizeof(V) / sizeof(E)) == N{});
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    } else {
        return load_part(p, n);
    }
}
template <class V, class E, class N>
CAMTL_INLINE void store_lanes(E* p, V v, N n) {
    if constexpr (kIsFull<N>) {
        static_assert(static_cast<int>(sizeof(V) / sizeof(E)) == N{});
        std::memcpy(p, &v, sizeof v);
    } else {
        store_part(p, v, n);
    }
}

// load: n elements of storage type S as a vector of acc_t<S>, the rest 0. Any alignment.
template <class N>
CAMTL_INLINE vec<float> load(const float* p, N n) {
    return load_lanes<vec<float>>(p, n);
}
template <class N>
CAMTL_INLINE vec<double> load(const double* p, N n) {
    return load_lanes<vec<double>>(p, n);
}
template <class N>
CAMTL_INLINE vec<float> load(const bf16* p, N n) {
    return widen_bf16(load_lanes<VecOf<float>::halves>(&p->bits, n));
}
template <class N>
CAMTL_INLINE vec<float> load(const f16* p, N n) {
    return widen_f16(load_lanes<VecOf<float>::halves>(&p->bits, n));
}

// store: the first n lanes, rounded to nearest even.
template <class N>
CAMTL_INLINE void store(float* p, vec<float> v, N n) {
    store_lanes(p, v, n);
}
template <class N>
CAMTL_INLINE void store(double* p, vec<double> v, N n) {
    store_lanes(p, v, n);
}
template <class N>
CAMTL_INLINE void store(bf16* p, vec<float> v, N n) {
    store_lanes(&p->bits, narrow_bf16(v), n);
}
template <class N>
CAMTL_INLINE void store(f16* p, vec<float> v, N n) {
    store_lanes(&p->bits, narrow_f16(v), n);
}

// All lanes into one, always in the same order: halves onto each other.
template <class A, int Half = kLanes<A> / 2, class F>
CAMTL_INLINE vec<A> fold_lanes(vec<A> v, F&& combine) {
    if constexpr (Half == 0) {
        return v;
    } else {
        return fold_lanes<A, Half / 2>(combine(v, permute(v, v, lane_numbers<A>() + Half)), combine);
    }
}

// Sum of all lanes.
template <class A>
CAMTL_INLINE A sum(vec<A> v) {
    return fold_lanes<A>(v, [](vec<A> a, vec<A> b) { return a + b; })[0];
}

// a > b ? a : b, so b where one is NaN.
template <class A>
CAMTL_INLINE vec<A> vmax(vec<A> a, vec<A> b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
        return (vec<A>)_mm512_max_ps((__m512)a, (__m512)b);
    }
#endif
    return a > b ? a : b;
}

// a < b ? a : b, so b where one is NaN.
template <class A>
CAMTL_INLINE vec<A> vmin(vec<A> a, vec<A> b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
        return (vec<A>)_mm512_min_ps((__m512)a, (__m512)b);
    }
#endif
    return a < b ? a : b;
}

template <class A>
CAMTL_INLINE A largest(vec<A> v) {
    return fold_lanes<A>(v, [](vec<A> a, vec<A> b) { return vmax<A>(a, b); })[0];
}

// e^x to about 1 ulp; 0 below -87.33 (also for -inf), infinity above 88.72. x = n ln 2 + r, |r| <= ln 2 / 2: the
// Taylor series of e^r to r^7 leaves a relative error of 5e-9.
CAMTL_INLINE vec<float> vexp(vec<float> x) {
    constexpr float kLowest = -87.33654f, kHighest = 88.72284f;
    const vec<float> y = vmin<float>(splat(kHighest), vmax<float>(splat(kLowest), x));
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number, n, in the low bits
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
    // Times 2^n by adding n to the exponent. It stays in range: at the lowest n, -126, p >= 1, and at the highest,
    // 128, p <= 1.
    typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));  // a NaN's would overflow as signed ones
    words bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof p);
    p = x < kLowest ? splat(0.0f) : p;
    p = x > kHighest ? splat(INFINITY) : p;
    return x == x ? p : x;  // the bits of a NaN went into the exponent
}
// float64 is for checks and gradients of gradcheck, not for speed: the C library, lane by lane.
CAMTL_INLINE vec<double> vexp(vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) {
        x[i] = std::exp(x[i]);
    }
    return x;
}

}  // namespace camtl::cpu::CAMTL_ISA
