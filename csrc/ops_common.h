// From torch's stable ABI to plain structs, with every argument checked: shared by the CPU and the CUDA ops.
//
// Covers: shapes, dtypes, strides, devices; each failure says what was got and what was wanted.
// Does not cover: schemas (leaml_plugin/ops/_library.py) and values that only a kernel sees (row indices).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "numerics.h"

namespace leaml {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline Dtype dtype_of(const Tensor& t, const char* name, size_t i) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, " ", i, ": wanted float32, bfloat16 or float16, got scalar type ",
                      static_cast<int>(t.scalar_type()));
  }
}

// A vector or matrix seen as rows x cols.
struct Matrix {
  char* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
  Matrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

inline Matrix matrix_of(const Tensor& t, const char* name, size_t i) {
  STD_TORCH_CHECK(t.dim() == 1 || t.dim() == 2, name, " ", i, ": wanted 1 or 2 dimensions, got ", t.dim());
  Matrix m;
  m.data = static_cast<char*>(t.data_ptr());
  m.dtype = dtype_of(t, name, i);
  m.rows = t.size(0);
  m.row_stride = t.stride(0);
  m.cols = t.dim() == 2 ? t.size(1) : 1;
  m.col_stride = t.dim() == 2 ? t.stride(1) : 1;
  if (m.cols == 1) m.col_stride = 1;
  return m;
}

template <class A, class B>
void check_count(const char* name, const A& list, const B& like) {
  STD_TORCH_CHECK(list.size() == like.size(), name, ": wanted ", like.size(), " tensors, got ", list.size());
}

inline void check_device(const Tensor& t, bool cuda, int32_t index, const char* name, size_t i) {
  STD_TORCH_CHECK(cuda ? t.is_cuda() && t.get_device_index() == index : t.is_cpu(), name, " ", i,
                  ": wanted a tensor on ", cuda ? "the CUDA device of the first weight" : "the CPU");
}

inline void check_pair(const Matrix& w, const Matrix& g, size_t i) {
  STD_TORCH_CHECK(g.dtype == w.dtype || g.dtype == Dtype::f32, "gradient ", i,
                  ": wanted its weight's dtype or float32, got another one");
}

inline const float* scalar_of(const std::optional<Tensor>& t, const char* name, bool cuda, int32_t index) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == ScalarType::Float, name,
                  ": wanted one float32 element, got ", t->numel(), " elements of scalar type ",
                  static_cast<int>(t->scalar_type()));
  check_device(*t, cuda, index, name, 0);
  return static_cast<const float*>(t->data_ptr());
}

// --- relevance -----------------------------------------------------------------------------------------------------

// One weight with its gradient, turned so that its neurons are its rows (dim 0) or stay its columns (dim 1).
struct Part {
  Matrix w, g;
  int dim, slot;
  int64_t neurons() const { return dim == 0 ? w.rows : w.cols; }
  int64_t width() const { return dim == 0 ? w.cols : w.rows; }
  // of a transposed weight and gradient, the neurons are columns of what lies in memory
  Part as_it_lies() const {
    const bool across = w.col_stride != 1 && w.row_stride == 1 && g.col_stride != 1 && g.row_stride == 1;
    return across ? Part{w.transposed(), g.transposed(), 1 - dim, slot} : *this;
  }
};

struct Output {
  float* data;
  int64_t neurons, criterion_stride, neuron_stride;
};

inline std::vector<Output> outputs_of(const Tensors& out, const std::vector<int64_t>& criteria, bool cuda, int32_t index) {
  STD_TORCH_CHECK(!criteria.empty() && criteria.size() <= 4, "criteria: wanted one to four, got ", criteria.size());
  for (int64_t c : criteria) STD_TORCH_CHECK(c >= 0 && c <= 3, "criteria: wanted codes 0 to 3, got ", c);
  std::vector<Output> result;
  for (size_t j = 0; j < out.size(); ++j) {
    const Tensor& t = out[j];
    check_device(t, cuda, index, "out", j);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "out ", j, ": wanted float32, got scalar type ",
                    static_cast<int>(t.scalar_type()));
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == int64_t(criteria.size()), "out ", j, ": wanted [", criteria.size(),
                    ", neurons], got ", t.dim(), " dimensions", t.dim() == 2 ? ", the first of " : "",
                    t.dim() == 2 ? t.size(0) : 0);
    result.push_back({static_cast<float*>(t.data_ptr()), t.size(1), t.stride(0), t.stride(1)});
  }
  // two outs in one place would be added to by two threads at once
  std::vector<std::pair<const float*, size_t>> places;
  for (size_t j = 0; j < out.size(); ++j)
    if (result[j].neurons > 0) places.push_back({result[j].data, j});
  std::sort(places.begin(), places.end());
  for (size_t j = 1; j < places.size(); ++j)
    STD_TORCH_CHECK(places[j].first != places[j - 1].first, "out ", places[j].second,
                    ": wanted memory of its own, got that of out ", places[j - 1].second,
                    "; weights of the same neurons share one out through slots=");
  return result;
}

