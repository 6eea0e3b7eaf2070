// The CPU implementations of torch.ops.leaml.*: threading and row logic over the vectorised loops of cpu_kernels.cpp.
//
// Work is cut into items whose bounds depend on the shapes alone, and every sum has a fixed order, so results do not
// depend on the number of threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <tuple>

#include "cpu_kernels.h"
#include "ops_common.h"

namespace leaml {
namespace {

constexpr int64_t kItemElements = 1 << 15;  // of a work item: some tens of microseconds
constexpr int64_t kThreadElements = 1 << 17;
// Bytes of weight and gradient of an item of the fusion. They must still be in the caches when the selected rows take
// their step; smaller items switch more often between reading and stepping, and each switch breaks off the streams that
// the hardware prefetcher follows.
constexpr int64_t kFusedBytes = 2 << 20;
constexpr int64_t kStrip = 2048, kWideStrip = 16384;  // columns summed at once: at least, and at most where work abounds
constexpr int64_t kStripRows = 64;  // rows summed before the partial sums join the total

cpu::Type kernel_type(Dtype dtype) { return static_cast<cpu::Type>(static_cast<int>(dtype)); }

// torch's parallel_for lets no exception through, so work must not throw: arguments are checked before.
// Waking a thread costs microseconds, more on a busy machine: each gets at least kThreadElements. Items differ in size, a
// strip of columns from some rows by twenty times, so that a thread that is done takes the next.
template <class F>
void for_items(int64_t count, int64_t elements, const F& f) {
  const int64_t shares = std::clamp<int64_t>(elements / kThreadElements, 1, std::max<int64_t>(1, count));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, shares, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  });
}

// --- relevance -----------------------------------------------------------------------------------------------------

// The sums of one row of a part; `whole` sums a contiguous one.
Sums row_sums(const Matrix& w, const Matrix& g, int64_t row, cpu::RowRelevance whole) {
  const char* wp = w.data + row * w.row_stride * bytes(w.dtype);
  const char* gp = g.data + row * g.row_stride * bytes(g.dtype);
  if (w.col_stride == 1 && g.col_stride == 1) return whole(wp, gp, w.cols);
  cpu::Lanes lanes{};
  alignas(64) float wb[cpu::kTile], gb[cpu::kTile];
  for (int64_t c = 0; c < w.cols; c += cpu::kTile) {
    const int64_t n = std::min<int64_t>(cpu::kTile, w.cols - c);
    cpu::load(wp + c * w.col_stride * bytes(w.dtype), kernel_type(w.dtype), w.col_stride, n, wb);
    cpu::load(gp + c * g.col_stride * bytes(g.dtype), kernel_type(g.dtype), g.col_stride, n, gb);
    cpu::add_relevance(wb, gb, n, lanes);
  }
  return cpu::total(lanes);
}

// The sums of rows [begin, end) of a part, from out[begin] on.
void rows_sums(const Matrix& w, const Matrix& g, int64_t begin, int64_t end, bool absolute, Sums* out) {
  const cpu::Type wt = kernel_type(w.dtype), gt = kernel_type(g.dtype);
  const cpu::RowRelevance whole = cpu::row_relevance(wt, gt, absolute);
  const cpu::PairRelevance both = w.col_stride == 1 && g.col_stride == 1 ? cpu::pair_relevance(wt, gt, absolute) : nullptr;
  const int64_t w_next = w.row_stride * bytes(w.dtype), g_next = g.row_stride * bytes(g.dtype);
  int64_t r = begin;
  for (; both && r + 2 <= end; r += 2) both(w.data + r * w_next, g.data + r * g_next, w_next, g_next, w.cols, out + r);
  for (; r < end; ++r) out[r] = row_sums(w, g, r, whole);
}

const float* as_floats(const Matrix& m, int64_t row, int64_t column, int64_t n, float* buffer) {
  const char* p = m.data + (row * m.row_stride + column * m.col_stride) * bytes(m.dtype);
  if (m.dtype == Dtype::f32 && m.col_stride == 1) return reinterpret_cast<const float*>(p);
  cpu::load(p, kernel_type(m.dtype), m.col_stride, n, buffer);
  return buffer;
}

