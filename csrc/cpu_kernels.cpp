// Vectorised inner loops of the CPU path, compiled for three instruction sets and chosen when the library is loaded.
//
// Every loop is either element-wise or sums into kLanes explicit lanes, and floating-point contraction is off, so all
// instruction sets give the same bits.
#include "cpu_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LEAML_NO_CLONES)
#define LEAML_DISPATCH
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // a false alarm inside GCC 12's own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#define LEAML_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LEAML_CLONES
#endif

namespace leaml::cpu {
namespace {

#if defined(LEAML_DISPATCH)
// The highest of the x86-64 micro-architecture levels 4, 3 and 2 that runs here.
int level() {
  static const int found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return 4;
    return __builtin_cpu_supports("x86-64-v3") ? 3 : 2;
  }();
  return found;
}
#endif

// --- relevance: explicit vectors of W floats, so that sums stay in registers --------------------------------------------

template <int W>
struct Vec {
  typedef float f32 __attribute__((vector_size(4 * W)));
  typedef uint32_t u32 __attribute__((vector_size(4 * W)));
};

// kLanes elements as kLanes / W vectors. bf16 comes in pairs within a 32-bit word: even elements fill the first half of
// the lanes, odd ones the second (see `lane`).
// Arrays of vectors are filled one vector at a time: a memcpy over the whole array would keep it out of registers.
template <class F>
LEAML_HD void get(const float* p, F* out) {
#pragma GCC unroll 8
  for (int k = 0; k < int(4 * kLanes / sizeof(F)); ++k) {
    F x;
    memcpy(&x, p + k * (sizeof(F) / 4), sizeof(F));
    out[k] = x;
  }
}

template <class F>
LEAML_HD void put(const F* values, float* p) {
#pragma GCC unroll 8
  for (int k = 0; k < int(4 * kLanes / sizeof(F)); ++k) {
    const F x = values[k];
    memcpy(p + k * (sizeof(F) / 4), &x, sizeof(F));
  }
}

template <int W>
LEAML_HD void load_lanes(const float* p, typename Vec<W>::f32* out) {
  get(p, out);
}

template <int W>
LEAML_HD void load_lanes(const bf16* p, typename Vec<W>::f32* out) {
  typedef typename Vec<W>::u32 U;
  typedef typename Vec<W>::f32 F;
  constexpr int half = kLanes / W / 2;
#pragma GCC unroll 4
  for (int k = 0; k < half; ++k) {
    U words;
    memcpy(&words, p + 2 * W * k, sizeof(U));
    out[k] = (F)(words << 16);
    out[half + k] = (F)(words & 0xffff0000u);
  }
}

template <class U, class F>
LEAML_HD F halves(U x) {  // to_float(fp16), one in each word
  const U magnitude = (x & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u, rebased = magnitude + 0x38000000u;
  const F subnormal = (F)(rebased + 0x00800000u) - (F)(U{} + 0x38800000u);
  U u = exponent == 0x0f800000u ? rebased + 0x38000000u : rebased;
  u = exponent == 0u ? (U)subnormal : u;
  return (F)(u | ((x & 0x8000u) << 16));
}

template <int W>
LEAML_HD void load_lanes(const fp16* p, typename Vec<W>::f32* out) {
  typedef typename Vec<W>::u32 U;
  typedef typename Vec<W>::f32 F;
  typedef uint16_t H __attribute__((vector_size(2 * W)));
#pragma GCC unroll 8
  for (int k = 0; k < kLanes / W; ++k) {
    H raw;
    memcpy(&raw, p + W * k, sizeof(H));
    out[k] = halves<U, F>(__builtin_convertvector(raw, U));
  }
}

// Which lane the i-th of kLanes elements belongs to.
LEAML_HD int lane(const bf16*, int i) { return i / 2 + (i % 2) * (kLanes / 2); }
LEAML_HD int lane(const void*, int i) { return i; }

template <int W, bool Absolute, class A, class B>
LEAML_HD void relevance_body(const A* w, const B* g, int64_t n, Lanes& lanes) {
  typedef typename Vec<W>::u32 U;
  typedef typename Vec<W>::f32 F;
  constexpr int vectors = kLanes / W;
  F wg[vectors], abs_wg[vectors], gg[vectors];
  get(lanes.wg, wg), get(lanes.gg, gg);
  if constexpr (Absolute) get(lanes.abs_wg, abs_wg);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F a[vectors], b[vectors];
    if constexpr (sizeof(A) == sizeof(B)) {
      load_lanes<W>(w + i, a);
      load_lanes<W>(g + i, b);
    } else {  // a half weight and an fp32 gradient: the weight in the gradient's order
      float wide[kLanes];
      for (int k = 0; k < kLanes; ++k) wide[k] = to_float(w[i + k]);
      get(wide, a);
      load_lanes<W>(g + i, b);
    }
#pragma GCC unroll 8
    for (int k = 0; k < vectors; ++k) {
      const F p = a[k] * b[k];
      wg[k] += p;
      if constexpr (Absolute) abs_wg[k] += (F)((U)p & 0x7fffffffu);
      gg[k] += b[k] * b[k];
    }
  }
  put(wg, lanes.wg), put(gg, lanes.gg);
  if constexpr (Absolute) put(abs_wg, lanes.abs_wg);
  for (int k = 0; i < n; ++i, ++k) {
    const float a = to_float(w[i]), b = to_float(g[i]), p = a * b;
    const int j = lane(g, k);
    lanes.wg[j] += p;
    if constexpr (Absolute) lanes.abs_wg[j] += fabsf(p);
    lanes.gg[j] += b * b;
  }
}

#if defined(LEAML_DISPATCH)
// fp16 in hardware. The twins of these are load_lanes<W>(const fp16*) and load_body / store_body.
#define LEAML_V3 __attribute__((target("arch=x86-64-v3")))
#define LEAML_V4 __attribute__((target("arch=x86-64-v4")))

LEAML_V3 void relevance_f16_v3(const fp16* w, const fp16* g, int64_t n, Lanes& lanes) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 wg[4], aw[4], gg[4];
  get(lanes.wg, wg), get(lanes.abs_wg, aw), get(lanes.gg, gg);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m256 a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i + 8 * k)));
      const __m256 b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g + i + 8 * k)));
      const __m256 p = _mm256_mul_ps(a, b);
      wg[k] = _mm256_add_ps(wg[k], p);
      aw[k] = _mm256_add_ps(aw[k], _mm256_and_ps(p, magnitude));
      gg[k] = _mm256_add_ps(gg[k], _mm256_mul_ps(b, b));
    }
  }
  put(wg, lanes.wg), put(aw, lanes.abs_wg), put(gg, lanes.gg);
  for (int k = 0; i < n; ++i, ++k) {
    const float a = to_float(w[i]), b = to_float(g[i]), p = a * b;
    lanes.wg[k] += p;
    lanes.abs_wg[k] += fabsf(p);
    lanes.gg[k] += b * b;
  }
}