inline void check_slot(int64_t slot, int64_t neurons, const std::vector<Output>& out, size_t i) {
  STD_TORCH_CHECK(slot >= 0 && slot < int64_t(out.size()), "slots ", i, ": wanted 0 to ", out.size(), " exclusive, got ",
                  slot);
  STD_TORCH_CHECK(neurons == out[size_t(slot)].neurons, "weight ", i, ": its slot holds ", out[size_t(slot)].neurons,
                  " neurons, it has ", neurons);
}

inline std::vector<Part> parts_of(const Tensors& weights, const Tensors& grads, const std::vector<int64_t>& dims,
                                  const std::vector<int64_t>& slots, const std::vector<Output>& out, bool cuda,
                                  int32_t index) {
  check_count("grads", grads, weights);
  check_count("dims", dims, weights);
  check_count("slots", slots, weights);
  std::vector<Part> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_device(weights[i], cuda, index, "weight", i);
    check_device(grads[i], cuda, index, "gradient", i);
    Part p{matrix_of(weights[i], "weight", i), matrix_of(grads[i], "gradient", i), int(dims[i]), int(slots[i])};
    check_pair(p.w, p.g, i);
    STD_TORCH_CHECK(p.w.rows == p.g.rows && p.w.cols == p.g.cols, "gradient ", i, ": wanted [", p.w.rows, ", ", p.w.cols,
                    "] like its weight, got [", p.g.rows, ", ", p.g.cols, "]");
    STD_TORCH_CHECK(dims[i] == 0 || dims[i] == 1, "dims ", i, ": wanted 0 or 1, got ", dims[i]);
    check_slot(slots[i], p.neurons(), out, i);
    parts.push_back(p.as_it_lies());
  }
  return parts;
}

// --- sparse AdamW --------------------------------------------------------------------------------------------------

struct Update {
  Matrix w, g;
  const int64_t* rows;
  int64_t k, width;
  bool compact;              // the gradient has k rows
  void *m, *v;               // fp32, or uint8 with scales
  float *m_scale, *v_scale;  // null for fp32 states
  float* master;             // null where the step is taken on the weight itself
  float* step;
};

inline void* state_of(const Tensor& t, ScalarType wanted, int64_t k, int64_t width, const char* name, size_t i, bool cuda,
                      int32_t index) {
  check_device(t, cuda, index, name, i);
  STD_TORCH_CHECK(t.scalar_type() == wanted, name, " ", i, ": wanted ",
                  wanted == ScalarType::Byte ? "uint8 (scales were given)" : "float32", ", got scalar type ",
                  static_cast<int>(t.scalar_type()),
                  "; a bfloat16 or float16 second moment cannot decay at beta2 = 0.999");
  STD_TORCH_CHECK(t.numel() == k * width && t.is_contiguous(), name, " ", i, ": wanted a contiguous [", k, ", ", width,
                  "], got ", t.numel(), " elements", t.is_contiguous() ? "" : ", not contiguous");
  return t.data_ptr();
}

