// Device code of the CUDA path: one launch serves all tensors, one warp a row.
//
// Covers: relevance of rows and columns, its completion, sparse AdamW of rows and of columns, the fusion. The arithmetic
// is numerics.h.
// Does not cover: launching and torch (ops_cuda.cu). The tests run this very file on the CPU (tests/csrc).
// A compiler for the host has to define load_as and store_as, accesses of 4, 8 and 16 bytes, before it includes this.
//
// A row is walked in blocks of 256 elements, 8 a lane, which is also the block of an 8-bit state. Where pointers and
// strides allow, a lane's 8 elements are read and written 16 bytes at a time; else one by one, neighbours on neighbouring
// lanes. Sums are taken in a fixed order and no atomic is used: results are the same on every run.
//
// A neuron that is a column of what lies in memory has its elements far apart, and so has each sector of 32 bytes elements
// of several neurons: there a block takes neighbouring selected neurons together and turns them in shared memory.
#pragma once

#include "numerics.h"

namespace leaml::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerLane = kBlock / kWarp;  // 8
constexpr int kRun = 64;  // rows of a strip of columns that one running sum takes
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
  int64_t width;
  int64_t limit;      // fusion: how many `rows` there are; else what they must stay below
  int64_t start;      // first warp of this tensor; of columns, first tile
  int32_t k;          // columns only: how many `rows` there are
  int32_t index;      // of the tensor in the call: part of the random key
  int16_t tile;       // columns only: how many of them a tile takes
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

// Columns are stepped in tiles of 256 of their elements, in shared memory: a tile's neurons are rows there, each beginning
// on 16 bytes and in other banks than the one before.
constexpr int kTileBytes = 33792;
constexpr int kMaxTile = kWarp;

template <class T>
constexpr int kPitch = kBlock + 16 / int(sizeof(T));

// How many neurons fit a tile: 32 or 16, with their gradients in it or not (host).
inline int tile_of(int64_t weight_bytes, int64_t gradient_bytes, bool staged) {
  const int64_t row = kBlock * weight_bytes + 16 + (staged ? kBlock * gradient_bytes + 16 : 0);
  return row * kMaxTile <= kTileBytes ? kMaxTile : kMaxTile / 2;
}

// Whether rows can be read 16 bytes at a time from their first element on (host).
inline bool rows_aligned(const void* data, int64_t row_stride, int64_t col_stride, int64_t element) {
  return col_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * element % 16 == 0;
}

// --- memory ---------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
template <class V>
__device__ __forceinline__ V load_as(const void* p) {
  return *static_cast<const V*>(p);
}

template <class V>
__device__ __forceinline__ void store_as(void* p, const V& x) {
  *static_cast<V*>(p) = x;
}

