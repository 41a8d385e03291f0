#include <atomic>
#include <cstring>

#include "isa.h"

namespace camtl::cpu {

#define CAMTL_DECLARE(name, Arguments) void name(const Arguments&);
#ifdef CAMTL_HAS_AVX512
namespace avx512 {
CAMTL_CPU_KERNELS(CAMTL_DECLARE)
}
#endif
#ifdef CAMTL_HAS_AVX2
namespace avx2 {
CAMTL_CPU_KERNELS(CAMTL_DECLARE)
}
#endif
namespace baseline {
CAMTL_CPU_KERNELS(CAMTL_DECLARE)
}

namespace {

enum Isa : int { kAvx512, kAvx2, kBaseline };
constexpr const char* kNames[] = {"avx512", "avx2", "baseline"};

// What x86-64-v3 and x86-64-v4 promise to a compiler, as far as processors differ in it.
bool runs(int isa) {
#ifdef CAMTL_HAS_AVX512
    if (isa == kAvx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("f16c");
    }
#endif
#ifdef CAMTL_HAS_AVX2
    if (isa == kAvx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
    }
#endif
    return isa == kBaseline;
}

int widest() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    return runs(kAvx512) ? kAvx512 : runs(kAvx2) ? kAvx2 : kBaseline;
}

std::atomic<int>& chosen() {
    static std::atomic<int> isa{widest()};
    return isa;
}

}  // namespace

const char* const* available_isas() {
    static const char* names[4] = {};
    static const bool filled = [] {
        int count = 0;
        for (int isa = widest(); isa <= kBaseline; ++isa) {
            if (runs(isa)) {
                names[count++] = kNames[isa];
            }
        }
        return true;
    }();
    (void)filled;
    return names;
}

const char* current_isa() { return kNames[chosen().load(std::memory_order_relaxed)]; }

bool set_isa(const char* name) {
    for (int isa = widest(); isa <= kBaseline; ++isa) {
        if (runs(isa) && std::strcmp(name, kNames[isa]) == 0) {
            chosen().store(isa, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

#ifdef CAMTL_HAS_AVX512
#define CAMTL_CASE_AVX512(name) \
    case kAvx512:               \
        return avx512::name(arguments);
#else
#define CAMTL_CASE_AVX512(name)
#endif
#ifdef CAMTL_HAS_AVX2
#define CAMTL_CASE_AVX2(name) \
    case kAvx2:               \
        return avx2::name(arguments);
#else
#define CAMTL_CASE_AVX2(name)
#endif
#define CAMTL_DEFINE(name, Arguments)                       \
    void name(const Arguments& arguments) {                 \
        switch (chosen().load(std::memory_order_relaxed)) { \
            CAMTL_CASE_AVX512(name)                         \
            CAMTL_CASE_AVX2(name)                           \
            default:                                        \
                return baseline::name(arguments);           \
        }                                                   \
    }
CAMTL_CPU_KERNELS(CAMTL_DEFINE)

}  // namespace camtl::cpu
