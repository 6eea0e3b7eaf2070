// The CUDA implementations of torch.ops.leaml.*: arguments packed by value, one launch for all tensors of a dtype.
//
// Covers: packing, alignment, the limits of one launch. The tests run this file on the CPU too: with LEAML_EMULATED,
// tests/csrc/emulated_ops.cpp has defined Device, launch and the rest of what the first block here is for a GPU.
// Does not cover: what a kernel does (kernels.cuh) and checks of arguments (ops_common.h).
#if !defined(LEAML_EMULATED)
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "kernels.cuh"
#include "ops_common.h"

#define LEAML_LIBRARY leaml
#define LEAML_KEY CUDA

namespace leaml {

constexpr bool kOnDevice = true;

// The device of a call's first tensor, current for the time of the call, and its current stream.
struct Device {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  explicit Device(const Tensor& first) : index(index_of(first)), guard(index) {
    void* raw = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &raw));
    stream = static_cast<cudaStream_t>(raw);
  }
  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) const {
    return torch::stable::empty(size, dtype, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CUDA, index));
  }
  static int32_t index_of(const Tensor& first) {
    STD_TORCH_CHECK(first.is_cuda(), "the first weight: wanted a tensor on the CUDA device of the others");
    return first.get_device_index();
  }
};

template <class Kernel, class... Args>
void launch(const Device& device, unsigned blocks, Kernel kernel, const Args&... args) {
  kernel<<<blocks, cuda::kThreads, 0, device.stream>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace leaml
#endif

#include <algorithm>
#include <memory>
#include <numeric>

namespace leaml {
namespace {

using cuda::kThreads;
using cuda::kWarps;

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "too many rows for one launch: wanted at most 2^31 blocks, got ", blocks);
  return unsigned(blocks);
}

bool aligned(const Matrix& m) { return cuda::rows_aligned(m.data, m.row_stride, m.col_stride, bytes(m.dtype)); }

bool aligned(const void* p, int64_t row_bytes) {
  return p == nullptr || cuda::rows_aligned(p, row_bytes, 1, 1);
}

cuda::View view_of(const Matrix& m) {
  STD_TORCH_CHECK(m.col_stride >= 0 && m.col_stride <= cuda::kMaxColStride, "wanted a stride between neighbours of at most ",
                  cuda::kMaxColStride, " elements, got ", m.col_stride);
  return {m.data, m.row_stride, int32_t(m.col_stride)};
}

// Calls f<W, G>() for the dtypes of a weight and its gradient.
template <class F>
void dispatch(Dtype w, Dtype g, const F& f) {
  if (w == Dtype::f32) return f(float{}, float{});
  if (w == Dtype::bf16) return g == Dtype::f32 ? f(bf16{}, float{}) : f(bf16{}, bf16{});
  return g == Dtype::f32 ? f(fp16{}, float{}) : f(fp16{}, fp16{});
}

constexpr std::pair<Dtype, Dtype> kPairs[] = {{Dtype::f32, Dtype::f32},
                                              {Dtype::bf16, Dtype::bf16},
                                              {Dtype::bf16, Dtype::f32},
                                              {Dtype::f16, Dtype::f16},
                                              {Dtype::f16, Dtype::f32}};

// --- relevance -----------------------------------------------------------------------------------------------------

// The sums of all parts, one allocation.
struct Workspace {
  Tensor memory;
  std::vector<Sums*> sums;
  Workspace(const Device& device, const std::vector<int64_t>& neurons) {
    int64_t total = 0;
    for (int64_t n : neurons) total += n;
    memory = device.empty({std::max<int64_t>(1, total * int64_t(sizeof(Sums)))}, ScalarType::Byte);
    Sums* p = static_cast<Sums*>(memory.data_ptr());
    for (int64_t n : neurons) {
      sums.push_back(p);
      p += n;
    }
  }
};

void launch_relevance(const Device& device, const std::vector<Part>& parts, const Workspace& work) {
  auto args = std::make_unique<cuda::RelevanceArgs>();
  for (const auto& [w, g] : kPairs)
    for (int dim : {0, 1}) {
      auto flush = [&] {
        if (args->total > 0)
          dispatch(w, g, [&](auto wt, auto gt) {
            using W = decltype(wt);
            using G = decltype(gt);
            if (dim == 0)
              launch(device, blocks_for(args->total, kWarps), cuda::relevance_rows<W, G>, *args);
            else
              launch(device, blocks_for(args->total, 1), cuda::relevance_columns<W, G>, *args);
          });
        args->total = 0;
        args->count = 0;
      };
      args->total = 0;
      args->count = 0;
      for (size_t i = 0; i < parts.size(); ++i) {
        const Part& p = parts[i];
        if (p.dim != dim || p.w.dtype != w || p.g.dtype != g || p.neurons() == 0) continue;
        if (args->count == cuda::kMaxParts) flush();
        args->parts[args->count++] = {view_of(p.w), view_of(p.g), p.width(),    work.sums[i],
                                      args->total,  p.neurons(),  aligned(p.w) && aligned(p.g)};
        args->total += dim == 0 ? p.neurons() : (p.neurons() + kBlock - 1) / kBlock;
      }
      flush();
    }
}

// The parts of each slot.
std::vector<std::vector<size_t>> members_of(const std::vector<int>& slots, size_t count) {
  std::vector<std::vector<size_t>> members(count);
  for (size_t i = 0; i < slots.size(); ++i) members[size_t(slots[i])].push_back(i);
  return members;
}

void check_members(const std::vector<int>& slots, size_t count) {
  for (const auto& some : members_of(slots, count))
    STD_TORCH_CHECK(some.size() <= size_t(cuda::kMaxSlotParts), "slots: wanted at most ", cuda::kMaxSlotParts,
                    " weights in one slot, got ", some.size());
}

Tensor finish(const Device& device, const std::vector<int>& slots, const Workspace& work, const std::vector<Output>& out,
              const std::vector<int64_t>& criteria, const float* scale, const float* found_inf) {
  Tensor result = device.empty({}, ScalarType::Float);
  const std::vector<std::vector<size_t>> members = members_of(slots, out.size());
  int64_t most = 0;
  for (const Output& o : out) most += o.neurons / kThreads + 1;
  Tensor partials = device.empty({8 * std::max<int64_t>(1, most)}, ScalarType::Byte);
  int64_t used = 0;
  auto args = std::make_unique<cuda::FinishArgs>();
  args->scale = scale;
  args->found_inf = found_inf;
  args->criteria_count = int(criteria.size());
  std::copy(criteria.begin(), criteria.end(), args->criteria);
  int part_count = 0;
  args->total = args->count = 0;
  auto flush = [&] {
    if (args->total == 0) return;
    args->partials = static_cast<double*>(partials.data_ptr()) + used;
    const unsigned blocks = blocks_for(args->total, kThreads);
    launch(device, blocks, cuda::finish_relevance, *args);
    used += blocks;
    args->total = args->count = 0;
    part_count = 0;
  };
  for (size_t j = 0; j < out.size(); ++j) {
    if (members[j].empty() || out[j].neurons == 0) continue;
    if (args->count == cuda::kMaxSlots || part_count + int(members[j].size()) > cuda::kMaxSlotParts) flush();
    args->slots[args->count++] = {out[j].data, out[j].criterion_stride, out[j].neuron_stride,    out[j].neurons,
                                  args->total, part_count,              int32_t(members[j].size())};
    args->total += out[j].neurons;
    for (size_t p : members[j]) args->parts[part_count++] = work.sums[p];
  }
  flush();
  launch(device, 1, cuda::sum_partials, static_cast<const double*>(partials.data_ptr()), used,
         static_cast<float*>(result.data_ptr()));
  return result;
}

Tensor neuron_relevance_cuda(Tensors weights, Tensors grads, Tensors out, std::vector<int64_t> criteria,
                             std::vector<int64_t> dims, std::vector<int64_t> slots, std::optional<Tensor> grad_scale,
                             std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(!weights.empty(), "weights: wanted at least one tensor, got none");
  const Device device(weights[0]);
  const std::vector<Output> outputs = outputs_of(out, criteria, kOnDevice, device.index);
  const std::vector<Part> parts = parts_of(weights, grads, dims, slots, outputs, kOnDevice, device.index);
  std::vector<int64_t> neurons;
  std::vector<int> own;
  for (const Part& p : parts) {
    neurons.push_back(p.neurons());
    own.push_back(p.slot);
  }
  check_members(own, outputs.size());
  const float* scale = scalar_of(grad_scale, "grad_scale", kOnDevice, device.index);
  const float* skip = scalar_of(found_inf, "found_inf", kOnDevice, device.index);
  const Workspace work(device, neurons);
  launch_relevance(device, parts, work);
  return finish(device, own, work, outputs, criteria, scale, skip);
}

// --- sparse AdamW and the fusion -------------------------------------------------------------------------------------

struct Scalars {
  const float *lr, *clip, *scale, *found_inf;
};

// Whether a weight's neurons are columns of what lies in memory.
bool of_columns(const Update& u) { return u.w.row_stride < u.w.col_stride && u.w.rows > 1; }

enum class Pass { rows, columns, fusion };

// The step of `updates` that `wanted` tells. `packed`: 8-bit states. Not seen by a tensor's scales, of which a row
// without elements has none.
template <class F>
void launch_updates(const Device& device, const std::vector<Update>& updates, Pass pass, bool packed, const Hyper& hyper,
                    const Scalars& scalars, const Workspace* work, const F& wanted) {
  auto args = std::make_unique<cuda::UpdateArgs>();
  args->hyper = hyper;
  args->lr = scalars.lr;
  args->clip = scalars.clip;
  args->scale = scalars.scale;
  args->found_inf = scalars.found_inf;
  // the longest rows first: started last, a few of them would run alone at the end
  std::vector<size_t> order(updates.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return updates[a].width > updates[b].width; });
  for (const auto& [w, g] : kPairs) {
    auto flush = [&] {
      if (args->count > 0)
        dispatch(w, g, [&](auto wt, auto gt) {
          using W = decltype(wt);
          using G = decltype(gt);
          const auto start = [&](int64_t per_block, auto on_floats, auto on_codes) {
            if (args->total > 0)
              launch(device, blocks_for(args->total, per_block), packed ? on_codes : on_floats, *args);
          };
          if (pass == Pass::fusion) {
            start(kWarps, cuda::relevance_sparse_adamw<W, G, false>, cuda::relevance_sparse_adamw<W, G, true>);
          } else if (pass == Pass::rows) {
            start(kWarps, cuda::sparse_adamw<W, G, false>, cuda::sparse_adamw<W, G, true>);
          } else {
            start(1, cuda::sparse_adamw_columns<W, G, false>, cuda::sparse_adamw_columns<W, G, true>);
            launch(device, unsigned(args->count), cuda::count_steps, *args);
          }
        });
      args->total = 0;
      args->count = 0;
    };
    args->total = 0;
    args->count = 0;
    for (size_t i : order) {
      const Update& u = updates[i];
      const int64_t rows = pass == Pass::fusion ? u.w.rows : u.k;
      if (u.w.dtype != w || u.g.dtype != g || rows == 0 || !wanted(u)) continue;
      if (args->count == cuda::kMaxUpdates) flush();
      const int64_t state_bytes = u.width * (packed ? 1 : 4);
      cuda::UpdateItem item{};
      item.w = view_of(u.w);
      item.g = view_of(u.g);
      item.rows = u.rows;
      item.m = u.m;
      item.v = u.v;
      item.m_scale = u.m_scale;
      item.v_scale = u.v_scale;
      item.master = u.master;
      item.step = u.step;
      item.sums = pass == Pass::fusion ? work->sums[i] : nullptr;
      item.width = u.width;
      item.limit = pass == Pass::fusion ? u.k : u.w.rows;
      item.start = args->total;
      item.index = int32_t(i);
      item.compact = u.compact;
      item.vector = aligned(u.m, state_bytes) && aligned(u.v, state_bytes) && aligned(u.master, u.width * 4);
      if (pass == Pass::columns) {
        const bool staged = u.g.col_stride != 1;  // into shared memory, like the weight, which is aligned there
        item.k = int32_t(u.k);
        item.tile = int16_t(cuda::tile_of(bytes(w), bytes(g), staged));
        item.vector = item.vector && (staged || aligned(u.g));
        args->total += (u.k + item.tile - 1) / item.tile * ((u.width + kBlock - 1) / kBlock);
      } else {
        item.vector = item.vector && aligned(u.w) && aligned(u.g);
        args->total += rows;
      }
      args->items[args->count++] = item;
    }
    flush();
  }
}

