// Small dense products out of cache, for kernels that have their operands in scratch memory already.
//
// C [M, N] = A [M, K] B [K, N] (+ C). A is read element by element through two strides, so it may be a transpose.
// B and C are made of whole vectors along N. A tile of C, kTileRows by kTileVectors registers, stays in registers
// while k runs: per step kTileVectors loads of B and kTileRows broadcasts of A feed their product of
// multiply-adds. Every element of C is the same sums of at most kDepth products, added in the order of k, whatever
// the tiles: its bits depend neither on where it lies in C nor on the number of threads.
#pragma once

#include "simd.h"

namespace camtl::cpu::CAMTL_ISA {

// Accumulators, the vectors of B and a broadcast must fit the registers; without fused multiply-adds a product too.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;

// Columns of a strip: how wide a piece of B one tile reads. Operands that are read often are stored strip after
// strip, each [K, kStrip] in one piece, so that a strip does not spread over few sets of the cache.
template <class A>
constexpr int kStrip = kTileVectors * kLanes<A>;

// Products summed in a register before they are added to C: short sums lose little to rounding, and what a tile
// reads of B, [kDepth, kStrip], stays in the first cache.
constexpr int64_t kDepth = 128;

// Vectors that cover n elements, strips that cover n elements.
template <class A>
CAMTL_INLINE int64_t vectors(int64_t n) {
    return (n + kLanes<A> - 1) / kLanes<A>;
}
template <class A>
CAMTL_INLINE int64_t strips(int64_t n) {
    return (n + kStrip<A> - 1) / kStrip<A>;
}

// Element (m, k) is data[m * row + k * column].
template <class A>
struct Left {
    const A* data;
    int64_t row;
    int64_t column;
};

// Element (k, n) is data[n / kStrip * strip + k * row + n % kStrip]. Row-major: strip = kStrip.
template <class A>
struct Right {
    const A* data;
    int64_t strip;
    int64_t row;
};

template <class A, int M, int V>
__attribute__((noinline)) void multiply_tile(int64_t K, const A* a, int64_t a_row, int64_t a_column, const A* b,
                                             int64_t b_row, A* c, int64_t c_row, bool add) {
    constexpr Full<kLanes<A>> W{};
    vec<A> sums[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            sums[m][v] = vec<A>{};
        }
    }
    for (int64_t k = 0; k < K; ++k, a += a_column, b += b_row) {
        vec<A> right[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            right[v] = load(b + v * W, W);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const vec<A> left = splat(a[m * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                sums[m][v] += left * right[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            A* to = c + m * c_row + v * W;
            store(to, add ? load(to, W) + sums[m][v] : sums[m][v], W);
        }
    }
}

// The rows of a strip of C: whole tiles, then one of the rows that are left.
template <class A, int V>
inline void multiply_strip(int64_t M, int64_t K, const Left<A>& a, const A* b, int64_t b_row, A* c, int64_t c_row,
                           bool add) {
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows) {
        multiply_tile<A, kTileRows, V>(K, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, add);
    }
    const auto rest = [&](auto rows) {
        if constexpr (rows < kTileRows) {
            multiply_tile<A, rows, V>(K, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, add);
        }
    };
    switch (M - m) {
        case 1:
            return rest(Full<1>{});
        case 2:
            return rest(Full<2>{});
        case 3:
            return rest(Full<3>{});
        case 4:
            return rest(Full<4>{});
        case 5:
            return rest(Full<5>{});
        case 6:
            return rest(Full<6>{});
        case 7:
            return rest(Full<7>{});
        default:
            return;
    }
}

// C [M, vectors] = A B, or += where `add`; rows of C are c_row apart.
template <class A>
inline void multiply(int64_t M, int64_t vectors, int64_t K, const Left<A>& a, const Right<A>& b, A* c, int64_t c_row,
                     bool add) {
    static_assert(kTileVectors == 2, "a strip is one tile wide, the last one may be half");
    for (int64_t v = 0; v < vectors; v += kTileVectors) {
        for (int64_t k = 0; k < K; k += kDepth) {
            const int64_t depth = K - k < kDepth ? K - k : kDepth;
            const Left<A> left{a.data + k * a.column, a.row, a.column};
            const A* strip = b.data + v / kTileVectors * b.strip + k * b.row;
            A* to = c + v * kLanes<A>;
            if (v + kTileVectors <= vectors) {
                multiply_strip<A, 2>(M, depth, left, strip, b.row, to, c_row, add || k > 0);
            } else {
                multiply_strip<A, 1>(M, depth, left, strip, b.row, to, c_row, add || k > 0);
            }
        }
    }
}

// Lane i of the result is lane index[i] of a, or of b from kLanes on.
template <class A>
CAMTL_INLINE vec<A> pick(vec<A> a, vec<A> b, veci<A> index) {
#if defined(__clang__)
    vec<A> picked;
    for (int i = 0; i < kLanes<A>; ++i) {
        picked[i] = index[i] < kLanes<A> ? a[index[i]] : b[index[i] - kLanes<A>];
    }
    return picked;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

// The vectors a[0 .. W) as a W x W matrix, transposed.
template <class A>
CAMTL_INLINE void transpose(vec<A>* a) {
    constexpr int W = kLanes<A>;
    veci<A> low{}, high{};
    for (int i = 0; i < W; ++i) {
        low[i] = i / 2 + i % 2 * W;
        high[i] = low[i] + W / 2;
    }
    // Each round interleaves rows i and i + W / 2; log2(W) rounds move the row's bits of an index to the lane's.
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        vec<A> next[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = pick<A>(a[i], a[i + W / 2], low);
            next[2 * i + 1] = pick<A>(a[i], a[i + W / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            a[i] = next[i];
        }
    }
}

}  // namespace camtl::cpu::CAMTL_ISA
