// Products of a warp on tensor cores: 16-bit types by mma.m16n8k16, float32 by three of tf32's mma.m16n8k8, whose
// operands are split in two. Operands come from tiles in shared memory, or from the sums of a product before.
//
// A lane has of sums [16, 8 N] the rows lane / 4 and 8 further, and of each 8 columns 2 * (lane % 4) and the next:
// sums[n] = {(row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1)}.
#pragma once

#include <type_traits>

#include "common.cuh"

#ifdef CAMTL_CUDA_EMULATION
#include "tensor_cores.h"
#endif

namespace camtl::cuda {

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }

// How many terms one product adds up.
template <class S>
constexpr int kDepth = sizeof(S) == 2 ? 16 : 8;

// The left operand [16, kDepth], the right one [kDepth, 8].
template <class S>
struct Left {
    unsigned v[4];
};
template <class S>
struct Right {
    unsigned v[2];
};
template <>
struct Left<float> {
    unsigned high[4], low[4];
};
template <>
struct Right<float> {
    unsigned high[2], low[2];
};

#ifdef CAMTL_CUDA_EMULATION
inline unsigned to_tf32(float x) { return emulation::to_tf32(x); }
template <class S>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if constexpr (sizeof(S) == 4) {
        emulation::mma_tf32(d, a, b);
    } else {
        emulation::mma_16<S>(d, a, b);
    }
}
template <bool kTransposed>
void ldmatrix(unsigned (&registers)[4], const void* row) {
    emulation::ldmatrix<4>(registers, row, kTransposed);
}
inline void copy_16(void* shared, const void* global, bool there) {
    emulation::cp_async(shared, global, there ? 16 : 0);
}
inline void copies_end() {}
inline void wait_for_copies() {}
#else
// Rounded to 11 bits. Volatile, as float32's products are: in another order they take more registers.
__device__ __forceinline__ unsigned to_tf32(float x) {
    unsigned bits;
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
template <class S>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if constexpr (sizeof(S) == 4) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else if constexpr (std::is_same_v<S, bf16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}
__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
// Four 8 x 8 matrices of 16-bit values: lane 8 i + r has the address of row r of matrix i.
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void* row) {
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}
// 16 bytes on their way to shared memory, zeros where they are not there.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
#endif

// x = high + low, but for its last bits: 11 and 11 of them.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
    high = to_tf32(x);
    low = to_tf32(x - __int_as_float(static_cast<int>(high)));
}

// d += a b. `kTurned`: a and b have changed places (the product is the other's transpose), and the same bits come out.
template <bool kTurned = false, class S>
__device__ __forceinline__ void multiply(float (&d)[4], const Left<S>& a, const Right<S>& b) {
    mma<S>(d, a.v, b.v);
}
// Tensor cores round sums towards zero, an error that grows with each step; the units for float32 add the steps up.
template <bool kTurned = false>
__device__ __forceinline__ void multiply(float (&d)[4], const Left<float>& a, const Right<float>& b) {
    float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if constexpr (kTurned) {
        mma<float>(step, a.high, b.low);
        mma<float>(step, a.low, b.high);
    } else {
        mma<float>(step, a.low, b.high);
        mma<float>(step, a.high, b.low);
    }
    mma<float>(step, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        d[i] += step[i];
    }
}

// Rows of `width` values in shared memory, each 16 bytes longer: reads of a column meet all banks.
template <class S, int width>
struct Tile {
    static constexpr int kStride = width + 16 / static_cast<int>(sizeof(S));
    __host__ __device__ static constexpr int bytes(int rows) { return rows * kStride * static_cast<int>(sizeof(S)); }
    S* data;

    __device__ __forceinline__ S* at(int row, int column) const { return data + row * kStride + column; }
    __device__ __forceinline__ Tile rows(int first) const { return {data + first * kStride}; }

