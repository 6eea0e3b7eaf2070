// Vectorised inner loops of the CPU path, compiled for three instruction sets and chosen when the library is loaded.
//
// Every loop is either element-wise or sums into kLanes explicit lanes, and floating-point contraction is off, so all
// instruction sets give the same bits.
#include "cpu_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LEAML_NO_CLONES)
#define LEAML_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LEAML_CLONES
#endif

namespace leaml::cpu {
namespace {

constexpr int kAhead = 1024;  // bytes a stream is prefetched ahead

// Eight floats as one value. Wider generic vectors compile badly where registers are narrower.
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
constexpr int kVectors = kLanes / 8;

LEAML_HD void load8(const float* p, f32x8& out) { memcpy(&out, p, 32); }

LEAML_HD void load8(const bf16* p, f32x8& out) {
  u16x8 raw;
  memcpy(&raw, p, 16);
  out = (f32x8)(__builtin_convertvector(raw, u32x8) << 16);
}

LEAML_HD void load8(const fp16* p, f32x8& out) {  // to_float(fp16), eight at a time
  u16x8 raw;
  memcpy(&raw, p, 16);
  const u32x8 x = __builtin_convertvector(raw, u32x8);
  const u32x8 magnitude = (x & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u, rebased = magnitude + 0x38000000u;
  const f32x8 subnormal = (f32x8)(rebased + 0x00800000u) - (f32x8)(u32x8{} + 0x38800000u);
  u32x8 u = exponent == 0x0f800000u ? rebased + 0x38000000u : rebased;
  u = exponent == 0u ? (u32x8)subnormal : u;
  out = (f32x8)(u | ((x & 0x8000u) << 16));
}

template <class W, class G>
LEAML_HD void relevance_body(const W* w, const G* g, int64_t n, Lanes& lanes) {
  f32x8 wg[kVectors], abs_wg[kVectors], gg[kVectors];
  memcpy(wg, lanes.wg, sizeof(wg)), memcpy(abs_wg, lanes.abs_wg, sizeof(wg)), memcpy(gg, lanes.gg, sizeof(wg));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      f32x8 a, b;
      load8(w + i + 8 * k, a);
      load8(g + i + 8 * k, b);
      const f32x8 p = a * b;
      wg[k] += p;
      abs_wg[k] += (f32x8)((u32x8)p & 0x7fffffffu);
      gg[k] += b * b;
    }
    __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(g + i) + kAhead);
    if (sizeof(W) == 4) __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead + 64);
    if (sizeof(G) == 4) __builtin_prefetch(reinterpret_cast<const char*>(g + i) + kAhead + 64);
  }
  memcpy(lanes.wg, wg, sizeof(wg)), memcpy(lanes.abs_wg, abs_wg, sizeof(wg)), memcpy(lanes.gg, gg, sizeof(wg));
  for (int lane = 0; i < n; ++i, ++lane) {
    const float a = to_float(w[i]), b = to_float(g[i]), p = a * b;
    lanes.wg[lane] += p;
    lanes.abs_wg[lane] += fabsf(p);
    lanes.gg[lane] += b * b;
  }
}

#define LEAML_RELEVANCE(name, W, G) \
  LEAML_CLONES void name(const void* w, const void* g, int64_t n, Lanes& lanes) { \
    relevance_body(static_cast<const W*>(w), static_cast<const G*>(g), n, lanes); \
  }
LEAML_RELEVANCE(relevance_f32_f32, float, float)
LEAML_RELEVANCE(relevance_bf16_bf16, bf16, bf16)
LEAML_RELEVANCE(relevance_f16_f16, fp16, fp16)
LEAML_RELEVANCE(relevance_bf16_f32, bf16, float)
LEAML_RELEVANCE(relevance_f16_f32, fp16, float)

template <class T>
LEAML_HD void load_body(const T* source, int64_t stride, int64_t n, float* __restrict out) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(source[i * stride]);
  }
}

template <class T>
LEAML_HD void store_body(const float* __restrict values, int64_t n, T* target, int64_t stride) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) from_float(values[i], target[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) from_float(values[i], target[i * stride]);
  }
}

template <class T>
LEAML_HD void stochastic_body(const float* __restrict values, int64_t n, T* target, int64_t stride, uint32_t key,
                              uint32_t column) {
  if (stride == 1) {
#pragma omp simd
    for (int32_t i = 0; i < int32_t(n); ++i)
      round_stochastically(values[i], random_bits(key, column + uint32_t(i), kWeightStream), target[i]);
  } else {
    for (int32_t i = 0; i < int32_t(n); ++i)
      round_stochastically(values[i], random_bits(key, column + uint32_t(i), kWeightStream), target[i * stride]);
  }
}

#define LEAML_COPIES(suffix, T) \
  LEAML_CLONES void load_##suffix(const void* s, int64_t stride, int64_t n, float* out) { \
    load_body(static_cast<const T*>(s), stride, n, out); \
  } \
  LEAML_CLONES void store_##suffix(const float* x, int64_t n, void* t, int64_t stride) { \
    store_body(x, n, static_cast<T*>(t), stride); \
  } \
  LEAML_CLONES void stochastic_##suffix(const float* x, int64_t n, void* t, int64_t stride, uint32_t key, \
                                        uint32_t column) { \
    stochastic_body(x, n, static_cast<T*>(t), stride, key, column); \
  }
