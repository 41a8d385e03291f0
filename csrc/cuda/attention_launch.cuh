// From a call of conditional_attention to its kernels: which of them, what they are told, how they are launched.
#pragma once

#include <type_traits>

#include "camtl/conditional_attention.h"

#include "attention.cuh"

namespace camtl::cuda::attention {

constexpr char kOp[] = "conditional_attention";

// f(S{}, integral constant D) of a call.
template <class F>
void with_kind(const AttentionShape& s, const Launch& where, F&& f) {
    if (where.tables != DType::f32 && where.tables != s.dtype) {
        throw std::invalid_argument("conditional_attention (cuda): tables must be float32 or of q's dtype");
    }
    const auto with_size = [&](auto storage) {
        switch (s.head_size) {
            case 32:
                return f(storage, std::integral_constant<int, 32>{});
            case 64:
                return f(storage, std::integral_constant<int, 64>{});
            case 128:
                return f(storage, std::integral_constant<int, 128>{});
            default:
                throw std::invalid_argument("conditional_attention (cuda): Dh must be 32, 64 or 128; got " +
                                            std::to_string(s.head_size));
        }
    };
    switch (s.dtype) {
        case DType::f32:
            return with_size(float{});
        case DType::bf16:
            return with_size(bf16{});
        case DType::f16:
            return with_size(f16{});
        default:
            throw std::invalid_argument("conditional_attention (cuda): float64 is not supported");
    }
}

template <class S>
Rows<S> rows_of(const AttentionTensor& t) {
    const auto whole = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(S)) % 16 == 0; };
    using Plain = std::remove_const_t<S>;
    return {static_cast<S*>(const_cast<void*>(t.data)), t.sequence, t.position, t.head,
            aligned<Plain>(16 / static_cast<int>(sizeof(S)), t.data, t.position) && whole(t.sequence) && whole(t.head)};
}

inline Problem problem_of(const AttentionShape& s, const Launch& where) {
    Problem p{};
    p.sequences = sequences(s.layout, where, kOp);
    p.heads = as_int(s.heads, kOp, "heads");
    p.longest = as_int(s.length, kOp, "positions");
    as_int(s.layout.batch * s.heads * divide_up(s.length > 0 ? s.length : 1, kOwn), kOp, "tiles of heads");
    p.width = s.table == nullptr ? 0 : as_int(s.width, kOp, "columns");
    p.columns = p.width < p.longest ? p.width : p.longest;
    p.task_table = s.table_per_task ? s.table_rows * s.width : 0;
    p.table = s.table;
    p.gamma = s.gamma;
    p.beta = s.beta;
    p.narrow = where.tables != DType::f32;
    p.mask = s.mask;
    p.scale = static_cast<float>(s.scale);
    p.factor = static_cast<float>(s.scale * 1.4426950408889634);
    p.dropout = dropping(s.dropout);
    return p;
}

// What a launch gets without asking is 48 KB, in which the kernels' own variables lie too: less than 8 KB, as
// tests/native/test_ptxas.py sees to.
constexpr int64_t kUnasked = 40 * 1024;

// launch() with shared memory of a size that the call sets.
template <class... Parameters, class... Arguments>
void launch_with(int64_t shared_bytes, void (*kernel)(Parameters...), dim3 grid, dim3 block, const Launch& where,
                 Arguments... arguments) {
    check(cudaSetDevice(where.device), kOp);
    if (shared_bytes > kUnasked) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              kOp);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(where.stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), kOp);
}

inline int64_t column_bytes(const Problem& p) { return divide_up(int64_t{p.columns} * 8, 16) * 16; }

}  // namespace camtl::cuda::attention
