// What conditional_layer_norm's two passes share: parameters of either storage type, h, sums over a row.
#pragma once

#include "camtl/conditional_layer_norm.h"
#include "common.cuh"
#include "philox.cuh"

namespace camtl::cuda {

// A parameter [D] or table [tasks, D], f32 or, if narrow, of x's type. Data null: it is not there.
struct Parameter {
    const void* data;
    int64_t stride;  // of a table: elements from task to task
    bool narrow;
};

template <int V, class S>
__device__ __forceinline__ void widen_all(const Pack<S, V>& from, float (&to)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        to[i] = widen(from.v[i]);
    }
}

// V values of a parameter from column `at` on; of a table with task * stride added.
template <class S, int V>
__device__ __forceinline__ void read(const Parameter& p, int64_t at, float (&values)[V]) {
    if (p.narrow) {
        widen_all<V>(load<V>(static_cast<const S*>(p.data) + at), values);
    } else {
        widen_all<V>(load<V>(static_cast<const float*>(p.data) + at), values);
    }
}

template <class S>
__device__ __forceinline__ void write(void* data, bool narrow_values, int64_t at, float value) {
    if (narrow_values) {
        static_cast<S*>(data)[at] = narrow<S>(value);
    } else {
        static_cast<float*>(data)[at] = value;
    }
}

// (1 + gamma) * weight + beta; weight without gamma. NaN for a task id out of range.
template <class S, int V>
__device__ __forceinline__ void read_scale(const Parameter& weight, const Parameter& gamma, const Parameter& beta,
                                           int task, int64_t column, float (&scale)[V]) {
    read<S, V>(weight, column, scale);
    if (gamma.data != nullptr && task >= 0) {
        float g[V], b[V];
        read<S, V>(gamma, task * gamma.stride + column, g);
        read<S, V>(beta, task * beta.stride + column, b);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            scale[i] = fmaf(1.0f + g[i], scale[i], b[i]);
        }
    }
    if (task == kBadTask) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            scale[i] = __int_as_float(0x7fc00000);
        }
    }
}

// What comes before the norm: h = dropout(x + x_bias) + residual.
template <class S>
struct Sublayer {
    const S* x;
    int64_t x_stride;
    const S* residual;  // or null
    int64_t residual_stride;
    Parameter x_bias;
    Dropping dropout;
    int64_t features;

    template <int V>
    __device__ __forceinline__ Pack<S, V> load_x(int64_t row, int64_t column) const {
        return load_once<V>(x + row * x_stride + column);
    }
    template <int V>
    __device__ __forceinline__ Pack<S, V> load_residual(int64_t row, int64_t column) const {
        return load_once<V>(residual + row * residual_stride + column);
    }

    // h of V neighbours from their packs (`beside` is looked at where there is a residual); which of them are kept.
    template <int V>
    __device__ __forceinline__ unsigned join(int64_t row, int64_t column, const Pack<S, V>& of_x,
                                             const Pack<S, V>& beside, const Keeps& keeps, float (&h)[V]) const {
        widen_all<V>(of_x, h);
        if (x_bias.data != nullptr) {
            float b[V];
            read<S, V>(x_bias, column, b);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                h[i] += b[i];
            }
        }
        unsigned kept = ~0u;
        if (dropout.seed != nullptr) {
            kept = keeps.of<V>(static_cast<uint64_t>(row * features + column));
#pragma unroll
            for (int i = 0; i < V; ++i) {
                h[i] = (kept >> i & 1) != 0 ? h[i] * dropout.grow : 0.0f;
            }
        }
        if (residual != nullptr) {
#pragma unroll
            for (int i = 0; i < V; ++i) {
                h[i] += widen(beside.v[i]);
            }
        }
        return kept;
    }

    // The same from memory.
    template <int V>
    __device__ __forceinline__ unsigned at(int64_t row, int64_t column, const Keeps& keeps, float (&h)[V]) const {
        const Pack<S, V> of_x = load_x<V>(row, column);
        Pack<S, V> beside = of_x;
        if (residual != nullptr) {
            beside = load_residual<V>(row, column);
        }
        return join<V>(row, column, of_x, beside, keeps, h);
    }
};

constexpr int kMaxWarps = 8;  // that share a row

// Sums over the threads of a row, which are those of a warp or (blockDim.x) those of several, in each of them. `parts`
// must not be that of the call before: one barrier is enough then. With several warps the whole block must come.
template <int N>
__device__ __forceinline__ void row_sums(float (&values)[N], float (*parts)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        values[i] = warp_sum(values[i]);
    }
    const int warps = static_cast<int>(blockDim.x) / 32;
    if (warps > 1) {
        float (*own)[N] = parts + threadIdx.y * warps;
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                own[threadIdx.x / 32][i] = values[i];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            values[i] = own[0][i];
        }
        for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                values[i] += own[warp][i];
            }
        }
    }
}

// -- on the host

enum Narrow : unsigned { kWeight = 1, kBias = 2, kGamma = 4, kBeta = 8, kBiasShift = 16, kXBias = 32 };

// Whether a parameter can be read V values at a time.
template <class S>
bool aligned(int V, const Parameter& p) {
    return p.narrow ? aligned<S>(V, p.data, p.stride) : aligned<float>(V, p.data, p.stride);
}

inline int64_t row_warps(int64_t packs, int per_thread) {
    const int64_t warps = divide_up(packs, 32 * per_thread);
    return warps < 1 ? 1 : warps > kMaxWarps ? kMaxWarps : warps;
}

// f(S{}): x's storage type.
template <class F>
void with_storage(DType dtype, const char* op, F&& f) {
    switch (dtype) {
        case DType::f32:
            return f(float{});
        case DType::bf16:
            return f(bf16{});
        case DType::f16:
            return f(f16{});
        default:
            throw std::invalid_argument(std::string(op) + " (cuda): float64 is not supported");
    }
}

}  // namespace camtl::cuda
