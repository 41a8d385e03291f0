// Test only: what a warp's tensor-core instructions do to fragments, in plain loops over the lanes' registers, laid out
// as the PTX manual lays them out. A kernel calls these where it has `#ifdef CAMTL_CUDA_EMULATION`, else the
// instruction.
#pragma once

#include "cuda_runtime.h"

namespace emulation {

// d + a . b as an A100 adds up (Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ CS 7:e330, 2021):
// products are exact, but all terms lose what is below a bit of the largest one (the 25th, where float32 has 24), and
// the sum what float32 does not hold: towards zero, so that errors of many steps do not cancel. Later devices keep more
// bits.
template <int K>
float add_products(float d, const float* a, const float* b) {
    double terms[K + 1] = {d}, largest = std::fabs(d);
    for (int k = 0; k < K; ++k) {
        terms[k + 1] = static_cast<double>(a[k]) * b[k];
        largest = std::fabs(terms[k + 1]) > largest ? std::fabs(terms[k + 1]) : largest;
    }
    double sum = 0.0;
    for (const double term : terms) {
        sum += term;
    }
    if (largest == 0.0 || !std::isfinite(sum)) {
        return static_cast<float>(sum);
    }
    uint64_t bits = 0;
    std::memcpy(&bits, &largest, sizeof bits);
    bits &= uint64_t{0x7ff} << 52;  // 2^e, e the largest exponent: it, and 2^(24 - e)
    const uint64_t inverse_bits = (uint64_t{2 * 1023 + 24} << 52) - bits;
    double unit = 0.0, inverse = 0.0;
    std::memcpy(&unit, &bits, sizeof bits);
    std::memcpy(&inverse, &inverse_bits, sizeof bits);
    int64_t count = 0;
    for (const double term : terms) {
        count += static_cast<int64_t>(term * inverse);
    }
    sum = static_cast<double>(count) * (unit / 16777216.0);
    float rounded = static_cast<float>(sum);
    if (std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) {
        rounded = std::nextafter(rounded, 0.0f);
    }
    return rounded;
}

// mma.sync.aligned.m16n8k{K}.row.col.f32: d += a b for a [16, K], b [K, 8] of 16-bit values (K = 16, two to a register)
// or of tf32 (K = 8, one to a register). Widen(register, half): one value of a register. Lanes show each other where
// their registers are, and go on when all have read.
template <int K, class Widen>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Widen&& widen) {
    constexpr int kPerRegister = K / 8;
    struct Registers {
        const unsigned *a, *b;
    };
    const Registers mine{a, b};
    const uint64_t* lanes = exchange(0xffffffffu, static_cast<uint64_t>(reinterpret_cast<uintptr_t>(&mine)));
    const auto of = [&](int from) { return reinterpret_cast<const Registers*>(static_cast<uintptr_t>(lanes[from])); };
    const int own = static_cast<int>(lane()), group = own / 4, four = own % 4;
    float rows[2][K], columns[2][K];  // of a: group and group + 8; of b: 2 * four and 2 * four + 1
    for (int part = 0; part < 4; ++part) {
        for (int word = 0; word < 4; ++word) {
            for (int half = 0; half < kPerRegister; ++half) {
                // a: words 0, 1 are rows g and g + 8 of the first half of columns, 2, 3 of the second; b: likewise
                const int k = part * kPerRegister + half;
                rows[word % 2][k + word / 2 * K / 2] = widen(of(4 * group + part)->a[word], half);
                const int column = word % 2;
                columns[column][k + word / 2 * K / 2] = widen(of(4 * (2 * four + column) + part)->b[word / 2], half);
            }
        }
    }
    for (int i = 0; i < 4; ++i) {
        d[i] = add_products<K / 2>(d[i], rows[i / 2], columns[i % 2]);
        d[i] = add_products<K / 2>(d[i], rows[i / 2] + K / 2, columns[i % 2] + K / 2);
    }
    exchange(0xffffffffu, 0);
}

// Half `half` of a register as bf16, f16, or all of it as tf32: float32 of which 13 bits do not count.
inline float half_of(unsigned bits, int half, __nv_bfloat16) {
    return __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(bits >> 16 * half)});
}
inline float half_of(unsigned bits, int half, __half) {
    return __half2float(__half{static_cast<uint16_t>(bits >> 16 * half)});
}
inline float tf32_of(unsigned bits, int) { return __int_as_float(static_cast<int>(bits & 0xffffe000u)); }

// cvt.rna.tf32.f32: the nearest of 11 bits, ties away from zero.
inline unsigned to_tf32(float x) { return x != x ? 0x7fffffffu : (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

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
    const uint64_t* rows = exchange(0xffffffffu, static_cast<uint64_t>(reinterpret_cast<uintptr_t>(row)));
    const int own = static_cast<int>(lane());
    for (int i = 0; i < N; ++i) {
        uint16_t halves[2];
        for (int half = 0; half < 2; ++half) {
            const int a = own / 4, b = own % 4 * 2 + half;
            const uintptr_t from = static_cast<uintptr_t>(rows[8 * i + (transposed ? b : a)]);
            halves[half] = reinterpret_cast<const uint16_t*>(from)[transposed ? a : b];
        }
        std::memcpy(registers + i, halves, sizeof halves);
    }
    exchange(0xffffffffu, 0);  // what lies there may be overwritten from now on
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