// Zeros from the start of a cache line on. Work must not throw, and this may: but less than a megabyte.
class Floats {
 public:
  explicit Floats(int64_t n) : lines_(size_t(n + 15) / 16) {}
  float* data() { return lines_.empty() ? nullptr : lines_[0].values; }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  std::vector<Line> lines_;
};

// Columns of a matrix, some rows at a time: partial sums keep the error that grows with the number of rows small.
void column_sums(const Matrix& w, const Matrix& g, int64_t column, int64_t n, bool absolute, Sums* out) {
  const int64_t stride = (n + 15) / 16 * 16, count = 3 * stride;
  Floats partials(count), sums(count), w_row(n), g_row(n);
  float *partial = partials.data(), *sum = sums.data();
  const cpu::ColumnSums into{partial, partial + stride, partial + 2 * stride};
  const bool whole = w.col_stride == 1 && g.col_stride == 1;
  const cpu::AddColumns add = whole ? cpu::add_columns(kernel_type(w.dtype), kernel_type(g.dtype), absolute)
                                    : cpu::add_columns(cpu::Type::f32, cpu::Type::f32, absolute);
  for (int64_t r0 = 0; r0 < w.rows; r0 += kStripRows) {
    std::fill(partial, partial + count, 0.0f);
    const int64_t rows = std::min(w.rows - r0, kStripRows);
    if (whole) {
      add(w.data + (r0 * w.row_stride + column) * bytes(w.dtype), g.data + (r0 * g.row_stride + column) * bytes(g.dtype),
          w.row_stride, g.row_stride, rows, n, &into);
    } else {
      for (int64_t r = r0; r < r0 + rows; ++r)
        add(as_floats(w, r, column, n, w_row.data()), as_floats(g, r, column, n, g_row.data()), 0, 0, 1, n, &into);
    }
    for (int64_t j = 0; j < count; ++j) sum[j] += partial[j];
  }
  for (int64_t j = 0; j < n; ++j) out[j] = {sum[j], sum[stride + j], sum[2 * stride + j]};
}

struct Item {
  size_t part;
  int64_t begin, end;
};

// The neurons of each part in pieces: strips of columns, and as many rows at a time as `rows` says of a part.
template <class F>
std::vector<Item> pieces_of(const std::vector<Part>& parts, const F& rows) {
  std::vector<Item> items;
  int64_t columns = 0;
  for (const Part& p : parts) columns += p.dim == 1 ? p.neurons() : 0;
  // columns: fp32 streams best in whole rows; where there are few of them, threads want strips
  const int64_t strip = std::clamp(columns / 4, kStrip, kWideStrip);
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t neurons = parts[i].neurons();
    const int64_t chunk = parts[i].dim == 0 ? rows(parts[i]) : parts[i].w.dtype == Dtype::f32 ? strip : kStrip;
    for (int64_t b = 0; b < neurons; b += chunk) items.push_back({i, b, std::min(neurons, b + chunk)});
  }
  return items;
}

int64_t elements_of(const std::vector<Part>& parts) {
  int64_t elements = 0;
  for (const Part& p : parts) elements += p.neurons() * p.width();
  return elements;
}

// Room for the sums of every neuron of each part.
std::vector<std::vector<Sums>> sums_for(const std::vector<Part>& parts) {
  std::vector<std::vector<Sums>> sums;
  for (const Part& p : parts) sums.emplace_back(size_t(p.neurons()));
  return sums;
}

void relevance_item(const Part& p, const Item& item, bool absolute, Sums* sums) {
  if (p.dim == 1) return column_sums(p.w, p.g, item.begin, item.end - item.begin, absolute, sums + item.begin);
  rows_sums(p.w, p.g, item.begin, item.end, absolute, sums);
}

bool has_absolute(const std::vector<int64_t>& criteria) {
  return std::find(criteria.begin(), criteria.end(), int64_t(kTaylorAbs)) != criteria.end();
}

