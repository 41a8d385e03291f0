// The second stage of weight and table gradients: chunks' partial sums added in the chunks' order, in double.
#pragma once

#include "parallel.h"
#include "plan.h"

namespace camtl::cpu::CAMTL_ISA {

// Features that one thread sums at a time.
constexpr int64_t kReduceFeatures = 128;

// out [groups, D] = for each group the sum of partials[c * stride + d] over the chunks whose task is in the group.
template <class A, class F>
inline void sum_chunks(A* out, int64_t groups, const A* partials, int64_t stride, const Plan& plan, int64_t D,
                       int threads, F in_group) {
    const int64_t blocks = (D + kReduceFeatures - 1) / kReduceFeatures;
    parallel_for(groups * blocks, threads, [&](int64_t item, int) {
        const int64_t group = item / blocks, begin = item % blocks * kReduceFeatures;
        const int64_t n = D - begin < kReduceFeatures ? D - begin : kReduceFeatures;
        double sums[kReduceFeatures] = {};
        for (int64_t c = 0; c < plan.size(); ++c) {
            if (in_group(plan[c].task, group)) {
                const A* partial = partials + c * stride + begin;
                for (int64_t d = 0; d < n; ++d) {
                    sums[d] += static_cast<double>(partial[d]);
                }
            }
        }
        for (int64_t d = 0; d < n; ++d) {
            out[group * D + begin + d] = static_cast<A>(sums[d]);
        }
    });
}

// out [tasks, D]: over the chunks of each task.
template <class A>
inline void sum_by_task(A* out, const A* partials, int64_t stride, const Plan& plan, int64_t tasks, int64_t D,
                        int threads) {
    sum_chunks(out, tasks, partials, stride, plan, D, threads,
               [](int64_t task, int64_t group) { return task == group; });
}

// out [D]: over all chunks that belong to a sequence.
template <class A>
inline void sum_over_chunks(A* out, const A* partials, int64_t stride, const Plan& plan, int64_t D, int threads) {
    sum_chunks(out, int64_t{1}, partials, stride, plan, D, threads, [](int64_t task, int64_t) { return task >= 0; });
}

}  // namespace camtl::cpu::CAMTL_ISA