// A plain assignment of values that are used elsewhere too may come out as four stores of 4 bytes.
template <>
__device__ __forceinline__ void store_as<uint4>(void* p, const uint4& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

template <class V>
__device__ __forceinline__ void store_shared(void* p, const V& x) {
  *static_cast<V*>(p) = x;
}
#endif

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

// N elements a lane, from a block of N x 32: N is 8 where rows are read 16 bytes at a time (Vector), else 1, or 8 again
// for a strip of columns.
template <class T, bool Wide, int N, bool Vector>
__device__ __forceinline__ void load(const T* p, int stride, int lane, int valid, float* out) {
  if constexpr (Vector) {
    uint4 raw[2];
    if constexpr (sizeof(T) == 4) {
      raw[0] = load_as<uint4>(p + quad<Wide>(lane, 0));
      raw[1] = load_as<uint4>(p + quad<Wide>(lane, 1));
    } else {
      raw[0] = load_as<uint4>(p + lane * 8);
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

template <class T, bool Wide, int N, bool Vector, bool Shared = false>
__device__ __forceinline__ void store(T* p, int stride, int lane, int valid, const T* values) {
  if constexpr (Vector && Shared) {
    uint4 raw[2];
    memcpy(raw, values, N * sizeof(T));
    store_shared(p + quad<Wide>(lane, 0), raw[0]);
    if constexpr (sizeof(T) == 4) store_shared(p + quad<Wide>(lane, 1), raw[1]);
  } else if constexpr (Vector) {
    uint4 raw;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        memcpy(&raw, values + 4 * q, 16);
        store_as<uint4>(p + quad<Wide>(lane, q), raw);
      }
    } else {
      memcpy(&raw, values, 16);
      store_as<uint4>(p + lane * 8, raw);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = i * kWarp + lane;
      if (at < valid) p[at * stride] = values[i];
    }
  }
}

// A lane's 8 codes of an 8-bit state: element i is byte i % 4 of word i / 4.
template <bool Wide>
__device__ __forceinline__ void load_codes(const uint8_t* p, int lane, uint32_t* words) {
  if constexpr (Wide) {
    words[0] = load_as<uint32_t>(p + quad<Wide>(lane, 0));
    words[1] = load_as<uint32_t>(p + quad<Wide>(lane, 1));
  } else {
    const uint2 both = load_as<uint2>(p + lane * 8);
    words[0] = both.x, words[1] = both.y;
  }
}

template <bool Wide>
__device__ __forceinline__ void store_codes(uint8_t* p, int lane, const uint32_t* words) {
  if constexpr (Wide) {
    store_as<uint32_t>(p + quad<Wide>(lane, 0), words[0]);
    store_as<uint32_t>(p + quad<Wide>(lane, 1), words[1]);
  } else {
    store_as<uint2>(p + lane * 8, uint2{words[0], words[1]});
  }
}

__device__ __forceinline__ uint8_t code_of(const uint32_t* words, int i) { return uint8_t(words[i / 4] >> (i % 4 * 8)); }

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

// This lane's sums over one row; two blocks of 256 elements in flight.
template <class W, class G>
__device__ __forceinline__ Sums row_sums(const W* w, const G* g, int64_t width, int64_t wc, int64_t gc, bool vector,
                                         int lane) {
  constexpr bool wide = sizeof(W) == 4 && sizeof(G) == 4;
  Sums s{0.0f, 0.0f, 0.0f};
  int64_t base = 0;
  if (vector) {
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
#pragma unroll 4
  for (int64_t i = base + lane; i < width; i += kWarp) {
    const float a = to_float(w[i * wc]), b = to_float(g[i * gc]);
    add_sums<1>(s, &a, &b);
  }
  return s;
}

// One warp a neuron.
template <class W, class G>
__global__ void __launch_bounds__(kThreads, sizeof(G) == 4 ? 4 : 5) relevance_rows(const __grid_constant__ RelevanceArgs args) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (warp >= args.total) return;
  const RelevancePart& part = args.parts[find(args.parts, args.count, warp)];
  const int64_t row = warp - part.start;
  const Sums s = warp_total(row_sums(at_row<W>(part.w, row), at_row<G>(part.g, row), part.width, part.w.col_stride,
                                     part.g.col_stride, part.vector, lane));
  if (lane == 0) part.sums[row] = s;
}

// The sums of one strip of columns over this warp's rows, left in shared memory. A running sum loses what is small beside
// it, so that it starts anew every kRun rows; what it was is added up in shared memory, where there is room.
template <class W, class G, bool Vector>
__device__ __forceinline__ void strip_sums(const RelevancePart& part, int64_t column, int own, int lane, int valid,
                                           float (*shared)[kWarps][kBlock]) {
  constexpr bool wide = sizeof(W) == 4 && sizeof(G) == 4;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = position<wide, Vector>(lane, i);
    shared[0][own][at] = shared[1][own][at] = shared[2][own][at] = 0.0f;
  }
  const W* w = at_row<W>(part.w, own) + column * part.w.col_stride;
  const G* g = at_row<G>(part.g, own) + column * part.g.col_stride;
  for (int64_t row = own; row < part.width;) {
    const int64_t stop = part.width - row < kRun * kWarps ? part.width : row + kRun * kWarps;
    float wg[kPerLane] = {}, abs_wg[kPerLane] = {}, gg[kPerLane] = {};
#pragma unroll(Vector ? 2 : 1)
    for (; row < stop; row += kWarps) {
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
      shared[0][own][at] += wg[i], shared[1][own][at] += abs_wg[i], shared[2][own][at] += gg[i];
    }
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

// What the scale of a state's block is found from: the largest bits of a magnitude; NaN and Inf are above all numbers.
__device__ __forceinline__ uint32_t magnitude_bits(float value, bool is_signed) {
  return !is_signed && value < 0.0f ? 0u : float_bits(value) & 0x7fffffffu;
}

// The scale of a block whose largest bits each lane knows of its own elements; NaN where one is not finite.
__device__ __forceinline__ float block_scale(uint32_t largest) {
  largest = warp_max(largest);
  return bits_float(largest < 0x7f800000u ? largest : 0x7fc00000u);
}

// A selected row and what stays the same along it. Tiled: of a tile, whose first element `w` and `g` point to; else they
// point to the row's.
template <class W, class G, bool Tiled = false>
struct Row {
  const UpdateItem& item;
  const Hyper& hyper;
  Call call;
  int64_t j, block;  // its place among the selected rows, its first block of 8-bit states
  W* w;
  const G* g;
  int lane;

  __device__ __forceinline__ int w_stride() const { return Tiled ? 1 : item.w.col_stride; }
  __device__ __forceinline__ int g_stride() const { return Tiled ? 1 : item.g.col_stride; }
};

__device__ __forceinline__ int64_t first_block(const UpdateItem& item, int64_t j) {
  return j * ((item.width + kBlock - 1) / kBlock);
}

// What the weight itself becomes: its master's rounding, or the step's own.
template <class W, class G, bool Tiled>
__device__ __forceinline__ void round_weight(const Row<W, G, Tiled>& r, float w, int64_t column, W& out) {
  if (r.hyper.stochastic && !r.item.master)
    round_stochastically(w, random_bits(r.call.key, uint32_t(column), kWeightStream), out);
  else
    from_float(w, out);
}

// N x 32 elements of a selected row from `base` on. Fused: adds their relevance to `s`. 8-bit states take whole blocks.
template <class W, class G, bool Packed, bool Fused, int N, bool Vector, bool Tiled>
__device__ __forceinline__ void step_block(const Row<W, G, Tiled>& r, int64_t base, Sums& s) {
  static_assert(Vector || !Packed);
  constexpr bool wide = sizeof(W) == 4 && sizeof(G) == 4;
  const UpdateItem& item = r.item;
  const int lane = r.lane, valid = valid_in(N * kWarp, item.width, base);
  const int wc = Vector ? 1 : r.w_stride(), gc = Vector ? 1 : r.g_stride();
  W* const w_at = Tiled ? r.w + base % kBlock : r.w + base * wc;
  const G* const g_at = Tiled ? r.g + base % kBlock : r.g + base * gc;
  float w[N], g[N], m[N], v[N];
  // with a master the weight is written, not read; where registers are scarcest the condition would cost a spill
  if (Fused || (Packed && sizeof(G) == 2) || !item.master) load<W, wide, N, Vector>(w_at, wc, lane, valid, w);
  load<G, wide, N, Vector>(g_at, gc, lane, valid, g);
  if (Fused) add_sums<N>(s, w, g);
  const int64_t at = r.j * item.width + base;
  const int64_t block = r.block + base / kBlock;
  if (item.master) load<float, wide, N, Vector>(item.master + at, 1, lane, valid, w);
  if constexpr (Packed) {
    uint32_t codes[2];
    load_codes<wide>(static_cast<const uint8_t*>(item.m) + at, lane, codes);
    const float m_scale = item.m_scale[block], v_scale = item.v_scale[block];
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] = decode_signed(code_of(codes, i), m_scale);
    load_codes<wide>(static_cast<const uint8_t*>(item.v) + at, lane, codes);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = decode_unsigned(code_of(codes, i), v_scale);
  } else {
    load<float, wide, N, Vector>(static_cast<const float*>(item.m) + at, 1, lane, valid, m);
    load<float, wide, N, Vector>(static_cast<const float*>(item.v) + at, 1, lane, valid, v);
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    adamw_element(w[i], (g[i] * r.call.unscale) * r.call.factor, m[i], v[i], r.hyper, r.call.c);
  if (item.master) store<float, wide, N, Vector>(item.master + at, 1, lane, valid, w);
  W stored[N];
#pragma unroll
  for (int i = 0; i < N; ++i) round_weight(r, w[i], base + position<wide, Vector>(lane, i), stored[i]);
  store<W, wide, N, Vector, Tiled>(w_at, wc, lane, valid, stored);
  if constexpr (Packed) {
    uint32_t m_largest = 0, v_largest = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t a = magnitude_bits(m[i], true), b = magnitude_bits(v[i], false);
      m_largest = a > m_largest ? a : m_largest;
      v_largest = b > v_largest ? b : v_largest;
    }
    const float m_scale = block_scale(m_largest), v_scale = block_scale(v_largest);
    const float m_inverse = block_inverse(m_scale), v_inverse = block_inverse(v_scale);
    uint32_t codes[2] = {0, 0};
    // the barriers keep encodings apart: interleaved they need more registers than two blocks a processor leave
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t bits = random_bits(r.call.key, uint32_t(base + position<wide, true>(lane, i)), kAvgStream);
      codes[i / 4] |= uint32_t(encode_signed(m[i], m_inverse, bits)) << (i % 4 * 8);
    }
    store_codes<wide>(static_cast<uint8_t*>(item.m) + at, lane, codes);
    __syncwarp();
    codes[0] = codes[1] = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t bits = random_bits(r.call.key, uint32_t(base + position<wide, true>(lane, i)), kSqStream);
      codes[i / 4] |= uint32_t(encode_unsigned(v[i], v_inverse, bits)) << (i % 4 * 8);
    }
    store_codes<wide>(static_cast<uint8_t*>(item.v) + at, lane, codes);
    if (lane == 0) {
      item.m_scale[block] = m_scale;
      item.v_scale[block] = v_scale;
    }
  } else {
    store<float, wide, N, Vector>(static_cast<float*>(item.m) + at, 1, lane, valid, m);
    store<float, wide, N, Vector>(static_cast<float*>(item.v) + at, 1, lane, valid, v);
  }
}