// Adds the statistics of all parts to the outputs; the squared gradient norm comes back.
float finish(const std::vector<Part>& parts, const std::vector<std::vector<Sums>>& sums, const std::vector<Output>& out,
             const std::vector<int64_t>& criteria, const float* grad_scale, const float* found_inf) {
  const float inverse = grad_scale ? 1.0f / *grad_scale : 1.0f;
  double squared = 0.0;
  int64_t neurons = 0;
  for (const Output& o : out) neurons += o.neurons;
  std::vector<std::vector<size_t>> members(out.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    members[size_t(parts[i].slot)].push_back(i);
    for (const Sums& s : sums[i]) squared += s.gg;
  }
  if (!found_inf || *found_inf == 0.0f) {
    for_items(int64_t(out.size()), neurons, [&](int64_t j) {
      const std::vector<size_t>& own = members[size_t(j)];
      if (own.empty()) return;
      const Output& o = out[size_t(j)];
      for (int64_t i = 0; i < o.neurons; ++i) {
        Sums s = sums[own[0]][size_t(i)];
        for (size_t p = 1; p < own.size(); ++p) {
          const Sums& t = sums[own[p]][size_t(i)];
          s = {s.wg + t.wg, s.abs_wg + t.abs_wg, s.gg + t.gg};
        }
        for (size_t c = 0; c < criteria.size(); ++c)
          o.data[int64_t(c) * o.criterion_stride + i * o.neuron_stride] += criterion_value(int(criteria[c]), s, inverse);
      }
    });
  }
  return float(squared * double(inverse) * double(inverse));
}

Tensor scalar_tensor(float value) {
  Tensor result = torch::stable::empty({}, ScalarType::Float);
  *static_cast<float*>(result.data_ptr()) = value;
  return result;
}

Tensor neuron_relevance_cpu(Tensors weights, Tensors grads, Tensors out, std::vector<int64_t> criteria,
                            std::vector<int64_t> dims, std::vector<int64_t> slots, std::optional<Tensor> grad_scale,
                            std::optional<Tensor> found_inf) {
  const std::vector<Output> outputs = outputs_of(out, criteria, false, -1);
  const std::vector<Part> parts = parts_of(weights, grads, dims, slots, outputs, false, -1);
  const float* scale = scalar_of(grad_scale, "grad_scale", false, -1);
  const float* skip = scalar_of(found_inf, "found_inf", false, -1);
  std::vector<std::vector<Sums>> sums = sums_for(parts);
  const bool absolute = has_absolute(criteria);
  const std::vector<Item> items = pieces_of(
      parts, [](const Part& p) { return std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, p.width())); });
  for_items(int64_t(items.size()), elements_of(parts), [&](int64_t index) {
    const Item& item = items[size_t(index)];
    relevance_item(parts[item.part], item, absolute, sums[item.part].data());
  });
  return scalar_tensor(finish(parts, sums, outputs, criteria, scale, skip));
}

// --- sparse AdamW --------------------------------------------------------------------------------------------------

struct Call {
  Hyper hyper;
  double lr;
  float unscale, factor;
  bool skip;
};

Call call_of(const Hyper& hyper, const std::optional<Tensor>& lr, const std::optional<Tensor>& clip_coef,
             const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  const float* rate = scalar_of(lr, "lr", false, -1);
  const float* clip = scalar_of(clip_coef, "clip_coef", false, -1);
  const float* scale = scalar_of(grad_scale, "grad_scale", false, -1);
  const float* skip = scalar_of(found_inf, "found_inf", false, -1);
  return {hyper, rate ? double(*rate) : hyper.lr, scale ? 1.0f / *scale : 1.0f, hyper.sign * (clip ? *clip : 1.0f),
          skip && *skip != 0.0f};
}

void check_rows(const std::vector<Update>& updates) {
  for (size_t i = 0; i < updates.size(); ++i) {
    const Update& u = updates[i];
    int64_t last = -1;
    for (int64_t j = 0; j < u.k; last = u.rows[j++])
      STD_TORCH_CHECK(u.rows[j] > last && u.rows[j] < u.w.rows, "rows ", i,
                      ": wanted strictly ascending indices from 0 to ", u.w.rows - 1, ", got ", u.rows[j], " at position ",
                      j);
  }
}