    // Rows [0, 16) and columns from k on, as a left operand.
    __device__ __forceinline__ void left(Left<S>& a, int k) const {
        const int lane = lane_of_warp();
        if constexpr (sizeof(S) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                split(*at(lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4), a.high[i], a.low[i]);
            }
        } else {
            ldmatrix<false>(a.v, at(lane % 16, k + lane / 16 * 8));
        }
    }

    // Two right operands [kDepth, 8] of the transpose: its columns are rows n to n + 15, its rows columns from k on.
    __device__ __forceinline__ void right_of_rows(Right<S> (&b)[2], int n, int k) const {
        const int lane = lane_of_warp();
        if constexpr (sizeof(S) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Right<S>& to = b[i / 2];
                split(*at(n + i / 2 * 8 + lane / 4, k + lane % 4 + i % 2 * 4), to.high[i % 2], to.low[i % 2]);
            }
        } else {
            unsigned words[4];
            ldmatrix<false>(words, at(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
            b[0] = {{words[0], words[1]}};
            b[1] = {{words[2], words[3]}};
        }
    }

    // Two right operands [kDepth, 8]: rows from k on, columns n to n + 15. `kPaired`: beside a left operand made of
    // sums, whose columns float32 has in another order.
    template <bool kPaired>
    __device__ __forceinline__ void right(Right<S> (&b)[2], int k, int n) const {
        const int lane = lane_of_warp();
        if constexpr (sizeof(S) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = kPaired ? 2 * (lane % 4) + i % 2 : lane % 4 + i % 2 * 4;
                split(*at(k + row, n + i / 2 * 8 + lane / 4), b[i / 2].high[i % 2], b[i / 2].low[i % 2]);
            }
        } else {
            unsigned words[4];
            ldmatrix<true>(words, at(k + lane % 16, n + lane / 16 * 8));
            b[0] = {{words[0], words[1]}};
            b[1] = {{words[2], words[3]}};
        }
    }
};

template <class S>
__device__ __forceinline__ unsigned pair(float low, float high) {
    Pack<S, 2> both;
    both.v[0] = narrow<S>(low);
    both.v[1] = narrow<S>(high);
    return bits_as<unsigned>(both);
}

// Columns kDepth * step on of sums, rounded to S, as a left operand.
template <class S, int N>
__device__ __forceinline__ void left_of(Left<S>& a, const float (&sums)[N][4], int step) {
    if constexpr (sizeof(S) == 4) {
        split(sums[step][0], a.high[0], a.low[0]);
        split(sums[step][2], a.high[1], a.low[1]);
        split(sums[step][1], a.high[2], a.low[2]);
        split(sums[step][3], a.high[3], a.low[3]);
    } else {
        a.v[0] = pair<S>(sums[2 * step][0], sums[2 * step][1]);
        a.v[1] = pair<S>(sums[2 * step][2], sums[2 * step][3]);
        a.v[2] = pair<S>(sums[2 * step + 1][0], sums[2 * step + 1][1]);
        a.v[3] = pair<S>(sums[2 * step + 1][2], sums[2 * step + 1][3]);
    }
}

template <int N>
__device__ __forceinline__ void clear(float (&sums)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            sums[n][e] = 0.0f;
        }
    }
}

// sums [16, 8 N] += a[0:16] b[0:8 N]^T, over all columns of the tiles.
template <bool kTurned, class S, int width, int N>
__device__ __forceinline__ void add_rows_by_rows(float (&sums)[N][4], const Tile<S, width>& a,
                                                 const Tile<S, width>& b) {
    // float32's operands are split in registers, of which more steps at once would take too many
    [[maybe_unused]] constexpr int kAtOnce = sizeof(S) == 4 ? 2 : width / kDepth<S>;
#pragma unroll kAtOnce
    for (int k = 0; k < width; k += kDepth<S>) {
        Left<S> left;
        a.left(left, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            Right<S> right[2];
            b.right_of_rows(right, 8 * n, k);
            multiply<kTurned>(sums[n], left, right[0]);
            multiply<kTurned>(sums[n + 1], left, right[1]);
        }
    }
}

// sums [16, width] += p [16, 8 K] b[0:8 K], p rounded to S.
template <class S, int width, int K, int N>
__device__ __forceinline__ void add_sums_by_rows(float (&sums)[N][4], const float (&p)[K][4], const Tile<S, width>& b) {
    static_assert(8 * N == width, "all columns");
#pragma unroll
    for (int k = 0; k < 8 * K / kDepth<S>; ++k) {
        Left<S> left;
        left_of<S>(left, p, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            Right<S> right[2];
            b.template right<true>(right, k * kDepth<S>, 8 * n);
            multiply(sums[n], left, right[0]);
            multiply(sums[n + 1], left, right[1]);
        }
    }
}

}  // namespace camtl::cuda