LEAML_V4 void relevance_f16_v4(const fp16* w, const fp16* g, int64_t n, Lanes& lanes) {
  __m512 wg[2], aw[2], gg[2];
  get(lanes.wg, wg), get(lanes.abs_wg, aw), get(lanes.gg, gg);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m512 a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i + 16 * k)));
      const __m512 b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(g + i + 16 * k)));
      const __m512 p = _mm512_mul_ps(a, b);
      wg[k] = _mm512_add_ps(wg[k], p);
      aw[k] = _mm512_add_ps(aw[k], _mm512_abs_ps(p));
      gg[k] = _mm512_add_ps(gg[k], _mm512_mul_ps(b, b));
    }
  }
  put(wg, lanes.wg), put(aw, lanes.abs_wg), put(gg, lanes.gg);
  for (int k = 0; i < n; ++i, ++k) {
    const float a = to_float(w[i]), b = to_float(g[i]), p = a * b;
    lanes.wg[k] += p;
    lanes.abs_wg[k] += fabsf(p);
    lanes.gg[k] += b * b;
  }
}

LEAML_V3 void load_f16_v3(const fp16* source, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  for (; i < n; ++i) out[i] = to_float(source[i]);
}

LEAML_V3 void store_f16_v3(const float* values, int64_t n, fp16* target) {
  const __m256 canonical = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));  // the one NaN that from_float makes
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(values + i);
    const __m256 y = _mm256_blendv_ps(x, canonical, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) from_float(values[i], target[i]);
}

#define LEAML_RELEVANCE_FOR(name, A, B, absolute) \
  LEAML_V4 void name##_v4(const void* w, const void* g, int64_t n, Lanes& lanes) { \
    relevance_body<16, absolute>(static_cast<const A*>(w), static_cast<const B*>(g), n, lanes); \
  } \
  LEAML_V3 void name##_v3(const void* w, const void* g, int64_t n, Lanes& lanes) { \
    relevance_body<8, absolute>(static_cast<const A*>(w), static_cast<const B*>(g), n, lanes); \
  } \
  void name##_v2(const void* w, const void* g, int64_t n, Lanes& lanes) { \
    relevance_body<4, absolute>(static_cast<const A*>(w), static_cast<const B*>(g), n, lanes); \
  } \
  void name(const void* w, const void* g, int64_t n, Lanes& lanes) { \
    level() == 4 ? name##_v4(w, g, n, lanes) : level() == 3 ? name##_v3(w, g, n, lanes) : name##_v2(w, g, n, lanes); \
  }