// Rows of one age share their coefficients, whose exponentials cost as much as some hundred elements.
struct Coefficients {
  float step = -1.0f;
  RowCoefficients values{};
};

bool draws(const Update& u, const Call& call) {
  return u.m_scale != nullptr || (call.hyper.stochastic && !u.master);
}

// A step of n <= kTile elements of the j-th selected row, from `column` on: w and g are contiguous fp32, the states are
// found in u.
void step_tile(const Update& u, int64_t j, int64_t column, int64_t n, float* w, const float* g, const Call& call,
               const RowCoefficients& c, uint32_t key, const cpu::Ahead& ahead) {
  const int64_t at = j * u.width + column;
  if (!u.m_scale) {
    cpu::step(w, g, static_cast<float*>(u.m) + at, static_cast<float*>(u.v) + at, n, call.unscale, call.factor, call.hyper,
              c, ahead);
    return;
  }
  alignas(64) float m[cpu::kTile], v[cpu::kTile];
  const int64_t block = j * ((u.width + kBlock - 1) / kBlock) + column / kBlock;
  uint8_t *m_code = static_cast<uint8_t*>(u.m) + at, *v_code = static_cast<uint8_t*>(u.v) + at;
  cpu::decode(m_code, u.m_scale + block, n, true, m);
  cpu::decode(v_code, u.v_scale + block, n, false, v);
  cpu::step(w, g, m, v, n, call.unscale, call.factor, call.hyper, c, ahead);
  cpu::encode(m, n, true, key, column, m_code, u.m_scale + block);
  cpu::encode(v, n, false, key, column, v_code, u.v_scale + block);
}

// n weights back to where they are kept, `stride` elements apart.
void store_weights(const Update& u, const Call& call, const float* w, int64_t column, int64_t n, char* target,
                   int64_t stride, uint32_t key) {
  if (call.hyper.stochastic && !u.master)
    cpu::store_stochastic(w, n, target, kernel_type(u.w.dtype), stride, key, column);
  else
    cpu::store(w, n, target, kernel_type(u.w.dtype), stride);
}

// The j-th selected row of u, in one go or a tile at a time through L1. Row j + 1 is prefetched where it is below `end`.
void step_row(const Update& u, size_t tensor, int64_t j, int64_t end, const Call& call, Coefficients& known) {
  const int64_t row = u.rows[j], source = u.compact ? j : row;
  const float t = u.step[j] + 1.0f;
  if (t != known.step) known = {t, row_coefficients(call.hyper, call.lr, t)};
  const RowCoefficients c = known.values;
  const bool eight_bit = u.m_scale != nullptr, stochastic = call.hyper.stochastic && !u.master;
  const uint32_t key = draws(u, call) ? row_key(call.hyper.seed, int64_t(tensor), row, t) : 0u;
  const int64_t wb = bytes(u.w.dtype), gb = bytes(u.g.dtype);
  char* w_row = u.w.data + row * u.w.row_stride * wb;
  const char* g_row = u.g.data + source * u.g.row_stride * gb;
  const bool direct = u.w.dtype == Dtype::f32 && u.w.col_stride == 1 && !u.master;
  const bool fits = u.w.col_stride == 1 && u.g.col_stride == 1;
  const cpu::Keep keep = u.master ? cpu::Keep::master : stochastic ? cpu::Keep::stochastic : cpu::Keep::nearest;
  const cpu::StepRow whole = fits && !eight_bit && u.width < INT32_MAX - cpu::kTile
                                 ? cpu::step_row(kernel_type(u.w.dtype), kernel_type(u.g.dtype), keep)
                                 : nullptr;
  // the next selected row is far away in memory: no hardware prefetcher finds it
  const char* next_w = nullptr;
  const char* next_g = nullptr;
  if (fits && j + 1 < end) {
    next_w = u.w.data + u.rows[j + 1] * u.w.row_stride * wb;
    next_g = u.g.data + (u.compact ? j + 1 : u.rows[j + 1]) * u.g.row_stride * gb;
  }
  if (whole) {
    const cpu::Ahead next{next_w, next_g};
    const int64_t at = j * u.width;
    whole(w_row, g_row, static_cast<float*>(u.m) + at, static_cast<float*>(u.v) + at, u.master ? u.master + at : nullptr,
          int32_t(u.width), call.unscale, call.factor, &call.hyper, &c, &next, key);
    u.step[j] = t;
    return;
  }
  alignas(64) float w_buffer[cpu::kTile], g_buffer[cpu::kTile];
  for (int64_t column = 0; column < u.width; column += cpu::kTile) {
    const int64_t n = std::min<int64_t>(cpu::kTile, u.width - column), at = j * u.width + column;
    const int64_t coming = column + cpu::kTile;
    cpu::Ahead ahead;
    if (fits && coming < u.width)
      ahead = {w_row + coming * wb, g_row + coming * gb, wb, gb};
    else if (next_w)
      ahead = {next_w, next_g, wb, gb};
    char* wp = w_row + column * u.w.col_stride * wb;
    float* w = w_buffer;
    if (u.master)
      w = u.master + at;
    else if (direct)
      w = reinterpret_cast<float*>(wp);
    else
      cpu::load(wp, kernel_type(u.w.dtype), u.w.col_stride, n, w_buffer);
    const char* gp = g_row + column * u.g.col_stride * gb;
    const float* g = reinterpret_cast<const float*>(gp);
    if (u.g.dtype != Dtype::f32 || u.g.col_stride != 1) {
      cpu::load(gp, kernel_type(u.g.dtype), u.g.col_stride, n, g_buffer);
      g = g_buffer;
    }
    step_tile(u, j, column, n, w, g, call, c, key, ahead);
    if (!direct) store_weights(u, call, w, column, n, wp, u.w.col_stride, key);
  }
  u.step[j] = t;
}

