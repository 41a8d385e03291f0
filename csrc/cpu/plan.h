// Work that does not depend on the instruction set or the number of threads: row chunks and scratch memory.
//
// Gradients of tables and weights are sums over rows. Each chunk, a run of rows of one task and of at most a
// fixed number, makes one partial sum; the partials are then added in the order of the chunks. Chunks follow
// from the layout alone, so the sums are the same bits for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "camtl/common.h"

namespace camtl::cpu {

struct Chunk {
    int64_t begin;
    int64_t end;
    int64_t task;  // -1: rows of no sequence
};

class Plan {
public:
    // Throws std::invalid_argument if a task id or cu_seqlens is not as Layout says: kernels index with them.
    Plan(const Layout& layout, int64_t most_rows);
    ~Plan();
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    __attribute__((always_inline)) int64_t size() const { return count_; }
    __attribute__((always_inline)) const Chunk& operator[](int64_t i) const { return chunks_[i]; }

private:
    Chunk* chunks_ = nullptr;
    int64_t count_ = 0;
};

// Throws std::invalid_argument where Layout's promises about values are broken.
void check_layout(const Layout& layout);
// Throws std::invalid_argument where a packed sequence is longer than `longest`.
void check_lengths(const Layout& layout, int64_t longest);

// Their small methods are always inlined: kernel files are compiled once per instruction set, and a copy that
// one of them leaves behind must not serve the others.

// Uninitialised memory, aligned for any vector; throws std::bad_alloc.
class Scratch {
public:
    explicit Scratch(std::size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    __attribute__((always_inline)) T* as() const {
        return static_cast<T*>(data_);
    }

private:
    void* data_;
};

// Rows a chunk has at most: enough that partials cost little memory, few enough to share the work out.
constexpr int64_t kChunkRows = 64;

}  // namespace camtl::cpu