#else
#define LEAML_RELEVANCE_FOR(name, A, B, absolute) \
  void name(const void* w, const void* g, int64_t n, Lanes& lanes) { \
    relevance_body<4, absolute>(static_cast<const A*>(w), static_cast<const B*>(g), n, lanes); \
  }
#endif
#define LEAML_RELEVANCE(name, A, B) \
  LEAML_RELEVANCE_FOR(name##_signed, A, B, false) \
  LEAML_RELEVANCE_FOR(name##_both, A, B, true) \
  void name(const void* w, const void* g, int64_t n, bool absolute, Lanes& lanes) { \
    absolute ? name##_both(w, g, n, lanes) : name##_signed(w, g, n, lanes); \
  }
LEAML_RELEVANCE(relevance_f32_f32, float, float)
LEAML_RELEVANCE(relevance_bf16_bf16, bf16, bf16)
LEAML_RELEVANCE(relevance_f16_f16, fp16, fp16)
LEAML_RELEVANCE(relevance_bf16_f32, bf16, float)
LEAML_RELEVANCE(relevance_f16_f32, fp16, float)

// --- element-wise loops ----------------------------------------------------------------------------------------------

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
                              int64_t n, float unscale, float factor, const Hyper* hyper, const RowCoefficients* row,
                              Ahead ahead) {
  const Hyper h = *hyper;
  const RowCoefficients c = *row;
  constexpr int64_t chunk = 64;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    // a few lines at a time: a burst would stall on the processor's line buffers
    if (ahead.w) {
      for (int64_t i = 0; i < chunk * ahead.w_bytes; i += 64) __builtin_prefetch(ahead.w + begin * ahead.w_bytes + i);
      for (int64_t i = 0; i < chunk * ahead.g_bytes; i += 64) __builtin_prefetch(ahead.g + begin * ahead.g_bytes + i);
    }
    if (ahead.m) {
      for (int64_t i = 0; i < chunk; i += 16) __builtin_prefetch(ahead.m + begin + i);
      for (int64_t i = 0; i < chunk; i += 16) __builtin_prefetch(ahead.v + begin + i);
    }
    const int64_t end = begin + chunk < n ? begin + chunk : n;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) adamw_element(w[i], (g[i] * unscale) * factor, m[i], v[i], h, c);
  }
}

template <bool Stochastic, class W, class G>
LEAML_HD void step_row_body(W* __restrict w, const G* __restrict g, float* __restrict m, float* __restrict v, int32_t n,
                            float unscale, float factor, const Hyper& h, const RowCoefficients& c, const Ahead& next,
                            uint32_t key) {
  constexpr int32_t chunk = 64, distance = 512;
  const int32_t lead = n < distance ? n : distance;
  for (int32_t begin = 0; begin < n; begin += chunk) {
    // What is needed `distance` elements later, in this row or the next, which lies far away in memory: no hardware
    // prefetcher finds it. A few lines at a time: a burst would stall on the processor's line buffers.
    const bool own = begin + lead < n;
    const int32_t at = own ? begin + lead : begin + lead - n;
    const W* ahead_w = own ? w : reinterpret_cast<const W*>(next.w);
    const G* ahead_g = own ? g : reinterpret_cast<const G*>(next.g);
    const float *ahead_m = own ? m : next.m, *ahead_v = own ? v : next.v;
    if (ahead_w) {
      for (int32_t i = 0; i < chunk; i += 64 / int32_t(sizeof(W))) __builtin_prefetch(ahead_w + at + i);
      for (int32_t i = 0; i < chunk; i += 64 / int32_t(sizeof(G))) __builtin_prefetch(ahead_g + at + i);
      for (int32_t i = 0; i < chunk; i += 16) __builtin_prefetch(ahead_m + at + i);
      for (int32_t i = 0; i < chunk; i += 16) __builtin_prefetch(ahead_v + at + i);
    }
    const int32_t end = begin + chunk < n ? begin + chunk : n;
#pragma omp simd
    for (int32_t i = begin; i < end; ++i) {
      float value = to_float(w[i]);
      adamw_element(value, (to_float(g[i]) * unscale) * factor, m[i], v[i], h, c);
      if constexpr (Stochastic)
        round_stochastically(value, random_bits(key, uint32_t(i), kWeightStream), w[i]);
      else
        from_float(value, w[i]);
    }
  }
}

