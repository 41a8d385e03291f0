// Sharing work out to threads, and choosing the template of a storage type.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace camtl::cpu::CAMTL_ISA {

// One copy of the body's code for both ways below: in two the compiler would choose differently which products
// and sums to fuse into one rounding, and results would depend on the number of threads.
#if defined(__clang__)
#define CAMTL_ONE_COPY __attribute__((noinline))
#else
#define CAMTL_ONE_COPY __attribute__((noinline, noclone))
#endif
template <class F>
CAMTL_ONE_COPY void run_item(F& body, int64_t item, int thread) {
    body(item, thread);
}

// body(item, thread) for items 0 .. count - 1 in any order; thread < threads. With one thread no OpenMP
// region is entered, which also keeps processes that were forked after one was (data loader workers) safe.
template <class F>
inline void parallel_for(int64_t count, int threads, F&& body) {
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t item = 0; item < count; ++item) {
            run_item(body, item, omp_get_thread_num());
        }
        return;
    }
#endif
    for (int64_t item = 0; item < count; ++item) {
        run_item(body, item, 0);
    }
}

// f(S{}) with S the storage type: the one place where a kernel's template is picked.
template <class F>
inline void with_storage(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32:
            return f(float{});
        case DType::f64:
            return f(double{});
        case DType::bf16:
            return f(bf16{});
        case DType::f16:
            return f(f16{});
    }
}

}  // namespace camtl::cpu::CAMTL_ISA