// Whatever is refused is refused before the first launch.
void check_updates(const std::vector<Update>& updates) {
  for (const Update& u : updates) {
    view_of(u.w), view_of(u.g);
    STD_TORCH_CHECK(!of_columns(u) || u.k < 0x7fffffff, "rows: wanted less than 2^31 of a transposed weight, got ", u.k);
  }
}

// The step of all tensors: those of rows in one launch, those of columns in another, for each pair of dtypes.
void launch_steps(const Device& device, const std::vector<Update>& updates, bool packed, const Hyper& hyper,
                  const Scalars& scalars) {
  launch_updates(device, updates, Pass::rows, packed, hyper, scalars, nullptr, [](auto& u) { return !of_columns(u); });
  launch_updates(device, updates, Pass::columns, packed, hyper, scalars, nullptr, of_columns);
}

// The fusion of all tensors. A weight and gradient of columns are read as the two parts by themselves read them, all of
// both for the relevance and then the selected columns for the step: joined, they would be read 2 or 4 bytes at a time.
void launch_fusion(const Device& device, const std::vector<Update>& updates, bool packed, const Hyper& hyper,
                   const Scalars& scalars, const Workspace& work) {
  const auto apart = [](const Update& u) { return of_columns(u) && u.g.row_stride < u.g.col_stride; };
  std::vector<Part> parts(updates.size());  // those that stay as they are have no neurons
  for (size_t i = 0; i < updates.size(); ++i)
    if (apart(updates[i])) parts[i] = {updates[i].w.transposed(), updates[i].g.transposed(), 1, int(i)};
  launch_relevance(device, parts, work);
  launch_updates(device, updates, Pass::columns, packed, hyper, scalars, nullptr, apart);
  launch_updates(device, updates, Pass::fusion, packed, hyper, scalars, &work, [&](auto& u) { return !apart(u); });
}

