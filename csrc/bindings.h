// What the files that define camtl._native share: from Python's tuples and addresses to the kernels' structs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "camtl/common.h"
#include "camtl/conditional_attention.h"

namespace py = pybind11;

namespace camtl::bindings {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// (rows, batch, rows_per_sequence, cu_seqlens, task_ids, tasks)
inline Layout layout(const py::tuple& t) {
    Layout l;
    l.rows = t[0].cast<int64_t>();
    l.batch = t[1].cast<int64_t>();
    l.rows_per_sequence = t[2].cast<int64_t>();
    l.cu_seqlens = at<const int32_t>(t[3].cast<Address>());
    l.task_ids = at<const int64_t>(t[4].cast<Address>());
    l.tasks = t[5].cast<int64_t>();
    return l;
}

// (p, seed, offset)
inline Dropout dropout(const py::tuple& t) { return {t[0].cast<double>(), t[1].cast<int64_t>(), t[2].cast<int64_t>()}; }

// (address, sequence stride, position stride, head stride)
inline AttentionTensor strided(const py::tuple& t) {
    return {at<const void>(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// (dtype, layout, heads, head_size, length, table, table_per_task, table_rows, width, gamma, beta, mask, scale,
// dropout, threads)
inline AttentionShape attention_shape(const py::tuple& t) {
    AttentionShape s{};
    s.dtype = static_cast<DType>(t[0].cast<int>());
    s.layout = layout(t[1].cast<py::tuple>());
    s.heads = t[2].cast<int64_t>();
    s.head_size = t[3].cast<int64_t>();
    s.length = t[4].cast<int64_t>();
    s.table = at<const void>(t[5].cast<Address>());
    s.table_per_task = t[6].cast<bool>();
    s.table_rows = t[7].cast<int64_t>();
    s.width = t[8].cast<int64_t>();
    s.gamma = at<const void>(t[9].cast<Address>());
    s.beta = at<const void>(t[10].cast<Address>());
    s.mask = at<const uint8_t>(t[11].cast<Address>());
    s.scale = t[12].cast<double>();
    s.dropout = dropout(t[13].cast<py::tuple>());
    s.threads = t[14].cast<int>();
    return s;
}

}  // namespace camtl::bindings
