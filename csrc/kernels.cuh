// Device code of the CUDA path: one launch serves all tensors, one warp a row.
//
// Covers: relevance of rows and columns, its completion, sparse AdamW, the fusion. The arithmetic is numerics.h.
// Does not cover: launching and torch (ops_cuda.cu). The tests run this very file on the CPU (tests/csrc).
// Whoever includes this defines load16 and store16, the 16-byte accesses, in namespace leaml::cuda.
//
// A row is walked in blocks of 256 elements, 8 a lane, which is also the block of an 8-bit state. Where pointers and
// strides allow, a lane's 8 elements are read and written 16 bytes at a time; else one by one, neighbours on neighbouring
// lanes. Sums are taken in a fixed order and no atomic is used: results are the same on every run.
#pragma once

#include "numerics.h"

namespace leaml::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerLane = kBlock / kWarp;  // 8
constexpr unsigned kAll = 0xffffffffu;

// Arguments travel by value (at most 32,764 bytes since CUDA 12.1): no copy, no synchronisation, graph capturable.
constexpr int kMaxParts = 340;
constexpr int kMaxUpdates = 204;
constexpr int kMaxSlots = 320;
constexpr int kMaxSlotParts = 1000;

struct View {
  char* data;
  int64_t row_stride;  // in elements
  int32_t col_stride;
};

constexpr int64_t kMaxColStride = (int64_t(1) << 31) / kBlock - 1;  // offsets inside a block fit 32 bits

struct RelevancePart {
  View w, g;
  int64_t width;  // elements of a neuron
  Sums* sums;     // one for each neuron
  int64_t start;  // first row (or strip of columns) in the grid
  int64_t neurons;
  bool vector;
};

struct RelevanceArgs {
  int64_t total;  // rows or strips
  int count;
  RelevancePart parts[kMaxParts];
};

struct UpdateItem {
  View w, g;
  const int64_t* rows;
  void *m, *v;
  float *m_scale, *v_scale, *master, *step;
  Sums* sums;         // fusion only
  int64_t width, k;
  int64_t start;      // first warp of this tensor
  int32_t index;      // of the tensor in the call: part of the random key
  bool compact, vector;
};

struct UpdateArgs {
  Hyper hyper;
  const float *lr, *clip, *scale, *found_inf;  // on the device; null where absent
  int64_t total;  // selected rows, or all rows in the fusion
  int count;
  UpdateItem items[kMaxUpdates];
};

struct Slot {
  float* out;
  int64_t criterion_stride, neuron_stride, neurons;
  int64_t start;
  int32_t first_part, part_count;
};

struct FinishArgs {
  const float *scale, *found_inf;
  double* partials;  // one for each block: squared gradient norm
  int64_t total;
  int count, criteria_count;
  int criteria[4];
  Slot slots[kMaxSlots];
  const Sums* parts[kMaxSlotParts];
};

static_assert(sizeof(RelevanceArgs) <= 32764, "kernel arguments");
static_assert(sizeof(UpdateArgs) <= 32764, "kernel arguments");
static_assert(sizeof(FinishArgs) <= 32764, "kernel arguments");

// Whether rows can be read 16 bytes at a time from their first element on (host).
inline bool rows_aligned(const void* data, int64_t row_stride, int64_t col_stride, int64_t element) {
  return col_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * element % 16 == 0;
}

// --- memory ---------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void unpack(const uint4* raw, float* out);

template <>
__device__ __forceinline__ void unpack<float>(const uint4* raw, float* out) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    out[4 * q] = bits_float(raw[q].x), out[4 * q + 1] = bits_float(raw[q].y);
    out[4 * q + 2] = bits_float(raw[q].z), out[4 * q + 3] = bits_float(raw[q].w);
  }
}

template <class T>
__device__ __forceinline__ float narrow(uint32_t half) {
  T x;
  x.bits = uint16_t(half);
  return to_float(x);
}