// Up to 256 elements of a selected row with 8-bit states, one by one: where nothing is aligned, and at a row's end. The
// scale of a block is known after its last element only, so the moments are worked out twice; kept between, they would
// take more registers than all the rest.
template <class W, class G, bool Fused, bool Tiled>
__device__ __forceinline__ void step_packed_elements(const Row<W, G, Tiled>& r, int64_t base, Sums& s) {
  const UpdateItem& item = r.item;
  const int valid = valid_in(kBlock, item.width, base), wc = r.w_stride(), gc = r.g_stride();
  const int64_t at = r.j * item.width + base, block = r.block + base / kBlock;
  W* const w_at = Tiled ? r.w + base % kBlock : r.w + base * wc;
  const G* const g_at = Tiled ? r.g + base % kBlock : r.g + base * gc;
  uint8_t* const m_code = static_cast<uint8_t*>(item.m) + at;
  uint8_t* const v_code = static_cast<uint8_t*>(item.v) + at;
  const float m_scale = item.m_scale[block], v_scale = item.v_scale[block];
  uint32_t m_largest = 0, v_largest = 0;
#pragma unroll 1
  for (int i = r.lane; i < valid; i += kWarp) {
    float w = to_float(w_at[i * wc]);
    const float g = to_float(g_at[i * gc]);
    if (Fused) add_sums<1>(s, &w, &g);
    if (item.master) w = item.master[at + i];
    float m = decode_signed(m_code[i], m_scale), v = decode_unsigned(v_code[i], v_scale);
    adamw_element(w, (g * r.call.unscale) * r.call.factor, m, v, r.hyper, r.call.c);
    if (item.master) item.master[at + i] = w;
    round_weight(r, w, base + i, w_at[i * wc]);
    const uint32_t a = magnitude_bits(m, true), b = magnitude_bits(v, false);
    m_largest = a > m_largest ? a : m_largest;
    v_largest = b > v_largest ? b : v_largest;
  }
  const float m_new = block_scale(m_largest), v_new = block_scale(v_largest);
  const float m_inverse = block_inverse(m_new), v_inverse = block_inverse(v_new);
#pragma unroll 1
  for (int i = r.lane; i < valid; i += kWarp) {
    const float g = (to_float(g_at[i * gc]) * r.call.unscale) * r.call.factor;
    float m = decode_signed(m_code[i], m_scale), v = decode_unsigned(v_code[i], v_scale);
    adamw_moments(g, m, v, r.hyper);
    m_code[i] = encode_signed(m, m_inverse, random_bits(r.call.key, uint32_t(base + i), kAvgStream));
    v_code[i] = encode_unsigned(v, v_inverse, random_bits(r.call.key, uint32_t(base + i), kSqStream));
  }
  if (r.lane == 0) {
    item.m_scale[block] = m_new;
    item.v_scale[block] = v_new;
  }
}

