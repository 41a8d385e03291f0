#include "plan.h"

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace camtl::cpu {

void check_layout(const Layout& layout) {
    if (layout.task_ids != nullptr) {
        for (int64_t b = 0; b < layout.batch; ++b) {
            const int64_t task = layout.task_ids[b];
            if (task < 0 || task >= layout.tasks) {
                throw std::invalid_argument("task_ids must be in [0, " + std::to_string(layout.tasks) +
                                            "), the tasks of the tables; got " + std::to_string(task));
            }
        }
    }
    if (layout.cu_seqlens != nullptr) {
        int64_t before = 0;
        for (int64_t b = 0; b <= layout.batch; ++b) {
            const int64_t end = layout.cu_seqlens[b];
            if (end < before || (b == 0 && end != 0)) {
                throw std::invalid_argument("cu_seqlens must start at 0 and be non-decreasing; got " +
                                            std::to_string(end) + " at " + std::to_string(b));
            }
            before = end;
        }
        if (before > layout.rows) {
            throw std::invalid_argument("cu_seqlens must end at or before N = " + std::to_string(layout.rows) +
                                        " rows; got " + std::to_string(before));
        }
    }
}

void check_lengths(const Layout& layout, int64_t longest) {
    for (int64_t b = 0; layout.cu_seqlens != nullptr && b < layout.batch; ++b) {
        const int64_t length = layout.cu_seqlens[b + 1] - layout.cu_seqlens[b];
        if (length > longest) {
            throw std::invalid_argument("cu_seqlens must hold sequences of at most " + std::to_string(longest) +
                                        " positions; got " + std::to_string(length) + " at " + std::to_string(b));
        }
    }
}

Plan::Plan(const Layout& layout, int64_t most_rows) {
    check_layout(layout);
    std::vector<Chunk> chunks;
    const auto add = [&](int64_t begin, int64_t end, int64_t task) {
        while (begin < end) {
            Chunk* last = chunks.empty() ? nullptr : &chunks.back();
            if (last != nullptr && last->task == task && last->end == begin && last->end - last->begin < most_rows) {
                const int64_t room = most_rows - (last->end - last->begin);
                last->end = end - begin < room ? end : begin + room;
                begin = last->end;
            } else {
                const int64_t next = end - begin < most_rows ? end : begin + most_rows;
                chunks.push_back({begin, next, task});
                begin = next;
            }
        }
    };
    if (layout.task_ids == nullptr && layout.cu_seqlens == nullptr) {
        add(0, layout.rows, 0);
    } else {
        for (int64_t b = 0; b < layout.batch; ++b) {
            const int64_t begin = layout.cu_seqlens != nullptr ? layout.cu_seqlens[b] : b * layout.rows_per_sequence;
            const int64_t end =
                layout.cu_seqlens != nullptr ? layout.cu_seqlens[b + 1] : begin + layout.rows_per_sequence;
            add(begin, end, layout.task_ids != nullptr ? layout.task_ids[b] : 0);
        }
        if (layout.cu_seqlens != nullptr) {
            add(layout.cu_seqlens[layout.batch], layout.rows, -1);
        }
    }
    count_ = static_cast<int64_t>(chunks.size());
    chunks_ = new Chunk[chunks.size()];
    for (int64_t i = 0; i < count_; ++i) {
        chunks_[i] = chunks[static_cast<std::size_t>(i)];
    }
}

Plan::~Plan() { delete[] chunks_; }

Scratch::Scratch(std::size_t bytes) : data_(::operator new(bytes == 0 ? 64 : bytes, std::align_val_t{64})) {}

Scratch::~Scratch() { ::operator delete(data_, std::align_val_t{64}); }

}  // namespace camtl::cpu