// --- selected columns of what lies in memory: a transposed weight -----------------------------------------------------

constexpr int64_t kAcross = kBlock;     // elements of a selected column at once; blocks of 8-bit states stay whole
constexpr int64_t kAcrossTogether = 32;  // columns at once: neighbours often share their cache lines

bool lies_across(const Update& u) {
  const bool gradient = u.g.row_stride == 1 || (u.compact && u.g.col_stride == 1);
  return u.w.row_stride == 1 && u.w.col_stride != 1 && u.k > 1 && gradient;
}

// Elements [begin, begin + n) of the columns `at` to fp32, or back: T is their type in memory. Memory is walked row by row.
template <class T, class F>
void for_across(const Matrix& m, const int64_t* at, int64_t count, int64_t begin, int64_t n, const F& f) {
  T* line = reinterpret_cast<T*>(m.data) + begin * m.col_stride;
  for (int64_t i = 0; i < n; ++i, line += m.col_stride) {
    for (int64_t j = 0; j < count; ++j) __builtin_prefetch(line + 4 * m.col_stride + at[j]);
    for (int64_t j = 0; j < count; ++j) f(j, i, line[at[j]]);
  }
}

template <class F>
void for_across(const Matrix& m, const int64_t* at, int64_t count, int64_t begin, int64_t n, const F& f) {
  if (m.dtype == Dtype::f32) return for_across<float>(m, at, count, begin, n, f);
  if (m.dtype == Dtype::bf16) return for_across<bf16>(m, at, count, begin, n, f);
  for_across<fp16>(m, at, count, begin, n, f);
}

