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
constexpr int kCallWords = 4 * kCalls;  // words that one philox() gives

// The 64-bit products of the lanes' low halves with a 32-bit constant.
CAMTL_INLINE calls multiply_low(calls a, uint64_t b) {
#if defined(__AVX512F__)
    return (calls)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(static_cast<long long>(b)));
#elif defined(__AVX2__)
    return (calls)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(static_cast<long long>(b)));
#else
    return (a & 0xffffffffu) * b;
#endif
}

// Words of kCalls calls, counters first, first + 1, ..: words[4 * i + k] is word k of call i.
CAMTL_INLINE void philox(uint64_t first, uint64_t key, uint32_t* words) {
    calls counter;
    for (int i = 0; i < kCalls; ++i) {
        counter[i] = first + static_cast<uint64_t>(i);
    }
    calls a = counter, b = counter >> 32, c{}, d{};
    uint32_t key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const calls product_0 = multiply_low(a, 0xD2511F53u);
        const calls product_1 = multiply_low(c, 0xCD9E8D57u);
        a = (product_1 >> 32) ^ b ^ key_0;
        c = (product_0 >> 32) ^ d ^ key_1;
        b = product_1;
        d = product_0;
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
    const calls low = (a & 0xffffffffu) | (b << 32), high = (c & 0xffffffffu) | (d << 32);
    uint64_t pairs[2 * kCalls];
    for (int i = 0; i < kCalls; ++i) {
        pairs[2 * i] = low[i];
        pairs[2 * i + 1] = high[i];
    }
    std::memcpy(words, pairs, sizeof pairs);
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
    for (int64_t done = 0; done < n; call += kCalls) {
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