LEAML_COPIES(f32, float)
LEAML_COPIES(bf16, bf16)
LEAML_COPIES(f16, fp16)

LEAML_CLONES void add_columns_clones(const float* w, const float* g, int64_t n, float* __restrict wg,
                                     float* __restrict abs_wg, float* __restrict gg) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float p = w[i] * g[i];
    wg[i] += p;
    abs_wg[i] += fabsf(p);
    gg[i] += g[i] * g[i];
  }
}

LEAML_CLONES void step_clones(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                              int64_t n, float unscale, float factor, const Hyper* hyper, const RowCoefficients* row) {
  const Hyper h = *hyper;
  const RowCoefficients c = *row;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) adamw_element(w[i], (g[i] * unscale) * factor, m[i], v[i], h, c);
}

LEAML_CLONES void decode_clones(const uint8_t* __restrict code, float scale, int64_t n, bool is_signed,
                                float* __restrict out) {
  if (is_signed) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = decode_signed(code[i], scale);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = decode_unsigned(code[i], scale);
  }
}

LEAML_CLONES void encode_clones(const float* __restrict values, int64_t n, bool is_signed, uint32_t key, uint32_t column,
                                uint8_t* __restrict code, float* scale_out) {
  // the largest magnitude by integer comparison: the bits of non-negative floats are ordered, Inf and NaN come out on top
  uint32_t largest = 0;
  if (is_signed) {
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t u = float_bits(values[i]) & 0x7fffffffu;
      largest = u > largest ? u : largest;
    }
  } else {
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t u = values[i] < 0.0f ? 0u : float_bits(values[i]) & 0x7fffffffu;
      largest = u > largest ? u : largest;
    }
  }
  const float scale = largest < 0x7f800000u ? bits_float(largest) : bits_float(0x7fc00000u);
  const float inverse = block_inverse(scale);
  if (is_signed) {
#pragma omp simd
    for (int32_t i = 0; i < int32_t(n); ++i)
      code[i] = encode_signed(values[i], inverse, random_bits(key, column + uint32_t(i), kAvgStream));
  } else {
#pragma omp simd
    for (int32_t i = 0; i < int32_t(n); ++i)
      code[i] = encode_unsigned(values[i], inverse, random_bits(key, column + uint32_t(i), kSqStream));
  }
  *scale_out = scale;
}

}  // namespace

void add_relevance(const void* w, Type wt, const void* g, Type gt, int64_t n, Lanes& lanes) {
  if (wt == Type::f32) return relevance_f32_f32(w, g, n, lanes);
  if (wt == Type::bf16) return gt == Type::f32 ? relevance_bf16_f32(w, g, n, lanes) : relevance_bf16_bf16(w, g, n, lanes);
  return gt == Type::f32 ? relevance_f16_f32(w, g, n, lanes) : relevance_f16_f16(w, g, n, lanes);
}

namespace {
float tree(const float* x) {
  float half[kLanes];
  memcpy(half, x, sizeof(half));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  return half[0];
}
}  // namespace

Sums total(const Lanes& lanes) { return {tree(lanes.wg), tree(lanes.abs_wg), tree(lanes.gg)}; }

void add_columns(const float* w, const float* g, int64_t n, float* wg, float* abs_wg, float* gg) {
  add_columns_clones(w, g, n, wg, abs_wg, gg);
}

void load(const void* source, Type type, int64_t stride, int64_t n, float* out) {
  if (type == Type::f32) return load_f32(source, stride, n, out);
  if (type == Type::bf16) return load_bf16(source, stride, n, out);
  load_f16(source, stride, n, out);
}

void store(const float* values, int64_t n, void* target, Type type, int64_t stride) {
  if (type == Type::f32) return store_f32(values, n, target, stride);
  if (type == Type::bf16) return store_bf16(values, n, target, stride);
  store_f16(values, n, target, stride);
}

void store_stochastic(const float* values, int64_t n, void* target, Type type, int64_t stride, uint32_t key,
                      int64_t column) {
  if (type == Type::f32) return stochastic_f32(values, n, target, stride, key, uint32_t(column));
  if (type == Type::bf16) return stochastic_bf16(values, n, target, stride, key, uint32_t(column));
  stochastic_f16(values, n, target, stride, key, uint32_t(column));
}

void step(float* w, const float* g, float* m, float* v, int64_t n, float unscale, float factor, const Hyper& h,
          const RowCoefficients& c) {
  step_clones(w, g, m, v, n, unscale, factor, &h, &c);
}

void decode(const uint8_t* code, const float* scales, int64_t n, bool is_signed, float* out) {
  for (int64_t i = 0; i < n; i += kBlock)
    decode_clones(code + i, scales[i / kBlock], n - i < kBlock ? n - i : kBlock, is_signed, out + i);
}

void encode(const float* values, int64_t n, bool is_signed, uint32_t key, int64_t column, uint8_t* code, float* scales) {
  for (int64_t i = 0; i < n; i += kBlock)
    encode_clones(values + i, n - i < kBlock ? n - i : kBlock, is_signed, key, uint32_t(column + i), code + i,
                  scales + i / kBlock);
}

}  // namespace leaml::cpu