template <class T>
__device__ __forceinline__ void unpack_halves(const uint4& raw, float* out) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = narrow<T>(words[i] & 0xffffu);
    out[2 * i + 1] = narrow<T>(words[i] >> 16);
  }
}

template <>
__device__ __forceinline__ void unpack<bf16>(const uint4* raw, float* out) {
  unpack_halves<bf16>(*raw, out);
}

template <>
__device__ __forceinline__ void unpack<fp16>(const uint4* raw, float* out) {
  unpack_halves<fp16>(*raw, out);
}

// Where a lane's q-th group of four elements lies in a block of 256: fp32 alone in whole 512-byte runs; beside a 16-bit
// type the lane's 8 elements stay together, so that the 16-bit type too is read 16 bytes at a time.
template <bool Wide>
__device__ __forceinline__ int quad(int lane, int q) {
  return Wide ? q * 128 + lane * 4 : lane * 8 + q * 4;
}

// Position in its block of a lane's i-th element.
template <bool Wide, bool Vector>
__device__ __forceinline__ int position(int lane, int i) {
  return Vector ? quad<Wide>(lane, i / 4) + i % 4 : i * kWarp + lane;
}

// N elements a lane, from a block of N x 32: N is 8 where rows are read 16 bytes at a time (Vector) or where a block
// shares a scale, else 1.
template <class T, bool Wide, int N, bool Vector>
__device__ __forceinline__ void load(const T* p, int stride, int lane, int valid, float* out) {
  if constexpr (Vector) {
    uint4 raw[2];
    if constexpr (sizeof(T) == 4) {
      raw[0] = load16(reinterpret_cast<const uint4*>(p + quad<Wide>(lane, 0)));
      raw[1] = load16(reinterpret_cast<const uint4*>(p + quad<Wide>(lane, 1)));
    } else {
      raw[0] = load16(reinterpret_cast<const uint4*>(p + lane * 8));
    }
    unpack<T>(raw, out);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = i * kWarp + lane;
      out[i] = at < valid ? to_float(p[at * stride]) : 0.0f;
    }
  }
}

template <class T, bool Wide, int N, bool Vector>
__device__ __forceinline__ void store(T* p, int stride, int lane, int valid, const T* values) {
  if constexpr (Vector) {
    uint4 raw;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        memcpy(&raw, values + 4 * q, 16);
        store16(reinterpret_cast<uint4*>(p + quad<Wide>(lane, q)), raw);
      }
    } else {
      memcpy(&raw, values, 16);
      store16(reinterpret_cast<uint4*>(p + lane * 8), raw);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = i * kWarp + lane;
      if (at < valid) p[at * stride] = values[i];
    }
  }
}

template <bool Wide, bool Vector>
__device__ __forceinline__ void load_codes(const uint8_t* p, int lane, int valid, uint8_t* out) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = position<Wide, Vector>(lane, i);
    out[i] = at < valid ? p[at] : uint8_t(0);
  }
}

template <bool Wide, bool Vector>
__device__ __forceinline__ void store_codes(uint8_t* p, int lane, int valid, const uint8_t* values) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = position<Wide, Vector>(lane, i);
    if (at < valid) p[at] = values[i];
  }
}

// --- warps ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kAll, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// The last entry whose start is not above `at`.
template <class Entry>
__device__ __forceinline__ int find(const Entry* entries, int count, int64_t at) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].start <= at)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// The position of `row` in ascending `rows`, or -1: a warp looks at 32 places at a time.
__device__ __forceinline__ int64_t find_row(const int64_t* rows, int64_t k, int64_t row, int lane) {
  int64_t begin = 0, length = k;
  while (length > kWarp) {
    const int64_t stride = (length + kWarp - 1) / kWarp;
    const int64_t at = lane * stride;
    const bool below = at < length && rows[begin + at] <= row;
    const int hits = __popc(__ballot_sync(kAll, below));
    if (hits == 0) return -1;
    begin += (hits - 1) * stride;
    length = length - (hits - 1) * stride < stride ? length - (hits - 1) * stride : stride;
  }
  const bool equal = lane < length && rows[begin + lane] == row;
  const unsigned found = __ballot_sync(kAll, equal);
  return found ? begin + __ffs(int(found)) - 1 : -1;
}