template <class W, class G, bool Packed, bool Fused>
__device__ __forceinline__ void step_row(const Row<W, G>& r, Sums& s) {
  int64_t base = 0;
  if (r.item.vector)
    for (; base + kBlock <= r.item.width; base += kBlock) step_block<W, G, Packed, Fused, kPerLane, true>(r, base, s);
  if constexpr (Packed) {
    for (; base < r.item.width; base += kBlock) step_packed_elements<W, G, Fused>(r, base, s);
  } else {
    for (; base < r.item.width; base += kWarp) step_block<W, G, Packed, Fused, 1, false>(r, base, s);
  }
}

// Blocks that fit a processor together: as many as the registers allow without spilling anything (tests/csrc).
template <class G, bool Packed, bool Fused>
constexpr int kStepBlocks = (Packed ? Fused && sizeof(G) == 2 : !Fused) ? 3 : 2;

// One warp a selected row.
template <class W, class G, bool Packed>
__global__ void __launch_bounds__(kThreads, kStepBlocks<G, Packed, false>)
    sparse_adamw(const __grid_constant__ UpdateArgs args) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (warp >= args.total || (args.found_inf && *args.found_inf != 0.0f)) return;
  const UpdateItem& item = args.items[find(args.items, args.count, warp)];
  const int64_t j = warp - item.start, row = item.rows[j];
  if (uint64_t(row) >= uint64_t(item.limit)) __trap();  // an error at the next synchronisation, as torch's indexing
  const Row<W, G> r{item,
                    args.hyper,
                    call_of(args, item, j, row),
                    j,
                    first_block(item, j),
                    reinterpret_cast<W*>(item.w.data) + row * item.w.row_stride,
                    at_row<G>(item.g, item.compact ? j : row),
                    lane};
  Sums unused{};
  step_row<W, G, Packed, false>(r, unused);
  __syncwarp();  // every lane has read the step
  if (lane == 0) item.step[j] = r.call.t;
}