inline std::vector<Update> updates_of(const Tensors& params, const Tensors& rows, const Tensors& grads,
                                      const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& steps,
                                      const Tensors& m_scale, const Tensors& v_scale, const Tensors& masters,
                                      bool dense_only, bool cuda, int32_t index) {
  check_count("rows", rows, params);
  check_count("grads", grads, params);
  check_count("exp_avg", exp_avg, params);
  check_count("exp_avg_sq", exp_avg_sq, params);
  check_count("steps", steps, params);
  const bool eight_bit = !m_scale.empty();
  if (eight_bit) check_count("exp_avg_scale", m_scale, params);
  if (eight_bit || !v_scale.empty()) check_count("exp_avg_sq_scale", v_scale, params);
  STD_TORCH_CHECK(eight_bit == !v_scale.empty(), "scales: wanted both exp_avg_scale and exp_avg_sq_scale, or neither");
  if (!masters.empty()) check_count("masters", masters, params);
  const ScalarType state = eight_bit ? ScalarType::Byte : ScalarType::Float;
  std::vector<Update> updates;
  for (size_t i = 0; i < params.size(); ++i) {
    Update u{};
    check_device(params[i], cuda, index, "param", i);
    check_device(grads[i], cuda, index, "gradient", i);
    check_device(rows[i], cuda, index, "rows", i);
    u.w = matrix_of(params[i], "param", i);
    u.g = matrix_of(grads[i], "gradient", i);
    check_pair(u.w, u.g, i);
    STD_TORCH_CHECK(rows[i].scalar_type() == ScalarType::Long && rows[i].dim() == 1 && rows[i].is_contiguous(), "rows ", i,
                    ": wanted a contiguous int64 vector, got ", rows[i].dim(), " dimensions of scalar type ",
                    static_cast<int>(rows[i].scalar_type()));
    u.rows = static_cast<const int64_t*>(rows[i].data_ptr());
    u.k = rows[i].numel();
    u.width = u.w.cols;
    STD_TORCH_CHECK(u.k <= u.w.rows, "rows ", i, ": wanted at most ", u.w.rows, " indices, got ", u.k);
    u.compact = u.g.rows == u.k && u.g.rows != u.w.rows;
    STD_TORCH_CHECK(u.g.cols == u.width && (u.g.rows == u.w.rows || (u.compact && !dense_only)), "gradient ", i,
                    ": wanted ", u.w.rows, dense_only ? " rows" : " rows (dense) or ", dense_only ? 0 : u.k,
                    " rows (compact) of ", u.width, ", got ", u.g.rows, " of ", u.g.cols);
    u.m = state_of(exp_avg[i], state, u.k, u.width, "exp_avg", i, cuda, index);
    u.v = state_of(exp_avg_sq[i], state, u.k, u.width, "exp_avg_sq", i, cuda, index);
    u.step = static_cast<float*>(state_of(steps[i], ScalarType::Float, u.k, 1, "steps", i, cuda, index));
    if (eight_bit) {
      const int64_t blocks = (u.width + kBlock - 1) / kBlock;
      u.m_scale = static_cast<float*>(
          state_of(m_scale[i], ScalarType::Float, u.k, blocks, "exp_avg_scale", i, cuda, index));
      u.v_scale = static_cast<float*>(
          state_of(v_scale[i], ScalarType::Float, u.k, blocks, "exp_avg_sq_scale", i, cuda, index));
    }
    if (!masters.empty() && masters[i].numel() > 0)
      u.master = static_cast<float*>(
          state_of(masters[i], ScalarType::Float, u.k, u.width, "masters", i, cuda, index));
    updates.push_back(u);
  }
  return updates;
}

// Of the fusion, where every row of a weight feeds its slot.
inline void check_slots(const std::vector<int64_t>& slots, const std::vector<Update>& updates, const std::vector<Output>& out) {
  check_count("slots", slots, updates);
  for (size_t i = 0; i < updates.size(); ++i) check_slot(slots[i], updates[i].w.rows, out, i);
}

inline Hyper hyper_of(double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                      bool stochastic, int64_t seed) {
  STD_TORCH_CHECK(beta1 >= 0.0 && beta1 < 1.0 && beta2 >= 0.0 && beta2 < 1.0, "betas: wanted 0 <= beta < 1, got ", beta1,
                  " and ", beta2);
  Hyper h{};
  h.lr = lr;
  h.weight_decay = weight_decay;
  h.log_beta1 = std::log(beta1);
  h.log_beta2 = std::log(beta2);
  h.beta2 = float(beta2);
  h.rest1 = float(1.0 - beta1);
  h.rest2 = float(1.0 - beta2);
  h.eps = float(eps);
  h.sign = maximize ? -1.0f : 1.0f;
  h.stochastic = stochastic;
  h.seed = seed;
  return h;
}

}  // namespace leaml
