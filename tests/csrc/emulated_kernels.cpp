// The device code of csrc/kernels.cuh, run by cuda_emulation.h, for pytest: addresses and shapes come as numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_emulation.h"

#include "kernels.cuh"

namespace py = pybind11;
using namespace leaml;
using namespace leaml::cuda;

namespace {

struct Matrix {  // (address, row stride, column stride, element size)
  int64_t address, row_stride, col_stride, element;
  explicit Matrix(const py::tuple& t)
      : address(t[0].cast<int64_t>()), row_stride(t[1].cast<int64_t>()), col_stride(t[2].cast<int64_t>()),
        element(t[3].cast<int64_t>()) {}
  View view() const { return {reinterpret_cast<char*>(address), row_stride, int32_t(col_stride)}; }
  bool aligned() const { return rows_aligned(reinterpret_cast<void*>(address), row_stride, col_stride, element); }
};

template <class T>
T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<int64_t>());
}

template <class F>
void dispatch(int w, int g, const F& f) {
  if (w == 0) return f(float{}, float{});
#if !defined(LEAML_FP32_ONLY)
  if (w == 1) return g == 0 ? f(bf16{}, float{}) : f(bf16{}, bf16{});
  return g == 0 ? f(fp16{}, float{}) : f(fp16{}, fp16{});
#else
  (void)g;
#endif
}