// Elements [begin, begin + n) of every selected row of u; the rows' steps are counted by whoever calls.
void step_across(const Update& u, size_t tensor, int64_t begin, int64_t n, const Call& call) {
  constexpr int64_t stride = kAcross + 16;  // lines that lie a power of two apart would crowd the cache
  alignas(64) float w[kAcrossTogether][stride], g[kAcrossTogether][stride];
  alignas(64) uint32_t stored[kAcrossTogether][stride];
  Coefficients known;
  for (int64_t first = 0; first < u.k; first += kAcrossTogether) {
    const int64_t count = std::min(kAcrossTogether, u.k - first);
    const int64_t* rows = u.rows + first;
    if (!u.master) for_across(u.w, rows, count, begin, n, [&](int64_t j, int64_t i, auto& x) { w[j][i] = to_float(x); });
    if (!u.compact) for_across(u.g, rows, count, begin, n, [&](int64_t j, int64_t i, auto& x) { g[j][i] = to_float(x); });
    for (int64_t j = 0; j < count; ++j) {
      const float t = u.step[first + j] + 1.0f;
      if (t != known.step) known = {t, row_coefficients(call.hyper, call.lr, t)};
      const uint32_t key = draws(u, call) ? row_key(call.hyper.seed, int64_t(tensor), rows[j], t) : 0u;
      if (u.compact)
        cpu::load(u.g.data + ((first + j) * u.g.row_stride + begin * u.g.col_stride) * bytes(u.g.dtype),
                  kernel_type(u.g.dtype), u.g.col_stride, n, g[j]);
      float* own = u.master ? u.master + (first + j) * u.width + begin : w[j];
      step_tile(u, first + j, begin, n, own, g[j], call, known.values, key, {});
      store_weights(u, call, own, begin, n, reinterpret_cast<char*>(stored[j]), 1, key);
    }
    for_across(u.w, rows, count, begin, n, [&](int64_t j, int64_t i, auto& x) {
      memcpy(&x, reinterpret_cast<const char*>(stored[j]) + i * int64_t(sizeof(x)), sizeof(x));
    });
  }
}

// The step of those updates that `wanted` tells by their index, in pieces: some selected rows or, where these lie across
// memory, some of their elements.
template <class F>
void step_all(const std::vector<Update>& updates, const Call& call, const F& wanted) {
  std::vector<Item> items;
  int64_t elements = 0;
  for (size_t i = 0; i < updates.size(); ++i) {
    if (!wanted(i)) continue;
    const Update& u = updates[i];
    const bool across = lies_across(u);
    const int64_t total = across ? u.width : u.k;
    const int64_t chunk = across ? kAcross : std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, u.width));
    elements += u.k * u.width;
    for (int64_t b = 0; b < total; b += chunk) items.push_back({i, b, std::min(total, b + chunk)});
  }
  for_items(int64_t(items.size()), elements, [&](int64_t index) {
    const Item& item = items[size_t(index)];
    const Update& u = updates[item.part];
    if (lies_across(u)) return step_across(u, item.part, item.begin, item.end - item.begin, call);
    Coefficients known;
    for (int64_t j = item.begin; j < item.end; ++j) step_row(u, item.part, j, u.k, call, known);
  });
  for (size_t i = 0; i < updates.size(); ++i) {
    const Update& u = updates[i];
    for (int64_t j = 0; wanted(i) && lies_across(u) && j < u.k; ++j) u.step[j] += 1.0f;
  }
}

void sparse_adamw_cpu(Tensors params, Tensors rows, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors steps,
                      Tensors exp_avg_scale, Tensors exp_avg_sq_scale, Tensors masters, std::optional<Tensor> lr_tensor,
                      std::optional<Tensor> clip_coef, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                      double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                      bool stochastic_rounding, int64_t seed) {
  const std::vector<Update> updates = updates_of(params, rows, grads, exp_avg, exp_avg_sq, steps, exp_avg_scale,
                                                 exp_avg_sq_scale, masters, false, false, -1);
  check_rows(updates);
  const Call call = call_of(hyper_of(lr, beta1, beta2, eps, weight_decay, maximize, stochastic_rounding, seed), lr_tensor,
                            clip_coef, grad_scale, found_inf);
  if (!call.skip) step_all(updates, call, [](size_t) { return true; });
}

// --- the fusion ----------------------------------------------------------------------------------------------------