// From memory into a tile, neurons on neighbouring lanes: `from` is the tile's first element of the calling thread's neuron.
template <class T>
__device__ __forceinline__ void stage(T* tile, const T* from, int stride, int first, int step, int valid) {
  constexpr int kFlight = 8;
  for (int begin = first; begin < valid; begin += kFlight * step) {
    T x[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i)
      if (begin + i * step < valid) x[i] = from[(begin + i * step) * stride];
#pragma unroll
    for (int i = 0; i < kFlight; ++i)
      if (begin + i * step < valid) tile[begin + i * step] = x[i];
  }
}

// One block a tile: `item.tile` selected neurons that are columns in memory, 256 elements of each. Weights, and gradients
// that lie like them, are moved with neurons on neighbouring lanes, so that a sector that several neurons share moves
// once; states and the step are a row's. A neuron's tiles read its step count, which count_steps raises after them.
template <class W, class G, bool Packed>
__global__ void __launch_bounds__(kThreads, 2) sparse_adamw_columns(const __grid_constant__ UpdateArgs args) {
  __shared__ uint4 tile[kTileBytes / 16];
  __shared__ Call calls[kMaxTile];
  if (args.found_inf && *args.found_inf != 0.0f) return;
  const int thread = int(threadIdx.x);
  const UpdateItem& item = args.items[find(args.items, args.count, int64_t(blockIdx.x))];
  const int64_t groups = (item.k + item.tile - 1) / item.tile, number = int64_t(blockIdx.x) - item.start;
  // neighbouring neurons one after another: they share sectors where one tile ends and the next begins
  const int64_t first = number % groups * item.tile, base = number / groups * kBlock;
  const int count = valid_in(item.tile, item.k, first), valid = valid_in(kBlock, item.width, base);
  W* const weights = reinterpret_cast<W*>(tile);
  G* const grads = reinterpret_cast<G*>(weights + item.tile * kPitch<W>);
  const bool staged = item.g.col_stride != 1;  // else a row of gradients is read where it is

  const int own = thread % item.tile, at = thread / item.tile, step = kThreads / item.tile;  // this thread's when staging
  const int64_t row = own < count ? item.rows[first + own] : 0;
  if (uint64_t(row) >= uint64_t(item.limit)) __trap();
  W* const w = reinterpret_cast<W*>(item.w.data) + row * item.w.row_stride + base * item.w.col_stride;
  if (thread < count) calls[thread] = call_of(args, item, first + thread, row);
  if (own < count) {
    if (!item.master) stage(weights + own * kPitch<W>, w, item.w.col_stride, at, step, valid);
    if (staged)
      stage(grads + own * kPitch<G>, at_row<G>(item.g, item.compact ? first + own : row) + base * item.g.col_stride,
            item.g.col_stride, at, step, valid);
  }
  __syncthreads();
  Sums unused{};
  for (int i = thread / kWarp; i < count; i += kWarps) {
    const int64_t j = first + i;
    const G* const g = staged ? grads + i * kPitch<G> : at_row<G>(item.g, item.compact ? j : item.rows[j]) + base;
    const Row<W, G, true> r{
        item, args.hyper, calls[i], j, first_block(item, j), weights + i * kPitch<W>, g, thread % kWarp};
    if (item.vector && valid == kBlock) {
      step_block<W, G, Packed, false, kPerLane, true>(r, base, unused);
    } else if constexpr (Packed) {
      step_packed_elements<W, G, false>(r, base, unused);
    } else {
      for (int e = 0; e < valid; e += kWarp) step_block<W, G, Packed, false, 1, false>(r, base + e, unused);
    }
  }
  __syncthreads();
  if (own < count) {
#pragma unroll 4
    for (int e = at; e < valid; e += step) w[e * item.w.col_stride] = weights[own * kPitch<W> + e];
  }
}