// parts: (weight, gradient, neurons, width, slot); outputs: (address, criterion stride, neuron stride, neurons)
double relevance(const py::list& parts, int wtype, int gtype, int dim, const py::list& outputs,
                 const std::vector<int>& criteria, int64_t scale, int64_t found_inf) {
  auto args = std::make_unique<RelevanceArgs>();
  auto finish = std::make_unique<FinishArgs>();
  std::vector<std::vector<Sums>> sums;
  std::vector<std::vector<size_t>> members(outputs.size());
  args->total = args->count = 0;
  for (const py::handle& entry : parts) {
    const py::tuple t = entry.cast<py::tuple>();
    const Matrix w(t[0].cast<py::tuple>()), g(t[1].cast<py::tuple>());
    const int64_t neurons = t[2].cast<int64_t>(), width = t[3].cast<int64_t>();
    members[t[4].cast<size_t>()].push_back(sums.size());
    sums.emplace_back(size_t(neurons));
    if (neurons == 0) continue;
    args->parts[args->count++] = {w.view(), g.view(), width, sums.back().data(), args->total, neurons,
                                  w.aligned() && g.aligned()};
    args->total += dim == 0 ? neurons : (neurons + kBlock - 1) / kBlock;
  }
  if (args->total)
    dispatch(wtype, gtype, [&](auto wt, auto gt) {
      using W = decltype(wt);
      using G = decltype(gt);
      if (dim == 0)
        emulation::launch(unsigned((args->total + kWarps - 1) / kWarps), kThreads, relevance_rows<W, G>, *args);
      else
        emulation::launch(unsigned(args->total), kThreads, relevance_columns<W, G>, *args);
    });
  finish->scale = reinterpret_cast<float*>(scale);
  finish->found_inf = reinterpret_cast<float*>(found_inf);
  finish->criteria_count = int(criteria.size());
  for (size_t i = 0; i < criteria.size(); ++i) finish->criteria[i] = criteria[i];
  finish->total = finish->count = 0;
  int count = 0;
  for (size_t j = 0; j < outputs.size(); ++j) {
    const py::tuple t = outputs[j].cast<py::tuple>();
    const int64_t neurons = t[3].cast<int64_t>();
    if (neurons == 0 || members[j].empty()) continue;
    finish->slots[finish->count++] = {pointer<float>(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                                      neurons,              finish->total,        count,
                                      int32_t(members[j].size())};
    finish->total += neurons;
    for (size_t p : members[j]) finish->parts[count++] = sums[p].data();
  }
  const unsigned blocks = unsigned((finish->total + kThreads - 1) / kThreads);
  std::vector<double> partials(blocks);
  finish->partials = partials.data();
  if (blocks) emulation::launch(blocks, kThreads, finish_relevance, *finish);
  float squared = -1.0f;
  emulation::launch(1, kThreads, sum_partials, partials.data(), int64_t(blocks), &squared);
  return squared;
}

// items: (weight, gradient, rows, m, v, m_scale, v_scale, master, step, neurons, width, k, compact)
// Returns (wg, |wg|, g^2) of every row of every tensor in the fusion, else nothing.
std::vector<std::vector<float>> update(const py::list& items, int wtype, int gtype, bool packed, bool fused,
                                       const py::dict& hyper, int64_t lr, int64_t clip, int64_t scale,
                                       int64_t found_inf) {
  auto args = std::make_unique<UpdateArgs>();
  Hyper h{};
  const double beta1 = hyper["beta1"].cast<double>(), beta2 = hyper["beta2"].cast<double>();
  h.lr = hyper["lr"].cast<double>();
  h.weight_decay = hyper["weight_decay"].cast<double>();
  h.log_beta1 = std::log(beta1), h.log_beta2 = std::log(beta2);
  h.beta2 = float(beta2), h.rest1 = float(1.0 - beta1), h.rest2 = float(1.0 - beta2);
  h.eps = hyper["eps"].cast<float>();
  h.sign = hyper["maximize"].cast<bool>() ? -1.0f : 1.0f;
  h.stochastic = hyper["stochastic"].cast<bool>();
  h.seed = hyper["seed"].cast<int64_t>();
  args->hyper = h;
  args->lr = reinterpret_cast<float*>(lr);
  args->clip = reinterpret_cast<float*>(clip);
  args->scale = reinterpret_cast<float*>(scale);
  args->found_inf = reinterpret_cast<float*>(found_inf);
  args->total = args->count = 0;
  std::vector<std::vector<Sums>> sums;
  int index = 0;
  for (const py::handle& entry : items) {
    const py::tuple t = entry.cast<py::tuple>();
    const Matrix w(t[0].cast<py::tuple>()), g(t[1].cast<py::tuple>());
    UpdateItem item{};
    item.w = w.view(), item.g = g.view();
    item.rows = pointer<int64_t>(t[2]);
    item.m = pointer<void>(t[3]), item.v = pointer<void>(t[4]);
    item.m_scale = pointer<float>(t[5]), item.v_scale = pointer<float>(t[6]);
    item.master = pointer<float>(t[7]), item.step = pointer<float>(t[8]);
    const int64_t neurons = t[9].cast<int64_t>();
    item.width = t[10].cast<int64_t>(), item.k = t[11].cast<int64_t>();
    item.compact = t[12].cast<bool>();
    item.index = index++;
    item.start = args->total;
    sums.emplace_back(size_t(fused ? neurons : 0));
    item.sums = sums.back().data();
    const int64_t state = item.width * (packed ? 1 : 4);
    item.vector = w.aligned() && g.aligned() && rows_aligned(item.m, state, 1, 1) && rows_aligned(item.v, state, 1, 1) &&
                  rows_aligned(item.master, item.width * 4, 1, 1);
    const int64_t warps = fused ? neurons : item.k;
    if (warps == 0) continue;
    args->items[args->count++] = item;
    args->total += warps;
  }
  const unsigned blocks = unsigned((args->total + kWarps - 1) / kWarps);
  if (blocks)
    dispatch(wtype, gtype, [&](auto wt, auto gt) {
      using W = decltype(wt);
      using G = decltype(gt);
      if (fused && packed) emulation::launch(blocks, kThreads, relevance_sparse_adamw<W, G, true>, *args);
      if (fused && !packed) emulation::launch(blocks, kThreads, relevance_sparse_adamw<W, G, false>, *args);
      if (!fused && packed) emulation::launch(blocks, kThreads, sparse_adamw<W, G, true>, *args);
      if (!fused && !packed) emulation::launch(blocks, kThreads, sparse_adamw<W, G, false>, *args);
    });
  std::vector<std::vector<float>> result;
  for (const auto& tensor : sums) {
    result.emplace_back();
    for (const Sums& s : tensor) result.back().insert(result.back().end(), {s.wg, s.abs_wg, s.gg});
  }
  return result;
}

__global__ void broken_barrier() {
  if (threadIdx.x % 32 < 16) __syncwarp();
}

}  // namespace

PYBIND11_MODULE(LEAML_MODULE, m) {
  m.def("relevance", &relevance);
  m.def("update", &update);
  m.def("vector_accesses", [] { return vector_accesses; });
  m.def("broken_barrier", [] { emulation::launch(1, 32, broken_barrier); });
}
