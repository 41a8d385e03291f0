// Counter-based dropout: Philox-4x32-10, vectorised over calls.
//
// Element e of the op's logical tensor takes word e % 4 of the call with counter e / 4 + offset (mod 2^64: low
// half in word 0, high half in word 1) under the key seed (low half, high half); it is kept if
// (word >> 8) >= ceil(p * 2^24) and then scaled by 1 / (1 - p). The same numbers as camtl/ops/_dropout.py.
#pragma once

#include "simd.h"

namespace camtl::cpu::CAMTL_ISA {

// A call in each 64-bit lane. Words are the low halves of lanes; high halves hold rubbish between rounds.
typedef uint64_t calls __attribute__((vector_size(kRegisterBytes)));
constexpr int kCalls = kRegisterBytes / 8;
// One philox() makes two registers of calls: the products of one hide the time that those of the other take.
constexpr int kCallSets = 2;
constexpr int kCallWords = 4 * kCalls * kCallSets;

// The 64-bit products of the lanes' low halves with a 32-bit constant.
CAMTL_INLINE calls multiply_low(calls a, uint64_t b) {
#if defined(__AVX512F__)
    return (calls)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(static_cast<long long>(b)));
#elif defined(__AVX2__)
    return (calls)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(static_cast<long long>(b)));
#elif defined(__SSE2__)
    return (calls)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(static_cast<long long>(b)));
#else
    return (a & 0xffffffffu) * b;
#endif
}

// Words of kCallSets * kCalls calls, counters first, first + 1, ..: words[4 * i + k] is word k of call i.
CAMTL_INLINE void philox(uint64_t first, uint64_t key, uint32_t* words) {
    const veci<double> lane = lane_numbers<double>();
    calls a[kCallSets], b[kCallSets], c[kCallSets] = {}, d[kCallSets] = {};
    for (int s = 0; s < kCallSets; ++s) {
        a[s] = (calls)lane + (first + static_cast<uint64_t>(s * kCalls));
        b[s] = a[s] >> 32;
    }
    uint32_t key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int s = 0; s < kCallSets; ++s) {
            const calls product_0 = multiply_low(a[s], 0xD2511F53u);
            const calls product_1 = multiply_low(c[s], 0xCD9E8D57u);
            a[s] = (product_1 >> 32) ^ b[s] ^ key_0;
            c[s] = (product_0 >> 32) ^ d[s] ^ key_1;
            b[s] = product_1;
            d[s] = product_0;
        }
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
    // A lane holds two words of its call, half of them in `low`: lanes of the two in turn.
    const veci<double> from = lane / 2 + lane % 2 * kCalls;
    for (int s = 0; s < kCallSets; ++s) {
        const calls low = (a[s] & 0xffffffffu) | (b[s] << 32), high = (c[s] & 0xffffffffu) | (d[s] << 32);
        const calls pairs[2] = {permute(low, high, from), permute(low, high, from + kCalls / 2)};
        std::memcpy(words + 4 * kCalls * s, pairs, sizeof pairs);
    }
}

// scales[0 .. n): what dropout multiplies elements first_element .. + n by, 0 or 1 / (1 - p).
template <class A>
inline void dropout_scales(A* scales, int64_t n, uint64_t first_element, const Dropout& dropout) {
    const uint32_t threshold = static_cast<uint32_t>(std::ceil(dropout.p * 16777216.0));
    const A kept = static_cast<A>(1.0 / (1.0 - dropout.p));
    const uint64_t key = static_cast<uint64_t>(dropout.seed);
    uint64_t call = first_element / 4 + static_cast<uint64_t>(dropout.offset);
    int64_t skip = static_cast<int64_t>(first_element % 4);
    uint32_t words[kCallWords];
    for (int64_t done = 0; done < n; call += kCallSets * kCalls) {
        philox(call, key, words);
        if (skip == 0 && n - done >= kCallWords) {
            for (int i = 0; i < kCallWords; ++i) {
                scales[done + i] = (words[i] >> 8) >= threshold ? kept : A(0);
            }
            done += kCallWords;
        } else {
            for (int64_t i = skip; i < kCallWords && done < n; ++i, ++done) {
                scales[done] = (words[i] >> 8) >= threshold ? kept : A(0);
            }
            skip = 0;
        }
    }
}

}  // namespace camtl::cpu::CAMTL_ISA
