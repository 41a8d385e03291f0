// The second stage of weight and table gradients: chunks' partial sums added in the chunks' order, in double.
#pragma once

#include "parallel.h"
#include "plan.h"

namespace camtl::cpu::CAMTL_ISA {

// Features that one thread sums at a time.
constexpr int64_t kReduceFeatures = 128;

// out [tasks, D] = for each task the sum of partials[c * stride + d] over the chunks c of that task.
template <class A>
inline void sum_by_task(A* out, const A* partials, int64_t stride, const Plan& plan, int64_t tasks, int64_t D,
                        int threads) {
    const int64_t blocks = (D + kReduceFeatures - 1) / kReduceFeatures;
    parallel_for(tasks * blocks, threads, [&](int64_t item, int) {
        const int64_t task = item / blocks, begin = item % blocks * kReduceFeatures;
        const int64_t n = D - begin < kReduceFeatures ? D - begin : kReduceFeatures;
        double sums[kReduceFeatures] = {};
        for (int64_t c = 0; c < plan.size(); ++c) {
            if (plan[c].task == task) {
                const A* partial = partials + c * stride + begin;
                for (int64_t d = 0; d < n; ++d) {
                    sums[d] += static_cast<double>(partial[d]);
                }
            }
        }
        for (int64_t d = 0; d < n; ++d) {
            out[task * D + begin + d] = static_cast<A>(sums[d]);
        }
    });
}

// out [D] = the sum of partials[c * stride + d] over all chunks that belong to a sequence.
template <class A>
inline void sum_over_chunks(A* out, const A* partials, int64_t stride, const Plan& plan, int64_t D, int threads) {
    const int64_t blocks = (D + kReduceFeatures - 1) / kReduceFeatures;
    parallel_for(blocks, threads, [&](int64_t item, int) {
        const int64_t begin = item * kReduceFeatures;
        const int64_t n = D - begin < kReduceFeatures ? D - begin : kReduceFeatures;
        double sums[kReduceFeatures] = {};
        for (int64_t c = 0; c < plan.size(); ++c) {
            if (plan[c].task >= 0) {
                const A* partial = partials + c * stride + begin;
                for (int64_t d = 0; d < n; ++d) {
                    sums[d] += static_cast<double>(partial[d]);
                }
            }
        }
        for (int64_t d = 0; d < n; ++d) {
            out[begin + d] = static_cast<A>(sums[d]);
        }
    });
}

}  // namespace camtl::cpu::CAMTL_ISA