// --- relevance ------------------------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void add_sums(Sums& s, const float* w, const float* g) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float p = w[i] * g[i];
    s.wg += p;
    s.abs_wg += fabsf(p);
    s.gg += g[i] * g[i];
  }
}

__device__ __forceinline__ Sums warp_total(const Sums& s) { return {warp_sum(s.wg), warp_sum(s.abs_wg), warp_sum(s.gg)}; }

template <class W>
__device__ __forceinline__ const W* at_row(const View& v, int64_t row) {
  return reinterpret_cast<const W*>(v.data) + row * v.row_stride;
}

__device__ __forceinline__ int valid_in(int block, int64_t width, int64_t base) {
  return int(width - base < block ? width - base : block);
}

// One warp a neuron; two blocks of 256 elements in flight.
template <class W, class G>
__global__ void __launch_bounds__(kThreads, 2) relevance_rows(const __grid_constant__ RelevanceArgs args) {
  constexpr bool wide = sizeof(W) == 4 && sizeof(G) == 4;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (warp >= args.total) return;
  const RelevancePart& part = args.parts[find(args.parts, args.count, warp)];
  const int64_t row = warp - part.start, width = part.width;
  const W* w = at_row<W>(part.w, row);
  const G* g = at_row<G>(part.g, row);
  Sums s{0.0f, 0.0f, 0.0f};
  int64_t base = 0;
  if (part.vector) {
    for (; base + 2 * kBlock <= width; base += 2 * kBlock) {
      float a[2][kPerLane], b[2][kPerLane];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load<W, wide, kPerLane, true>(w + base + i * kBlock, 1, lane, kBlock, a[i]);
        load<G, wide, kPerLane, true>(g + base + i * kBlock, 1, lane, kBlock, b[i]);
      }
      add_sums<kPerLane>(s, a[0], b[0]);
      add_sums<kPerLane>(s, a[1], b[1]);
    }
    for (; base + kBlock <= width; base += kBlock) {
      float a[kPerLane], b[kPerLane];
      load<W, wide, kPerLane, true>(w + base, 1, lane, kBlock, a);
      load<G, wide, kPerLane, true>(g + base, 1, lane, kBlock, b);
      add_sums<kPerLane>(s, a, b);
    }
  }
  const int64_t wc = part.w.col_stride, gc = part.g.col_stride;
#pragma unroll 4
  for (int64_t i = base + lane; i < width; i += kWarp) {
    const float a = to_float(w[i * wc]), b = to_float(g[i * gc]);
    add_sums<1>(s, &a, &b);
  }
  s = warp_total(s);
  if (lane == 0) part.sums[row] = s;
}