Tensor relevance_sparse_adamw_cpu(Tensors params, Tensors rows, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq,
                                  Tensors steps, Tensors exp_avg_scale, Tensors exp_avg_sq_scale, Tensors masters,
                                  Tensors out, std::vector<int64_t> criteria, std::vector<int64_t> slots,
                                  std::optional<Tensor> lr_tensor, std::optional<Tensor> clip_coef,
                                  std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, double lr,
                                  double beta1, double beta2, double eps, double weight_decay, bool maximize,
                                  bool stochastic_rounding, int64_t seed) {
  const std::vector<Output> outputs = outputs_of(out, criteria, false, -1);
  const std::vector<Update> updates = updates_of(params, rows, grads, exp_avg, exp_avg_sq, steps, exp_avg_scale,
                                                 exp_avg_sq_scale, masters, true, false, -1);
  check_rows(updates);
  const Call call = call_of(hyper_of(lr, beta1, beta2, eps, weight_decay, maximize, stochastic_rounding, seed), lr_tensor,
                            clip_coef, grad_scale, found_inf);
  check_slots(slots, updates, outputs);
  std::vector<Part> parts;
  for (size_t i = 0; i < updates.size(); ++i)
    parts.push_back(Part{updates[i].w, updates[i].g, 0, int(slots[i])}.as_it_lies());
  std::vector<std::vector<Sums>> sums = sums_for(parts);
  const bool absolute = has_absolute(criteria);
  const std::vector<Item> items = pieces_of(parts, [](const Part& p) {
    return std::max<int64_t>(1, kFusedBytes / std::max<int64_t>(1, p.width() * (bytes(p.w.dtype) + bytes(p.g.dtype))));
  });
  for_items(int64_t(items.size()), elements_of(parts), [&](int64_t index) {
    const Item& item = items[size_t(index)];
    const Update& u = updates[item.part];
    // all rows of the item in one stream, then the selected ones, which are still in the cache
    relevance_item(parts[item.part], item, absolute, sums[item.part].data());
    if (call.skip || parts[item.part].dim == 1) return;
    Coefficients known;
    const int64_t end = std::lower_bound(u.rows, u.rows + u.k, item.end) - u.rows;
    for (int64_t j = std::lower_bound(u.rows, u.rows + end, item.begin) - u.rows; j < end; ++j)
      step_row(u, item.part, j, end, call, known);
  });
  // columns are read line by line, all of them, and then the lines that the selected ones lie in once more
  if (!call.skip) step_all(updates, call, [&](size_t i) { return parts[i].dim == 1; });
  return scalar_tensor(finish(parts, sums, outputs, criteria, scalar_of(grad_scale, "grad_scale", false, -1),
                              scalar_of(found_inf, "found_inf", false, -1)));
}

// --- selection -----------------------------------------------------------------------------------------------------

// How often each of 2^11 values of (key >> shift) occurs. Scores have few exponents, so neighbours often count in the same
// bin, and an increment has to wait for the one before: four counts take turns.
struct Histogram {
  static constexpr uint32_t kBins = 1u << 11;
  std::vector<uint32_t> counts = std::vector<uint32_t>(4 * kBins);

  void add(const uint32_t* keys, int64_t n, int shift) {
    uint32_t* c = counts.data();
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (uint32_t q = 0; q < 4; ++q) ++c[q * kBins + ((keys[i + q] >> shift) & (kBins - 1))];
    for (; i < n; ++i) ++c[(keys[i] >> shift) & (kBins - 1)];
  }
  // The bin of the left-th largest key, and how many of that bin come up to it: `left` is lowered to that.
  uint32_t find(int64_t& left) {
    for (uint32_t bin = kBins; bin-- > 0;) {
      const int64_t here = int64_t(counts[bin]) + counts[kBins + bin] + counts[2 * kBins + bin] + counts[3 * kBins + bin];
      if (here >= left) return bin;
      left -= here;
    }
    return 0;  // never: there are as many keys as are asked for
  }
};

struct Keys {
  const uint32_t* data;
  int64_t n;
};

// The left-th largest of some keys; of those equal to it, as many are to be taken as `left` says afterwards. Three digits of
// 11, 11 and 10 bits, from the top: what shares the digits so far is gathered for the next.
uint32_t nth_largest(const std::vector<Keys>& keys, int64_t& left) {
  Histogram first;
  for (const Keys& k : keys) first.add(k.data, k.n, 21);
  uint32_t prefix = first.find(left);
  std::vector<uint32_t> rest;
  for (const Keys& k : keys)
    for (int64_t i = 0; i < k.n; ++i)
      if (k.data[i] >> 21 == prefix) rest.push_back(k.data[i]);
  Histogram second;
  second.add(rest.data(), int64_t(rest.size()), 10);
  prefix = (prefix << 11) | second.find(left);
  rest.erase(std::remove_if(rest.begin(), rest.end(), [&](uint32_t k) { return k >> 10 != prefix; }), rest.end());
  std::sort(rest.begin(), rest.end(), std::greater<uint32_t>());
  const uint32_t found = rest[size_t(left - 1)];
  left -= std::lower_bound(rest.begin(), rest.end(), found, std::greater<uint32_t>()) - rest.begin();
  return found;
}