void sparse_adamw_cuda(Tensors params, Tensors rows, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors steps,
                       Tensors exp_avg_scale, Tensors exp_avg_sq_scale, Tensors masters, std::optional<Tensor> lr_tensor,
                       std::optional<Tensor> clip_coef, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                       double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                       bool stochastic_rounding, int64_t seed) {
  STD_TORCH_CHECK(!params.empty(), "params: wanted at least one tensor, got none");
  const Device device(params[0]);
  const std::vector<Update> updates = updates_of(params, rows, grads, exp_avg, exp_avg_sq, steps, exp_avg_scale,
                                                 exp_avg_sq_scale, masters, false, kOnDevice, device.index);
  const Hyper hyper = hyper_of(lr, beta1, beta2, eps, weight_decay, maximize, stochastic_rounding, seed);
  const Scalars scalars{scalar_of(lr_tensor, "lr", kOnDevice, device.index),
                        scalar_of(clip_coef, "clip_coef", kOnDevice, device.index),
                        scalar_of(grad_scale, "grad_scale", kOnDevice, device.index),
                        scalar_of(found_inf, "found_inf", kOnDevice, device.index)};
  check_updates(updates);
  launch_steps(device, updates, !exp_avg_scale.empty(), hyper, scalars);
}

Tensor relevance_sparse_adamw_cuda(Tensors params, Tensors rows, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq,
                                   Tensors steps, Tensors exp_avg_scale, Tensors exp_avg_sq_scale, Tensors masters,
                                   Tensors out, std::vector<int64_t> criteria, std::vector<int64_t> slots,
                                   std::optional<Tensor> lr_tensor, std::optional<Tensor> clip_coef,
                                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, double lr,
                                   double beta1, double beta2, double eps, double weight_decay, bool maximize,
                                   bool stochastic_rounding, int64_t seed) {
  STD_TORCH_CHECK(!params.empty(), "params: wanted at least one tensor, got none");
  const Device device(params[0]);
  const std::vector<Output> outputs = outputs_of(out, criteria, kOnDevice, device.index);
  const std::vector<Update> updates = updates_of(params, rows, grads, exp_avg, exp_avg_sq, steps, exp_avg_scale,
                                                 exp_avg_sq_scale, masters, true, kOnDevice, device.index);
  check_updates(updates);
  check_slots(slots, updates, outputs);
  std::vector<int64_t> neurons;
  for (const Update& u : updates) neurons.push_back(u.w.rows);
  const std::vector<int> own(slots.begin(), slots.end());
  check_members(own, outputs.size());
  const Workspace work(device, neurons);
  const Hyper hyper = hyper_of(lr, beta1, beta2, eps, weight_decay, maximize, stochastic_rounding, seed);
  const float* scale = scalar_of(grad_scale, "grad_scale", kOnDevice, device.index);
  const float* skip = scalar_of(found_inf, "found_inf", kOnDevice, device.index);
  const Scalars scalars{scalar_of(lr_tensor, "lr", kOnDevice, device.index),
                        scalar_of(clip_coef, "clip_coef", kOnDevice, device.index), scale, skip};
  launch_fusion(device, updates, !exp_avg_scale.empty(), hyper, scalars, work);
  return finish(device, own, work, outputs, criteria, scale, skip);
}

}  // namespace
}  // namespace leaml

// select_top stays with torch's device sort (leaml_plugin/ops/reference.py): a sort of a million scores takes less than
// reading the weights they belong to by two orders of magnitude.
STABLE_TORCH_LIBRARY_IMPL(LEAML_LIBRARY, LEAML_KEY, m) {
  m.impl("neuron_relevance_", TORCH_BOX(&leaml::neuron_relevance_cuda));
  m.impl("sparse_adamw_", TORCH_BOX(&leaml::sparse_adamw_cuda));
  m.impl("relevance_sparse_adamw_", TORCH_BOX(&leaml::relevance_sparse_adamw_cuda));
}