// The sums of one strip of columns over this warp's rows, left in shared memory.
template <class W, class G, bool Vector>
__device__ __forceinline__ void strip_sums(const RelevancePart& part, int64_t column, int own, int lane, int valid,
                                           float (*shared)[kWarps][kBlock]) {
  constexpr bool wide = sizeof(W) == 4 && sizeof(G) == 4;
  float wg[kPerLane] = {}, abs_wg[kPerLane] = {}, gg[kPerLane] = {};
  const W* w = at_row<W>(part.w, own) + column * part.w.col_stride;
  const G* g = at_row<G>(part.g, own) + column * part.g.col_stride;
#pragma unroll(Vector ? 2 : 1)
  for (int64_t row = own; row < part.width; row += kWarps) {
    float a[kPerLane], b[kPerLane];
    load<W, wide, kPerLane, Vector>(w, part.w.col_stride, lane, valid, a);
    load<G, wide, kPerLane, Vector>(g, part.g.col_stride, lane, valid, b);
    w += kWarps * part.w.row_stride;
    g += kWarps * part.g.row_stride;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float p = a[i] * b[i];
      wg[i] += p;
      abs_wg[i] += fabsf(p);
      gg[i] += b[i] * b[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = position<wide, Vector>(lane, i);
    shared[0][own][at] = wg[i], shared[1][own][at] = abs_wg[i], shared[2][own][at] = gg[i];
  }
}

// One block a strip of 256 columns: its warps share the rows, lanes own 8 columns each.
template <class W, class G>
__global__ void __launch_bounds__(kThreads, 2) relevance_columns(const __grid_constant__ RelevanceArgs args) {
  __shared__ float shared[3][kWarps][kBlock];
  const int lane = int(threadIdx.x) % kWarp, own = int(threadIdx.x) / kWarp;
  const RelevancePart& part = args.parts[find(args.parts, args.count, int64_t(blockIdx.x))];
  const int64_t column = (int64_t(blockIdx.x) - part.start) * kBlock;
  const int valid = valid_in(kBlock, part.neurons, column);
  if (part.vector && valid == kBlock)
    strip_sums<W, G, true>(part, column, own, lane, valid, shared);
  else
    strip_sums<W, G, false>(part, column, own, lane, valid, shared);
  __syncthreads();
  const int at = int(threadIdx.x);  // kThreads == kBlock: one column a thread
  if (at >= valid) return;
  Sums s{0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    s.wg += shared[0][i][at];
    s.abs_wg += shared[1][i][at];
    s.gg += shared[2][i][at];
  }
  part.sums[column + at] = s;
}

// One thread a neuron: joins its parts, applies the criteria, adds to the outputs.
__global__ void __launch_bounds__(kThreads) finish_relevance(const __grid_constant__ FinishArgs args) {
  __shared__ double squares[kThreads];
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const float inverse = args.scale ? 1.0f / *args.scale : 1.0f;
  const bool skip = args.found_inf && *args.found_inf != 0.0f;
  double squared = 0.0;
  if (at < args.total) {
    const Slot& slot = args.slots[find(args.slots, args.count, at)];
    const int64_t neuron = at - slot.start;
    Sums s = args.parts[slot.first_part][neuron];
    squared = s.gg;
    for (int p = 1; p < slot.part_count; ++p) {
      const Sums t = args.parts[slot.first_part + p][neuron];
      s = {s.wg + t.wg, s.abs_wg + t.abs_wg, s.gg + t.gg};
      squared += t.gg;
    }
    if (!skip)
      for (int c = 0; c < args.criteria_count; ++c)
        slot.out[c * slot.criterion_stride + neuron * slot.neuron_stride] += criterion_value(args.criteria[c], s, inverse);
  }
  squares[threadIdx.x] = squared * double(inverse) * double(inverse);
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (int(threadIdx.x) < width) squares[threadIdx.x] += squares[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) args.partials[blockIdx.x] = squares[0];
}

// One block: the partial sums in a fixed order.
__global__ void __launch_bounds__(kThreads) sum_partials(const double* partials, int64_t count, float* out) {
  __shared__ double shared[kThreads];
  double own = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) own += partials[i];
  shared[threadIdx.x] = own;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (int(threadIdx.x) < width) shared[threadIdx.x] += shared[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = float(shared[0]);
}

// --- sparse AdamW ---------------------------------------------------------------------------------------------------

struct Call {
  RowCoefficients c;
  float unscale, factor, t;
  uint32_t key;
};

__device__ __forceinline__ Call call_of(const UpdateArgs& args, const UpdateItem& item, int64_t j, int64_t row) {
  Call call;
  call.t = item.step[j] + 1.0f;
  call.c = row_coefficients(args.hyper, args.lr ? double(*args.lr) : args.hyper.lr, call.t);
  call.unscale = args.scale ? 1.0f / *args.scale : 1.0f;
  call.factor = args.hyper.sign * (args.clip ? *args.clip : 1.0f);
  call.key = row_key(args.hyper.seed, item.index, row, call.t);
  return call;
}

// The scale of a block whose elements lie with the warp, 8 a lane; NaN where one is not finite.
__device__ __forceinline__ float block_scale(const float* values, bool is_signed) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t u = !is_signed && values[i] < 0.0f ? 0u : float_bits(values[i]) & 0x7fffffffu;
    largest = u > largest ? u : largest;
  }
  largest = warp_max(largest);
  return bits_float(largest < 0x7f800000u ? largest : 0x7fc00000u);
}

