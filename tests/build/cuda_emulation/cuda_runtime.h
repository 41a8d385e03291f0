// Test only: enough of CUDA for a C++ compiler to build the kernels of csrc/cuda and run them on the CPU, one thread of
// a block after the other. Each is a fiber, which __syncthreads leaves for the next. Shows wrong results and addresses;
// shows nothing of races, speed, or what a real compiler makes of the kernels.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInsufficientDriver = 35,
                      cudaErrorNoDevice = 100;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace emulation {

constexpr std::size_t kStack = 64 * 1024;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    dim3 index;
    bool done;
};

inline std::vector<Fiber> fibers;
inline Fiber* running = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void enter() {
    body();
    running->done = true;
}

inline void run_block() {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    if (fibers.size() < count) {
        fibers.resize(count);
    }
    for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(kStack);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &scheduler;
        fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
        fiber.done = false;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned left = count; left > 0;) {
        for (unsigned i = 0; i < count; ++i) {
            if (!fibers[i].done) {
                running = &fibers[i];
                threadIdx = running->index;
                swapcontext(&scheduler, &running->context);
                left -= running->done;
            }
        }
    }
}

}  // namespace emulation

inline void __syncthreads() { swapcontext(&emulation::running->context, &emulation::scheduler); }

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
    const dim3 grid = config->gridDim, block = config->blockDim;
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 2147483647u || grid.y == 0 || grid.y > 65535u ||
        grid.z == 0 || grid.z > 65535u) {
        return cudaErrorInvalidConfiguration;
    }
    gridDim = grid;
    blockDim = block;
    emulation::body = [&] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                emulation::run_block();
            }
        }
    }
    return cudaSuccess;
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