// One block a tensor of columns, after their step.
__global__ void __launch_bounds__(kThreads) count_steps(const __grid_constant__ UpdateArgs args) {
  if (args.found_inf && *args.found_inf != 0.0f) return;
  const UpdateItem& item = args.items[blockIdx.x];
  for (int j = int(threadIdx.x); j < item.k; j += kThreads) item.step[j] += 1.0f;
}

// One warp a row: its relevance, and its step where it is selected. Weight and gradient are read once.
template <class W, class G, bool Packed>
__global__ void __launch_bounds__(kThreads, kStepBlocks<G, Packed, true>)
    relevance_sparse_adamw(const __grid_constant__ UpdateArgs args) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (warp >= args.total) return;
  const UpdateItem& item = args.items[find(args.items, args.count, warp)];
  const int64_t row = warp - item.start;
  W* const w = reinterpret_cast<W*>(item.w.data) + row * item.w.row_stride;
  const G* const g = at_row<G>(item.g, row);
  const bool skip = args.found_inf && *args.found_inf != 0.0f;
  const int64_t j = skip ? -1 : find_row(item.rows, item.limit, row, lane);
  Sums s{0.0f, 0.0f, 0.0f};
  if (j < 0) {
    s = row_sums(static_cast<const W*>(w), g, item.width, item.w.col_stride, item.g.col_stride, item.vector, lane);
  } else {
    const Row<W, G> r{item, args.hyper, call_of(args, item, j, row), j, first_block(item, j), w, g, lane};
    step_row<W, G, Packed, true>(r, s);
    __syncwarp();  // every lane has read the step
    if (lane == 0) item.step[j] = r.call.t;
  }
  s = warp_total(s);
  if (lane == 0) item.sums[row] = s;
}

}  // namespace leaml::cuda
