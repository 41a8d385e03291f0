// Test only: enough of CUDA for a C++ compiler to build the kernels of csrc/cuda and run them on the CPU, one thread of
// a block after the other (fibers.h). Shows wrong results, addresses that are not aligned, barriers that not all reach,
// shared memory read before it is written (it begins full of NaN), and sums that depend on the order of threads (run
// them in reverse). Shows nothing of speed, of races between two barriers that either order survives, or of what a real
// compiler makes of the kernels.
#pragma once

#define CAMTL_CUDA_EMULATION
#define CAMTL_DEVICE_CHECK(condition) emulation::check(condition, #condition)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

extern "C" {
// The linker's: where the section of all shared variables begins and ends, where there is one.
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
}

// -- the runtime

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9,
                      cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100, cudaErrorLaunchFailure = 719;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure          ? emulation::failure.c_str()
           : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                    : "invalid argument";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = emulation::multiprocessors;
    return cudaSuccess;
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace emulation {

// The most that a block can have on every architecture from 8.0 on, and without asking: there the kernel's own shared
// variables count, for which 8 KB stand here.
constexpr std::size_t kSharedBytes = 99 * 1024, kSharedBytesUnasked = (48 - 8) * 1024;

alignas(128) inline unsigned char dynamic_shared[kSharedBytes];
inline std::map<const void*, std::size_t> shared_limits;  // kernels that asked for more than the default

}  // namespace emulation

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || static_cast<std::size_t>(bytes) > emulation::kSharedBytes) {
        return cudaErrorInvalidValue;
    }
    emulation::shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<std::size_t>(bytes);
    return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
    const dim3 grid = config->gridDim, threads = config->blockDim;
    const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
    if (count == 0 || count > 1024 || grid.x == 0 || grid.x > 2147483647u || grid.y == 0 || grid.y > 65535u ||
        grid.z == 0 || grid.z > 65535u) {
        return cudaErrorInvalidConfiguration;
    }
    const auto asked = emulation::shared_limits.find(reinterpret_cast<const void*>(kernel));
    if (config->dynamicSmemBytes >
        (asked == emulation::shared_limits.end() ? emulation::kSharedBytesUnasked : asked->second)) {
        return cudaErrorInvalidValue;
    }
    gridDim = grid;
    blockDim = threads;
    emulation::failure.clear();
    emulation::body = [&] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                // what an earlier block left there is of no use to this one: NaN in every floating type
                if (__start_emulated_shared != nullptr) {
                    std::memset(__start_emulated_shared, 0xff,
                                static_cast<std::size_t>(__stop_emulated_shared - __start_emulated_shared));
                }
                std::memset(emulation::dynamic_shared, 0xff, config->dynamicSmemBytes);
                blockIdx = dim3(x, y, z);
                emulation::run_block();
                if (!emulation::failure.empty()) {
                    return cudaErrorLaunchFailure;
                }
            }
        }
    }
    return cudaSuccess;
}

// -- barriers and warps

inline void __syncthreads() { emulation::wait(emulation::block.all, emulation::block.alive); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0); }

namespace emulation {

// bar.sync id, threads
inline void named_barrier(unsigned id, unsigned threads) {
    check(id < 16 && threads % kWarp == 0, "a named barrier has a number below 16 and whole warps");
    wait(block.named[id], threads);
}

template <class T>
T received(const uint64_t* values, unsigned from) {
    T value;
    std::memcpy(&value, values + from, sizeof value);
    return value;
}

template <class T>
T shuffled(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a lane's value has at most eight bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const uint64_t* values = exchange(mask, bits);
    check((mask >> from & 1) != 0, "the lane a shuffle reads from is in the mask");
    return received<T>(values, from);
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const int lane = static_cast<int>(emulation::lane());
    return emulation::shuffled(mask, value, static_cast<unsigned>((lane & ~(width - 1)) + (from & (width - 1))));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    const int lane = static_cast<int>(emulation::lane()), from = lane ^ lanes;
    return emulation::shuffled(mask, value, static_cast<unsigned>(from >= (lane | (width - 1)) + 1 ? lane : from));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    const unsigned lane = emulation::lane(), last = lane | static_cast<unsigned>(width - 1);
    return emulation::shuffled(mask, value, lane + lanes > last ? lane : lane + lanes);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    const unsigned lane = emulation::lane(), first = lane & ~static_cast<unsigned>(width - 1);
    return emulation::shuffled(mask, value, lane < first + lanes ? lane : lane - lanes);
}
inline unsigned __ballot_sync(unsigned mask, int holds) {
    const uint64_t* values = emulation::exchange(mask, holds != 0);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < emulation::kWarp; ++lane) {
        ballot |= (mask >> lane & 1) != 0 && values[lane] != 0 ? 1u << lane : 0u;
    }
    return ballot;
}
inline int __any_sync(unsigned mask, int holds) { return __ballot_sync(mask, holds) != 0; }
inline int __all_sync(unsigned mask, int holds) { return __ballot_sync(mask, holds) == mask; }

// -- values

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

template <class T>
T __ldcs(const T* p) {  // read once
    emulation::check(reinterpret_cast<uintptr_t>(p) % alignof(T) == 0, "an address is aligned");
    return *p;
}

inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
