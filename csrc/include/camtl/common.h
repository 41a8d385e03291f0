// What every kernel interface shares. No header of a deep-learning framework is included anywhere below csrc/:
// kernels see pointers, sizes, strides (counted in elements) and, on a GPU, a stream.
#pragma once

#include <cstdint>

namespace camtl {

// Storage type of activations. Arithmetic is float for all but f64, which is double ("acc" in what follows).
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Which rows belong to which sequence, and to which task.
//
// padded: cu_seqlens is null, and sequence b owns rows [b * rows_per_sequence, (b + 1) * rows_per_sequence).
// packed: cu_seqlens [batch + 1] starts at 0 and never falls; rows from cu_seqlens[batch] on belong to no
// sequence.
struct Layout {
    int64_t rows = 0;
    int64_t batch = 0;
    int64_t rows_per_sequence = 0;
    const int32_t* cu_seqlens = nullptr;
    const int64_t* task_ids = nullptr;  // [batch], each in [0, tasks); null: one table row serves all
    int64_t tasks = 0;
};

// Counter-based dropout (Philox-4x32-10), see csrc/cpu/philox.h for the numbering.
struct Dropout {
    double p = 0.0;  // 0: none
    int64_t seed = 0;
    int64_t offset = 0;
    const int64_t* on_device = nullptr;  // CUDA: seed and offset lie there, not here: the host does not wait for them
};

}  // namespace camtl
