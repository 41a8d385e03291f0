// Test only: what a warp's tensor-core instructions do to fragments, in plain loops over the lanes' registers, laid out
// as the PTX manual lays them out. A kernel calls these where it has `#ifdef CAMTL_CUDA_EMULATION`, else the
// instruction.
#pragma once

#include "cuda_runtime.h"

namespace emulation {

// mma.sync.aligned.m16n8k{K}.row.col.f32: d += a b for a [16, K], b [K, 8] of 16-bit values (K = 16, two to a register)
// or of tf32 (K = 8, one to a register). Widen(register, half): one value of a register.
template <int K, class Widen>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Widen&& widen) {
    constexpr int kPerRegister = K / 8;
    const int own = static_cast<int>(lane()), group = own / 4, four = own % 4;
    float rows[2][K], columns[2][K];  // of a: group and group + 8; of b: 2 * four and 2 * four + 1
    for (int from = 0; from < static_cast<int>(kWarp); ++from) {
        for (int word = 0; word < 6; ++word) {
            const unsigned bits = shuffled(0xffffffffu, word < 4 ? a[word] : b[word - 4], static_cast<unsigned>(from));
            for (int half = 0; half < kPerRegister; ++half) {
                // a: words 0, 1 are rows g and g + 8 of the first half of columns, 2, 3 of the second; b: likewise
                const int k = from % 4 * kPerRegister + half + (word < 4 ? word / 2 : word - 4) * K / 2;
                const float value = widen(bits, half);
                if (word < 4 && from / 4 == group) {
                    rows[word % 2][k] = value;
                }
                for (int column = 0; word >= 4 && column < 2; ++column) {
                    if (from / 4 == 2 * four + column) {
                        columns[column][k] = value;
                    }
                }
            }
        }
    }
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < K; ++k) {
            d[i] += rows[i / 2][k] * columns[i % 2][k];
        }
    }
}

// Half `half` of a register as bf16, f16, or all of it as tf32: float32 of which 13 bits do not count.
inline float half_of(unsigned bits, int half, __nv_bfloat16) {
    return __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(bits >> 16 * half)});
}
inline float half_of(unsigned bits, int half, __half) {
    return __half2float(__half{static_cast<uint16_t>(bits >> 16 * half)});
}
inline float tf32_of(unsigned bits, int) { return __int_as_float(static_cast<int>(bits & 0xffffe000u)); }

template <class S>
void mma_16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma<16>(d, a, b, [](unsigned bits, int half) { return half_of(bits, half, S{}); });
}
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma<8>(d, a, b, tf32_of); }

// ldmatrix.sync.aligned.m8n8.x{N}.b16: lane 8 i + r gives the address of row r (16 bytes) of matrix i. A lane gets of
// each matrix two neighbours of row lane / 4 or, transposed, of column lane / 4.
template <int N>
void ldmatrix(unsigned (&registers)[N], const void* row, bool transposed) {
    check(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix reads aligned rows of 16 bytes");
    const int own = static_cast<int>(lane());
    for (int i = 0; i < N; ++i) {
        uint16_t halves[2];
        const uint16_t* rows[8];
        for (int r = 0; r < 8; ++r) {
            rows[r] = shuffled(0xffffffffu, static_cast<const uint16_t*>(row), static_cast<unsigned>(8 * i + r));
        }
        for (int half = 0; half < 2; ++half) {
            const int a = own / 4, b = own % 4 * 2 + half;
            halves[half] = transposed ? rows[b][a] : rows[a][b];
        }
        std::memcpy(registers + i, halves, sizeof halves);
    }
}

// cp.async.cg.shared.global of 16 bytes, of which `bytes` are read and the others become 0. The copy is made at once; a
// kernel that reads it before cp.async.wait_group is not found out here.
inline void cp_async(void* shared, const void* global, unsigned bytes) {
    check(reinterpret_cast<uintptr_t>(shared) % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0,
          "cp.async moves aligned 16 bytes");
    std::memset(shared, 0, 16);
    std::memcpy(shared, global, bytes);
}

}  // namespace emulation
