// Dropout's numbers: Philox-4x32-10, as csrc/cpu/philox.h numbers them. Four neighbours share a call.
#pragma once

#include <cmath>

#include "common.cuh"

namespace camtl::cuda {

struct Words {
    uint32_t word[4];
};

__device__ __forceinline__ Words philox(uint64_t counter, uint64_t key) {
    uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32), c = 0, d = 0;
    uint32_t key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t product_0 = uint64_t{0xD2511F53u} * a, product_1 = uint64_t{0xCD9E8D57u} * c;
        a = static_cast<uint32_t>(product_1 >> 32) ^ b ^ key_0;
        c = static_cast<uint32_t>(product_0 >> 32) ^ d ^ key_1;
        b = static_cast<uint32_t>(product_1);
        d = static_cast<uint32_t>(product_0);
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

// Dropout, as a launch passes it on.
struct Dropping {
    const int64_t* seed;  // (seed, offset) on the device; null: no dropout
    uint32_t threshold;   // kept: (word >> 8) >= threshold
    float grow;           // what is kept is multiplied by this
};

inline Dropping dropping(const Dropout& d) {
    if (d.p <= 0.0) {
        return {nullptr, 0, 1.0f};
    }
    return {d.on_device, static_cast<uint32_t>(std::ceil(d.p * 16777216.0)), static_cast<float>(1.0 / (1.0 - d.p))};
}

// The same in a thread, which has read the seed.
struct Keeps {
    uint64_t key = 0, offset = 0;
    uint32_t threshold = 0;

    __device__ __forceinline__ explicit Keeps(const Dropping& d) {
        if (d.seed != nullptr) {
            key = static_cast<uint64_t>(d.seed[0]);
            offset = static_cast<uint64_t>(d.seed[1]);
            threshold = d.threshold;
        }
    }

    // Bit i: element first + i is kept. V is 1, or a multiple of 4 that divides `first`.
    template <int V>
    __device__ __forceinline__ unsigned of(uint64_t first) const {
        static_assert(V == 1 || V % 4 == 0, "whole calls");
        unsigned bits = 0;
        if constexpr (V == 1) {
            const Words w = philox(first / 4 + offset, key);
            const unsigned i = static_cast<unsigned>(first % 4);
            const uint32_t word = i < 2 ? (i == 0 ? w.word[0] : w.word[1]) : (i == 2 ? w.word[2] : w.word[3]);
            bits = (word >> 8) >= threshold ? 1u : 0u;
        } else {
#pragma unroll
            for (int four = 0; four < V / 4; ++four) {
                const Words w = philox(first / 4 + static_cast<uint64_t>(four) + offset, key);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    bits |= (w.word[i] >> 8) >= threshold ? 1u << (4 * four + i) : 0u;
                }
            }
        }
        return bits;
    }
};

}  // namespace camtl::cuda