Tensor select_top_cpu(Tensors scores, std::vector<int64_t> groups, std::vector<int64_t> counts) {
  check_count("groups", groups, scores);
  std::vector<int64_t> starts, sizes(counts.size(), 0);
  int64_t total = 0, wanted = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    check_device(scores[i], false, -1, "scores", i);
    STD_TORCH_CHECK(scores[i].scalar_type() == ScalarType::Float && scores[i].dim() == 1 && scores[i].is_contiguous(),
                    "scores ", i, ": wanted a contiguous float32 vector, got ", scores[i].dim(),
                    " dimensions of scalar type ", static_cast<int>(scores[i].scalar_type()));
    STD_TORCH_CHECK(groups[i] >= 0 && groups[i] < int64_t(counts.size()), "groups ", i, ": wanted 0 to ", counts.size(),
                    " exclusive, got ", groups[i]);
    const int64_t n = scores[i].numel();
    starts.push_back(total);
    sizes[size_t(groups[i])] += n;
    total += n;
  }
  for (size_t g = 0; g < counts.size(); ++g) {
    STD_TORCH_CHECK(counts[g] >= 0 && counts[g] <= sizes[g], "counts ", g, ": wanted 0 to ", sizes[g], ", got ", counts[g]);
    wanted += counts[g];
  }
  Tensor result = torch::stable::empty({wanted}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.data_ptr());

  starts.push_back(total);  // asking a tensor costs a call: not in the loops
  std::vector<uint32_t> keys(static_cast<size_t>(total));
  for_items(int64_t(scores.size()), total, [&](int64_t i) {
    const float* s = static_cast<const float*>(scores[size_t(i)].data_ptr());
    uint32_t* k = keys.data() + starts[size_t(i)];
    const int64_t n = starts[size_t(i) + 1] - starts[size_t(i)];
    for (int64_t j = 0; j < n; ++j) k[j] = order_key(s[j]);
  });
  std::vector<uint32_t> threshold(counts.size(), 0);
  std::vector<int64_t> ties(counts.begin(), counts.end());  // how many keys equal to the threshold are taken
  std::vector<std::vector<Keys>> members(counts.size());
  for (size_t i = 0; i < scores.size(); ++i)
    members[size_t(groups[i])].push_back({keys.data() + starts[i], starts[i + 1] - starts[i]});
  for_items(int64_t(counts.size()), total, [&](int64_t g) {
    if (counts[size_t(g)] > 0) threshold[size_t(g)] = nth_largest(members[size_t(g)], ties[size_t(g)]);
  });
  int64_t written = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const size_t g = size_t(groups[i]);
    if (counts[g] == 0) continue;
    const uint32_t limit = threshold[g];
    int64_t equal = ties[g];
    // written whether or not it counts: whether it does is a coin toss that no processor foresees
    for (int64_t j = starts[i]; j < starts[i + 1] && written < wanted; ++j) {
      const uint32_t k = keys[size_t(j)];
      const bool tie = k == limit && equal > 0;
      out[written] = j;
      written += k > limit || tie;
      equal -= tie;
    }
    ties[g] = equal;
  }
  return result;
}

}  // namespace
}  // namespace leaml

STABLE_TORCH_LIBRARY_IMPL(leaml, CPU, m) {
  m.impl("neuron_relevance_", TORCH_BOX(&leaml::neuron_relevance_cpu));
  m.impl("select_top", TORCH_BOX(&leaml::select_top_cpu));
  m.impl("sparse_adamw_", TORCH_BOX(&leaml::sparse_adamw_cpu));
  m.impl("relevance_sparse_adamw_", TORCH_BOX(&leaml::relevance_sparse_adamw_cpu));
}
