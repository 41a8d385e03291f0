// What the CUDA kernels share: storage types, vector access, the rows of a sequence, launches and their errors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "camtl/common.h"
#include "camtl/launch.h"

// What holds of a kernel's addresses; tested where the same source runs on the CPU (tests/native).
#ifndef CAMTL_DEVICE_CHECK
#define CAMTL_DEVICE_CHECK(condition)
#endif

namespace camtl::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(f16 v) { return __half2float(v); }

// Rounded to nearest even.
template <class S>
__device__ __forceinline__ S narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float v) {
    return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float v) {
    return __float2half_rn(v);
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// V neighbours, moved in as few accesses as their size allows (16 bytes each at most).
template <class S, int V>
struct alignas(sizeof(S) * V > 16 ? 16 : sizeof(S) * V) Pack {
    S v[V];
};

template <int V, class S>
__device__ __forceinline__ Pack<S, V> load(const S* p) {
    CAMTL_DEVICE_CHECK(reinterpret_cast<uintptr_t>(p) % alignof(Pack<S, V>) == 0);
    return *reinterpret_cast<const Pack<S, V>*>(p);
}

// The same for what no thread reads again: it shall not push tables out of the caches.
template <int V, class S>
__device__ __forceinline__ Pack<S, V> load_once(const S* p) {
    constexpr int kBytes = sizeof(S) * V;
    if constexpr (kBytes == 16) {
        return bits_as<Pack<S, V>>(__ldcs(reinterpret_cast<const uint4*>(p)));
    } else if constexpr (kBytes == 4) {
        return bits_as<Pack<S, V>>(__ldcs(reinterpret_cast<const unsigned*>(p)));
    } else {
        static_assert(kBytes == 2, "packs of x are 16, 4 or 2 bytes");
        return bits_as<Pack<S, V>>(__ldcs(reinterpret_cast<const unsigned short*>(p)));
    }
}

template <int V, class S>
__device__ __forceinline__ void store(S* p, const Pack<S, V>& values) {
    CAMTL_DEVICE_CHECK(reinterpret_cast<uintptr_t>(p) % alignof(Pack<S, V>) == 0);
    *reinterpret_cast<Pack<S, V>*>(p) = values;
}

// Shared memory whose size the launch sets, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef CAMTL_CUDA_EMULATION
    return emulation::dynamic_shared;
#else
    extern __shared__ uint4 camtl_dynamic_shared[];
    return reinterpret_cast<unsigned char*>(camtl_dynamic_shared);
#endif
}

// A barrier of its own (1 to 15; 0 is that of __syncthreads) for `threads` of the block's, whole warps.
__device__ __forceinline__ void named_barrier(int number, int threads) {
#ifdef CAMTL_CUDA_EMULATION
    emulation::named_barrier(static_cast<unsigned>(number), static_cast<unsigned>(threads));
#else
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// The sum of a warp's values in each of its lanes, the same bits in all of them.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, lanes);
    }
    return v;
}

constexpr int kNoSequence = -1;  // rows beyond the last sequence
constexpr int kBadTask = -2;     // the sequence's task id is outside [0, tasks)

// Layout, as kernels walk through it. Nothing is read outside the arrays, whatever their values: a bad task id, which
// nobody could look at under compile, shows as NaN.
struct Sequences {
    int rows;
    int batch;
    int rows_per_sequence;
    int tasks;
    const int32_t* cu_seqlens;
    const void* task_ids;
    bool narrow_ids;

    __device__ __forceinline__ int begin(int b) const {
        return cu_seqlens == nullptr ? b * rows_per_sequence : clamp(cu_seqlens[b]);
    }
    __device__ __forceinline__ int end(int b) const {
        return cu_seqlens == nullptr ? (b + 1) * rows_per_sequence : clamp(cu_seqlens[b + 1]);
    }
    __device__ __forceinline__ int clamp(int row) const { return row < 0 ? 0 : row > rows ? rows : row; }

    __device__ __forceinline__ int task(int b) const {
        if (b == kNoSequence) {
            return kNoSequence;
        }
        if (task_ids == nullptr) {  // no tables: one task
            return 0;
        }
        const int64_t id =
            narrow_ids ? static_cast<const int32_t*>(task_ids)[b] : static_cast<const int64_t*>(task_ids)[b];
        return id < 0 || id >= tasks ? kBadTask : static_cast<int>(id);
    }

    // Where rows of no sequence begin.
    __device__ __forceinline__ int stop() const { return cu_seqlens == nullptr ? rows : clamp(cu_seqlens[batch]); }

    // The sequence that owns a row: where it is packed the last one that starts at or before it.
    __device__ __forceinline__ int owner(int row) const {
        if (cu_seqlens == nullptr) {
            return static_cast<int>(static_cast<unsigned>(row) / static_cast<unsigned>(rows_per_sequence));
        }
        if (batch == 0 || row >= cu_seqlens[batch]) {
            return kNoSequence;
        }
        int low = 0, high = batch - 1;
        while (low < high) {
            const int middle = low + (high - low + 1) / 2;
            if (cu_seqlens[middle] <= row) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }
};

// A walk over rows in rising order: one search, then comparisons.
struct Walk {
    const Sequences& sequences;
    int sequence;
    int last;  // the first row after the sequence

    __device__ __forceinline__ Walk(const Sequences& s, int row) : sequences(s) { seek(row); }

    // Whether `row` belongs to another sequence than the row before.
    __device__ __forceinline__ bool moves_on(int row) {
        if (row < last) {
            return false;
        }
        seek(row);
        return true;
    }

private:
    __device__ __forceinline__ void seek(int row) {
        sequence = sequences.owner(row);
        last = sequence == kNoSequence ? sequences.rows : sequences.end(sequence);
        last = last > row ? last : row + 1;
    }
};

inline void check(cudaError_t status, const char* op) {
    if (status == cudaSuccess) {
        return;
    }
    cudaGetLastError();  // the next call starts clean
    const bool none = status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver;
    const std::string detail = cudaGetErrorString(status);
    throw std::runtime_error(std::string(op) + " (cuda): " + (none ? "no CUDA device (" + detail + ")" : detail));
}

// A kernel on the caller's device and stream; nothing waits for it.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, const Launch& where,
            Arguments... arguments) {
    check(cudaSetDevice(where.device), op);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(where.stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), op);
}

inline int multiprocessors(int device, const char* op) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op);
    return count;
}

// Whether packs of V elements of S never straddle: their address, and every row's.
template <class S>
bool aligned(int V, const void* p, int64_t stride) {
    return p == nullptr ||
           (reinterpret_cast<uintptr_t>(p) % (sizeof(S) * V > 16 ? 16 : sizeof(S) * V) == 0 && stride % V == 0);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes that the kernels count in int.
inline int as_int(int64_t size, const char* op, const char* what) {
    if (size < 0 || size > 2147483647 - 4096) {
        throw std::invalid_argument(std::string(op) + " (cuda): " + std::to_string(size) + " " + what +
                                    " are more than these kernels count");
    }
    return static_cast<int>(size);
}

inline Sequences sequences(const Layout& l, const Launch& where, const char* op) {
    return {as_int(l.rows, op, "rows"),
            as_int(l.batch, op, "sequences"),
            as_int(l.rows_per_sequence, op, "rows"),
            as_int(l.tasks, op, "tasks"),
            l.cu_seqlens,
            l.task_ids,
            where.narrow_ids};
}

}  // namespace camtl::cuda
