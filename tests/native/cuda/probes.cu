// Test only: small kernels that show that the emulation does what CUDA does.
#include "common.cuh"
#include "tensor_cores.h"

namespace {

using camtl::cuda::launch;

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Row i of out: what lane i received. Every kind of exchange, in whole warps and in halves that go their own ways.
__global__ void shuffle_kernel(int* out, int columns) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    int* own = out + thread * columns;
    constexpr unsigned kAll = 0xffffffffu;
    own[0] = __shfl_xor_sync(kAll, thread, 5);
    own[1] = __shfl_down_sync(kAll, thread, 3);
    own[2] = __shfl_up_sync(kAll, thread, 2, 8);
    own[3] = __shfl_sync(kAll, thread, 9, 16);
    own[4] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
    if (lane < 16) {
        own[5] = __shfl_xor_sync(0x0000ffffu, thread, 1);
        own[6] = __any_sync(0x0000ffffu, lane == 20);
    } else {
        own[5] = __shfl_xor_sync(0xffff0000u, thread, 8);
        own[5] = __shfl_xor_sync(0xffff0000u, own[5], 1);
        own[6] = __all_sync(0xffff0000u, lane > 15);
    }
    __syncwarp();
}

// Each warp but the first hands its sum to the one before, through shared memory and barriers of its own.
__global__ void chain_kernel(float* out) {
    __shared__ float left[8];
    float* values = reinterpret_cast<float*>(camtl::cuda::dynamic_shared());
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    values[threadIdx.x] = static_cast<float>(threadIdx.x + 1000 * blockIdx.x);
    __syncthreads();
    float sum = camtl::cuda::warp_sum(values[blockDim.x - 1 - threadIdx.x]);
    if (warp + 1 < warps) {
        camtl::cuda::named_barrier(warp + 1, 64);  // with the next warp, which comes later
        sum += left[warp + 1];
    }
    if (warp > 0) {
        left[warp] = sum;
        camtl::cuda::named_barrier(warp, 64);
    } else if (threadIdx.x == 0) {
        out[blockIdx.x] = sum;
    }
}

// What goes wrong on purpose. The order of threads decides (0), shared memory is read before it is written (1), half a
// block misses a barrier (2), an access straddles (3), a lane is missing in a shuffle (4); nothing is wrong (5).
__global__ void wrong_kernel(float* out, int what) {
    __shared__ float cell[64];
    const unsigned thread = threadIdx.x;
    if (what == 0) {
        cell[0] = static_cast<float>(thread);
        __syncthreads();
        out[thread] = cell[0];
    } else if (what == 1) {
        if (thread > 0) {
            cell[thread] = 1.0f;
        }
        __syncthreads();
        out[thread] = cell[thread];
    } else if (what == 2) {
        if (thread < 32) {
            __syncthreads();
            out[thread] = 1.0f;
        } else {
            camtl::cuda::named_barrier(1, 64);
        }
    } else if (what == 3) {
        out[thread] = camtl::cuda::load<4>(out + 1).v[0];
    } else if (what == 4) {
        out[thread] = thread == 3 ? 0.0f : __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    } else {
        if (thread >= 40) {
            return;  // the others' barriers do without it
        }
        cell[thread] = 1.0f;
        __syncthreads();
        out[thread] = cell[39 - thread];
    }
}

// c [16, 8] = a [16, 16] times b, one warp: by fragments from shared memory, b [16, 8] through a transposing read.
template <class S>
__global__ void product_kernel(const S* a, const S* b, float* c) {
    S* shared = reinterpret_cast<S*>(camtl::cuda::dynamic_shared());
    S* const shared_b = shared + 16 * 16;
    const int lane = static_cast<int>(threadIdx.x);
    emulation::cp_async(shared + 8 * lane, a + 8 * lane, 16);
    if (lane < 16) {
        emulation::cp_async(shared_b + 8 * lane, b + 8 * lane, 16);
    }
    __syncwarp();
    unsigned of_a[4], of_b[2];
    emulation::ldmatrix<4>(of_a, shared + lane % 16 * 16 + lane / 16 * 8, false);
    emulation::ldmatrix<2>(of_b, shared_b + lane % 16 * 8, true);
    float d[4] = {};
    emulation::mma_16<S>(d, of_a, of_b);
    for (int i = 0; i < 4; ++i) {
        c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}

// The same in tf32 for a [16, 8], b [8, 8].
__global__ void tf32_kernel(const float* a, const float* b, float* c) {
    const int group = static_cast<int>(threadIdx.x) / 4, four = static_cast<int>(threadIdx.x) % 4;
    unsigned of_a[4], of_b[2];
    for (int i = 0; i < 4; ++i) {
        of_a[i] = __float_as_uint(a[(group + i % 2 * 8) * 8 + four + i / 2 * 4]);
    }
    for (int i = 0; i < 2; ++i) {
        of_b[i] = __float_as_uint(b[(four + 4 * i) * 8 + group]);
    }
    float d[4] = {};
    emulation::mma_tf32(d, of_a, of_b);
    for (int i = 0; i < 4; ++i) {
        c[(group + i / 2 * 8) * 8 + four * 2 + i % 2] = d[i];
    }
}

}  // namespace

namespace probes {

const camtl::cuda::Launch kWhere{0, nullptr, camtl::DType::f32, false};

void shuffle(std::uintptr_t out, int columns, unsigned threads) {
    launch("shuffle", shuffle_kernel, dim3(1), dim3(threads), kWhere, at<int>(out), columns);
}

void chain(std::uintptr_t out, unsigned blocks, unsigned threads) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = std::size_t{threads} * sizeof(float);
    camtl::cuda::check(cudaLaunchKernelEx(&config, chain_kernel, at<float>(out)), "chain");
}

void wrong(std::uintptr_t out, int what) {
    launch("wrong", wrong_kernel, dim3(2), dim3(64), kWhere, at<float>(out), what);
}

void shared_memory(int asked, int bytes) {
    if (asked > 0) {
        camtl::cuda::check(cudaFuncSetAttribute(chain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, asked),
                           "shared_memory");
    }
    float out = 0;
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(32);
    config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
    camtl::cuda::check(cudaLaunchKernelEx(&config, chain_kernel, &out), "shared_memory");
}

void product(std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, int dtype) {
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(32);
    config.dynamicSmemBytes = (16 * 16 + 16 * 8) * 2;
    const auto run = [&](auto storage) {
        using S = decltype(storage);
        camtl::cuda::check(cudaLaunchKernelEx(&config, product_kernel<S>, at<const S>(a), at<const S>(b), at<float>(c)),
                           "product");
    };
    if (dtype == 0) {
        camtl::cuda::check(
            cudaLaunchKernelEx(&config, tf32_kernel, at<const float>(a), at<const float>(b), at<float>(c)), "product");
    } else if (dtype == 2) {
        run(camtl::cuda::bf16{});
    } else {
        run(camtl::cuda::f16{});
    }
}

}  // namespace probes