// A selected row and what stays the same along it.
template <class W, class G>
struct Row {
  const UpdateItem& item;
  const Hyper& hyper;
  Call call;
  int64_t j;
  W* w;
  const G* g;
  int lane;
};

// N x 32 elements of a row from `base` on. Fused: adds their relevance to `s`; steps where `selected`.
template <class W, class G, bool Packed, bool Fused, int N, bool Vector>
__device__ __forceinline__ void step_block(const Row<W, G>& r, int64_t base, bool selected, Sums& s) {
  constexpr bool wide = sizeof(W) == 4 && sizeof(G) == 4;
  const UpdateItem& item = r.item;
  const int lane = r.lane, valid = valid_in(N * kWarp, item.width, base);
  const int wc = Vector ? 1 : item.w.col_stride, gc = Vector ? 1 : item.g.col_stride;
  W* const w_at = r.w + base * wc;
  float w[N], g[N], m[N], v[N];
  load<W, wide, N, Vector>(w_at, wc, lane, valid, w);
  load<G, wide, N, Vector>(r.g + base * gc, gc, lane, valid, g);
  if (Fused) {
    add_sums<N>(s, w, g);
    if (!selected) return;
  }
  const int64_t at = r.j * item.width + base;
  const int64_t block = r.j * ((item.width + kBlock - 1) / kBlock) + base / kBlock;
  if (item.master) load<float, wide, N, Vector>(item.master + at, 1, lane, valid, w);
  if constexpr (Packed) {
    uint8_t code[N];
    load_codes<wide, Vector>(static_cast<const uint8_t*>(item.m) + at, lane, valid, code);
    const float m_scale = item.m_scale[block], v_scale = item.v_scale[block];
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] = decode_signed(code[i], m_scale);
    load_codes<wide, Vector>(static_cast<const uint8_t*>(item.v) + at, lane, valid, code);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = decode_unsigned(code[i], v_scale);
  } else {
    load<float, wide, N, Vector>(static_cast<const float*>(item.m) + at, 1, lane, valid, m);
    load<float, wide, N, Vector>(static_cast<const float*>(item.v) + at, 1, lane, valid, v);
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    adamw_element(w[i], (g[i] * r.call.unscale) * r.call.factor, m[i], v[i], r.hyper, r.call.c);
  if constexpr (Packed) {
    if (!Vector) {  // what lies beyond the row must not raise a scale
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (position<wide, Vector>(lane, i) >= valid) m[i] = v[i] = 0.0f;
    }
    const float m_scale = block_scale(m, true), v_scale = block_scale(v, false);
    const float m_inverse = block_inverse(m_scale), v_inverse = block_inverse(v_scale);
    uint8_t code[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      code[i] = encode_signed(m[i], m_inverse,
                              random_bits(r.call.key, uint32_t(base + position<wide, Vector>(lane, i)), kAvgStream));
    store_codes<wide, Vector>(static_cast<uint8_t*>(item.m) + at, lane, valid, code);
    __syncwarp();  // keeps the two encodings apart: interleaved they need more registers than there are
#pragma unroll
    for (int i = 0; i < N; ++i)
      code[i] = encode_unsigned(v[i], v_inverse,
                                random_bits(r.call.key, uint32_t(base + position<wide, Vector>(lane, i)), kSqStream));
    store_codes<wide, Vector>(static_cast<uint8_t*>(item.v) + at, lane, valid, code);
    if (lane == 0) {
      item.m_scale[block] = m_scale;
      item.v_scale[block] = v_scale;
    }
  } else {
    store<float, wide, N, Vector>(static_cast<float*>(item.m) + at, 1, lane, valid, m);
    store<float, wide, N, Vector>(static_cast<float*>(item.v) + at, 1, lane, valid, v);
  }
  if (item.master) store<float, wide, N, Vector>(item.master + at, 1, lane, valid, w);
  if (Packed) __syncwarp();
  W stored[N];
  if (r.hyper.stochastic && !item.master) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      round_stochastically(
          w[i], random_bits(r.call.key, uint32_t(base + position<wide, Vector>(lane, i)), kWeightStream), stored[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) from_float(w[i], stored[i]);
  }
  store<W, wide, N, Vector>(w_at, wc, lane, valid, stored);
}

template <class W, class G, bool Packed, bool Fused>
__device__ __forceinline__ void step_row(const Row<W, G>& r, bool selected, Sums& s) {
  int64_t base = 0;
  if (r.item.vector)
    for (; base + kBlock <= r.item.width; base += kBlock)
      step_block<W, G, Packed, Fused, kPerLane, true>(r, base, selected, s);
  if constexpr (Packed) {
    for (; base < r.item.width; base += kBlock)
      step_block<W, G, Packed, Fused, kPerLane, false>(r, base, selected, s);
  } else {
    for (; base < r.item.width; base += kWarp) step_block<W, G, Packed, Fused, 1, false>(r, base, selected, s);
  }
}

// One warp a selected row.
template <class W, class G, bool Packed>
__global__ void __launch_bounds__(kThreads, Packed ? 1 : 2) sparse_adamw(const __grid_constant__ UpdateArgs args) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (warp >= args.total || (args.found_inf && *args.found_inf != 0.0f)) return;
  const UpdateItem& item = args.items[find(args.items, args.count, warp)];
  const int64_t j = warp - item.start, row = item.rows[j];
  const Row<W, G> r{item,
                    args.hyper,
                    call_of(args, item, j, row),
                    j,
                    reinterpret_cast<W*>(item.w.data) + row * item.w.row_stride,
                    reinterpret_cast<const G*>(item.g.data) + (item.compact ? j : row) * item.g.row_stride,
                    lane};
  Sums unused{};
  step_row<W, G, Packed, false>(r, true, unused);
  __syncwarp();  // every lane has read the step
  if (lane == 0) item.step[j] = r.call.t;
}

// One warp a row: its relevance, and its step where it is selected. Weight and gradient are read once.
template <class W, class G, bool Packed>
__global__ void __launch_bounds__(kThreads, Packed ? 1 : 2) relevance_sparse_adamw(const __grid_constant__ UpdateArgs args) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (warp >= args.total) return;
  const UpdateItem& item = args.items[find(args.items, args.count, warp)];
  const int64_t row = warp - item.start;
  int64_t j = find_row(item.rows, item.k, row, lane);
  if (args.found_inf && *args.found_inf != 0.0f) j = -1;
  const Row<W, G> r{item,
                    args.hyper,
                    j >= 0 ? call_of(args, item, j, row) : Call{},
                    j,
                    reinterpret_cast<W*>(item.w.data) + row * item.w.row_stride,
                    reinterpret_cast<const G*>(item.g.data) + row * item.g.row_stride,
                    lane};
  Sums s{0.0f, 0.0f, 0.0f};
  step_row<W, G, Packed, true>(r, j >= 0, s);
  s = warp_total(s);
  if (lane == 0) item.sums[row] = s;
  __syncwarp();
  if (lane == 0 && j >= 0) item.step[j] = r.call.t;
}

}  // namespace leaml::cuda