#define LEAML_STEP_ROW(name, W, G, stochastic) \
  LEAML_CLONES void name(void* w, const void* g, float* m, float* v, int32_t n, float unscale, float factor, \
                         const Hyper* hyper, const RowCoefficients* row, const Ahead* next, uint32_t key) { \
    const Hyper h = *hyper; \
    const RowCoefficients c = *row; \
    const Ahead a = *next; \
    step_row_body<stochastic>(static_cast<W*>(w), static_cast<const G*>(g), m, v, n, unscale, factor, h, c, a, key); \
  }
LEAML_STEP_ROW(step_f32_f32, float, float, false)
LEAML_STEP_ROW(step_bf16_bf16, bf16, bf16, false)
LEAML_STEP_ROW(step_bf16_bf16_stochastic, bf16, bf16, true)
LEAML_STEP_ROW(step_bf16_f32, bf16, float, false)
LEAML_STEP_ROW(step_bf16_f32_stochastic, bf16, float, true)

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

namespace {
void add_run(const void* w, Type wt, const void* g, Type gt, int64_t n, bool absolute, Lanes& lanes) {
  if (wt == Type::f32) return relevance_f32_f32(w, g, n, absolute, lanes);
  if (wt == Type::bf16)
    return gt == Type::f32 ? relevance_bf16_f32(w, g, n, absolute, lanes) : relevance_bf16_bf16(w, g, n, absolute, lanes);
#if defined(LEAML_DISPATCH)
  if (gt == Type::f16 && level() >= 3) {
    const fp16 *a = static_cast<const fp16*>(w), *b = static_cast<const fp16*>(g);
    return level() == 4 ? relevance_f16_v4(a, b, n, lanes) : relevance_f16_v3(a, b, n, lanes);
  }
#endif
  return gt == Type::f32 ? relevance_f16_f32(w, g, n, absolute, lanes) : relevance_f16_f16(w, g, n, absolute, lanes);
}
}  // namespace

void add_relevance(const void* w, Type wt, const void* g, Type gt, int64_t n, bool absolute, Lanes& lanes) {
  // The hardware keeps up with a stream inside a page and stops at its end: the next pages are touched in time, their
  // translation first. More software prefetching than that makes it slower.
  const int64_t wb = wt == Type::f32 ? 4 : 2, gb = gt == Type::f32 ? 4 : 2;
  const int64_t run = 4096 / (wb > gb ? wb : gb);
  const char *a = static_cast<const char*>(w), *b = static_cast<const char*>(g);
  for (int64_t i = 0; i < n; i += run) {
    __builtin_prefetch(a + (i + 2 * run) * wb);
    __builtin_prefetch(b + (i + 2 * run) * gb);
    __builtin_prefetch(a + (i + run) * wb + 64);
    __builtin_prefetch(b + (i + run) * gb + 64);
    add_run(a + i * wb, wt, b + i * gb, gt, n - i < run ? n - i : run, absolute, lanes);
  }
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
#if defined(LEAML_DISPATCH)
  if (stride == 1 && level() >= 3) return load_f16_v3(static_cast<const fp16*>(source), n, out);
#endif
  load_f16(source, stride, n, out);
}

void store(const float* values, int64_t n, void* target, Type type, int64_t stride) {
  if (type == Type::f32) return store_f32(values, n, target, stride);
  if (type == Type::bf16) return store_bf16(values, n, target, stride);
#if defined(LEAML_DISPATCH)
  if (stride == 1 && level() >= 3) return store_f16_v3(values, n, static_cast<fp16*>(target));
#endif
  store_f16(values, n, target, stride);
}

void store_stochastic(const float* values, int64_t n, void* target, Type type, int64_t stride, uint32_t key,
                      int64_t column) {
  if (type == Type::f32) return stochastic_f32(values, n, target, stride, key, uint32_t(column));
  if (type == Type::bf16) return stochastic_bf16(values, n, target, stride, key, uint32_t(column));
  stochastic_f16(values, n, target, stride, key, uint32_t(column));
}

void step(float* w, const float* g, float* m, float* v, int64_t n, float unscale, float factor, const Hyper& h,
          const RowCoefficients& c, const Ahead& ahead) {
  step_clones(w, g, m, v, n, unscale, factor, &h, &c, ahead);
}

void step_row(void* w, Type wt, const void* g, Type gt, float* m, float* v, int64_t n, float unscale, float factor,
              const Hyper& h, const RowCoefficients& c, const Ahead& next, bool stochastic, uint32_t key) {
  const auto run = wt == Type::f32   ? step_f32_f32
                   : gt == Type::f32 ? (stochastic ? step_bf16_f32_stochastic : step_bf16_f32)
                                     : (stochastic ? step_bf16_bf16_stochastic : step_bf16_bf16);
  run(w, g, m, v, int32_t(n), unscale, factor, &h, &c, &next, key);
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
