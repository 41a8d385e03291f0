// Vectors of one register, for the instruction set that this file is compiled for.
//
// Kernel files are compiled once per instruction set, each time in a namespace of its own (CAMTL_ISA: avx512,
// avx2 or baseline); dispatch.cpp picks one when the program runs. Only this file, simd.h and philox.h know them. No
// standard-library template may be used in kernel files: one compiled for AVX-512 could be the copy that the
// linker keeps for all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
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

template <class N>
constexpr bool kIsFull = false;
template <int N>
constexpr bool kIsFull<Full<N>> = true;

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

// body(i, n, k), where k goes round through Full<0> .. Full<3>: for sums over a row. Four of them in turn, each
// in a register of its own, hide the time that an addition takes.
template <class A, class F>
CAMTL_INLINE void each_vector_in_turn(int64_t size, F&& body) {
    constexpr int W = kLanes<A>;
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W) {
        body(i, Full<W>{}, Full<0>{});
        body(i + W, Full<W>{}, Full<1>{});
        body(i + 2 * W, Full<W>{}, Full<2>{});
        body(i + 3 * W, Full<W>{}, Full<3>{});
    }
    for (; i + W <= size; i += W) {
        body(i, Full<W>{}, Full<0>{});
    }
    if (i < size) {
        body(i, static_cast<int>(size - i), Full<1>{});
    }
}

template <class A>
CAMTL_INLINE vec<A> splat(A value) {
    return value - vec<A>{};
}

// The number of each lane.
template <class A>
CAMTL_INLINE veci<A> lane_numbers() {
    veci<A> numbers{};
    for (int i = 0; i < kLanes<A>; ++i) {
        numbers[i] = i;
    }
    return numbers;
}

// The lanes of a and b, numbered on from a to b, that `from` names: constants.
template <class V, class I>
CAMTL_INLINE V permute(V a, V b, I from) {
#if defined(__clang__)
    constexpr int W = static_cast<int>(sizeof(V) / sizeof(a[0]));
    V result{};
    for (int i = 0; i < W; ++i) {
        result[i] = from[i] < W ? a[from[i]] : b[from[i] - W];
    }
    return result;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

}  // namespace camtl::cpu::CAMTL_ISA
