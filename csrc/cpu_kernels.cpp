// Vectorised inner loops of the CPU path, compiled for three instruction sets and chosen when the library is loaded.
//
// Every loop is either element-wise or sums into kLanes explicit lanes, and floating-point contraction is off, so all
// instruction sets give the same bits.
#include "cpu_kernels.h"

// GCC 12 is the first to know the levels by name; other compilers build the loops of the baseline.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(LEAML_NO_DISPATCH)
#define LEAML_DISPATCH
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // a false alarm inside GCC 12's own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
// Clones are resolved while the library is being loaded, before a sanitizer is up: its builds go without.
#if defined(LEAML_DISPATCH) && !defined(LEAML_NO_CLONES)
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
    const int own = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 2;
#if defined(LEAML_LEVEL)  // for the tests: at most this one
    return own < LEAML_LEVEL ? own : LEAML_LEVEL;
#endif
    return own;
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

// The upper half of the lanes joins the lower until one is left. In vectors: lane by lane it costs as much as half a row.
LEAML_HD float tree(const float* x) {
  typedef float F __attribute__((vector_size(16)));
  F v[kLanes / 4];
  memcpy(v, x, sizeof(v));
#pragma GCC unroll 4
  for (int width = kLanes / 8; width > 0; width /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return (v[0][0] + v[0][2]) + (v[0][1] + v[0][3]);
}

LEAML_HD Sums total_of(const Lanes& lanes, bool absolute) {
  return {tree(lanes.wg), absolute ? tree(lanes.abs_wg) : 0.0f, tree(lanes.gg)};
}

// Elements of one page of the wider of two types.
template <class A, class B>
constexpr int64_t kPage = 4096 / int64_t(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// The hardware keeps up with a stream inside a page and stops at its end: the next pages are touched in time, their
// translation first. More software prefetching than that makes it slower.
template <class A, class B>
LEAML_HD void touch_next_pages(const A* w, const B* g) {
  __builtin_prefetch(w + 2 * kPage<A, B>);
  __builtin_prefetch(g + 2 * kPage<A, B>);
  __builtin_prefetch(reinterpret_cast<const char*>(w + kPage<A, B>) + 64);
  __builtin_prefetch(reinterpret_cast<const char*>(g + kPage<A, B>) + 64);
}

// The elements [i, n) that fill no more than a part of the lanes.
template <bool Absolute, class A, class B>
LEAML_HD void add_rest(const A* w, const B* g, int64_t i, int64_t n, Lanes& lanes) {
  for (int k = 0; i < n; ++i, ++k) {
    const float a = to_float(w[i]), b = to_float(g[i]), p = a * b;
    const int j = lane(g, k);
    lanes.wg[j] += p;
    if constexpr (Absolute) lanes.abs_wg[j] += fabsf(p);
    lanes.gg[j] += b * b;
  }
}

// Adds n contiguous elements to the lanes, or to zero where they are `fresh`.
template <int W, bool Absolute, class A, class B>
LEAML_HD void relevance_body(const A* w, const B* g, int64_t n, bool fresh, Lanes& lanes) {
  typedef typename Vec<W>::u32 U;
  typedef typename Vec<W>::f32 F;
  constexpr int vectors = kLanes / W;
  F wg[vectors], abs_wg[vectors], gg[vectors];
#pragma GCC unroll 8
  for (int k = 0; k < vectors; ++k) wg[k] = abs_wg[k] = gg[k] = F{};
  if (!fresh) {
    get(lanes.wg, wg), get(lanes.gg, gg);
    if constexpr (Absolute) get(lanes.abs_wg, abs_wg);
  }
  int64_t i = 0;
  while (i + kLanes <= n) {
    touch_next_pages(w + i, g + i);
    const int64_t stop = n - i < kPage<A, B> ? n : i + kPage<A, B>;
    for (; i + kLanes <= stop; i += kLanes) {
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
  }
  put(wg, lanes.wg), put(gg, lanes.gg);
  if constexpr (Absolute) put(abs_wg, lanes.abs_wg);
  add_rest<Absolute>(w, g, i, n, lanes);
}

// The sums of a whole contiguous row.
template <int W, bool Absolute, class A, class B>
LEAML_HD Sums row_body(const A* w, const B* g, int64_t n) {
  Lanes lanes;
  relevance_body<W, Absolute>(w, g, n, true, lanes);
  return total_of(lanes, Absolute);
}

#if defined(LEAML_DISPATCH)
// Explicit vectors: half types need fewer instructions so, and a compiler does not turn to_float(fp16) into the one that
// there is. The twins of what follows are row_body<W> over fp16, columns_body, load_body / store_body and step_row_body.
#define LEAML_V3 __attribute__((target("arch=x86-64-v3")))
#define LEAML_V4 __attribute__((target("arch=x86-64-v4")))

LEAML_V3 LEAML_HD void widen(const fp16* p, __m256& out) {
  out = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LEAML_V4 LEAML_HD void widen(const fp16* p, __m512& out) {
  out = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LEAML_V3 LEAML_HD void widen(const float* p, __m256& out) { out = _mm256_loadu_ps(p); }
LEAML_V4 LEAML_HD void widen(const float* p, __m512& out) { out = _mm512_loadu_ps(p); }
LEAML_V3 LEAML_HD void widen(const bf16* p, __m256& out) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  out = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
LEAML_V4 LEAML_HD void widen(const bf16* p, __m512& out) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  out = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
// Two vectors from one load: a cache line that is touched twice may be gone in between, where rows that lie a power of two
// apart crowd the same few places of the cache.
LEAML_V3 LEAML_HD void widen_pair(const bf16* p, __m256* out) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), 16));
  out[1] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)), 16));
}
LEAML_V4 LEAML_HD void widen_pair(const bf16* p, __m512* out) {
  const __m512i x = _mm512_loadu_si512(p);
  out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
  out[1] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}
LEAML_V3 LEAML_HD void widen_pair(const fp16* p, __m256* out) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(x)), out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
}
LEAML_V4 LEAML_HD void widen_pair(const fp16* p, __m512* out) {
  const __m512i x = _mm512_loadu_si512(p);
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(x)), out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
}
LEAML_V3 LEAML_HD void widen_pair(const float* p, __m256* out) { widen(p, out[0]), widen(p + 8, out[1]); }
LEAML_V4 LEAML_HD void widen_pair(const float* p, __m512* out) { widen(p, out[0]), widen(p + 16, out[1]); }
// NaN becomes the one that from_float makes: of its sign, which tells nothing, but bits shall not depend on the path.
LEAML_V3 LEAML_HD void narrow(const __m256& x, fp16* p) {
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
  const __m256 canonical = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
  const __m256 y = _mm256_blendv_ps(x, canonical, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
}
LEAML_V4 LEAML_HD void narrow(const __m512& x, fp16* p) {
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  const __m512 canonical = _mm512_or_ps(sign, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  const __m512 y = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x, canonical);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
}
LEAML_V3 LEAML_HD void narrow(const __m256& x, bf16* p) {
  const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 y = _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_srli_epi32(sum, 16)),
                                    _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i z = _mm256_castps_si256(y);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(z), _mm256_extracti128_si256(z, 1)));
}
LEAML_V4 LEAML_HD void narrow(const __m512& x, bf16* p) {
  const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i y = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                          _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(y));
}
LEAML_V3 LEAML_HD void narrow(const __m256& x, float* p) { _mm256_storeu_ps(p, x); }
LEAML_V4 LEAML_HD void narrow(const __m512& x, float* p) { _mm512_storeu_ps(p, x); }
LEAML_V3 LEAML_HD void root(const __m256& x, __m256& out) { out = _mm256_sqrt_ps(x); }
LEAML_V4 LEAML_HD void root(const __m512& x, __m512& out) { out = _mm512_sqrt_ps(x); }
LEAML_V3 LEAML_HD void magnitude(const __m256& x, __m256& out) {
  out = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}
LEAML_V4 LEAML_HD void magnitude(const __m512& x, __m512& out) { out = _mm512_abs_ps(x); }

#define LEAML_RELEVANCE_F16(name, target, F) \
  template <bool Absolute> \
  target Sums name(const void* weights, const void* grads, int64_t n) { \
    const fp16 *w = static_cast<const fp16*>(weights), *g = static_cast<const fp16*>(grads); \
    constexpr int width = sizeof(F) / 4, vectors = kLanes / width; \
    Lanes lanes; \
    F wg[vectors], abs_wg[vectors], gg[vectors]; \
    for (int k = 0; k < vectors; ++k) wg[k] = abs_wg[k] = gg[k] = F{}; \
    int64_t i = 0; \
    while (i + kLanes <= n) { \
      touch_next_pages(w + i, g + i); \
      const int64_t stop = n - i < kPage<fp16, fp16> ? n : i + kPage<fp16, fp16>; \
      for (; i + kLanes <= stop; i += kLanes) { \
        _Pragma("GCC unroll 4") for (int k = 0; k < vectors; ++k) { \
          F a, b, size; \
          widen(w + i + width * k, a), widen(g + i + width * k, b); \
          const F p = a * b; \
          wg[k] += p; \
          if constexpr (Absolute) magnitude(p, size), abs_wg[k] += size; \
          gg[k] += b * b; \
        } \
      } \
    } \
    put(wg, lanes.wg), put(gg, lanes.gg); \
    if constexpr (Absolute) put(abs_wg, lanes.abs_wg); \
    add_rest<Absolute>(w, g, i, n, lanes); \
    return total_of(lanes, Absolute); \
  }
LEAML_RELEVANCE_F16(relevance_f16_v3, LEAML_V3, __m256)
LEAML_RELEVANCE_F16(relevance_f16_v4, LEAML_V4, __m512)

// Intel's cores read four streams faster than two, and faster still where each is asked for kAheadBytes early, line by line;
// AMD's lose by either: a quarter by more streams, a tenth by asking (docs/kernels.md).
bool reads_in_pairs() {
#if defined(LEAML_READ_IN_PAIRS)  // for the tests, on any processor that can
  return level() == 4;
#else
  static const bool found = level() == 4 && __builtin_cpu_is("intel");
  return found;
#endif
}
constexpr int64_t kAheadBytes = 1024;

// kLanes elements as two vectors, in the order of load_lanes<16>.
LEAML_V4 LEAML_HD void lanes_of(const float* p, __m512* out) { widen_pair(p, out); }
LEAML_V4 LEAML_HD void lanes_of(const fp16* p, __m512* out) { widen_pair(p, out); }
LEAML_V4 LEAML_HD void lanes_of(const bf16* p, __m512* out) {
  const __m512i x = _mm512_loadu_si512(p);
  out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  out[1] = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
}

template <bool Absolute, class T>
LEAML_V4 void pair_v4(const void* weights, const void* grads, int64_t w_next, int64_t g_next, int64_t n, Sums* out) {
  constexpr int64_t lead = kAheadBytes / int64_t(sizeof(T));
  const T *w[2], *g[2];
  w[0] = static_cast<const T*>(weights), w[1] = reinterpret_cast<const T*>(static_cast<const char*>(weights) + w_next);
  g[0] = static_cast<const T*>(grads), g[1] = reinterpret_cast<const T*>(static_cast<const char*>(grads) + g_next);
  __m512 wg[2][2], abs_wg[2][2], gg[2][2];
  for (int q = 0; q < 2; ++q)
    for (int k = 0; k < 2; ++k) wg[q][k] = abs_wg[q][k] = gg[q][k] = __m512{};
  int64_t i = 0;
  // up to the last kAheadBytes it is the row itself that is asked for, from there on the row after next
  for (int part = 0; part < 2; ++part) {
    const int64_t stop = part == 0 ? n - lead : n;
    const int64_t w_ahead = kAheadBytes + (part == 0 ? 0 : 2 * w_next - n * int64_t(sizeof(T)));
    const int64_t g_ahead = kAheadBytes + (part == 0 ? 0 : 2 * g_next - n * int64_t(sizeof(T)));
    for (; i + kLanes <= stop; i += kLanes) {
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) {
        const char* next_w = reinterpret_cast<const char*>(w[q] + i) + w_ahead;
        const char* next_g = reinterpret_cast<const char*>(g[q] + i) + g_ahead;
#pragma GCC unroll 2
        for (int line = 0; line < kLanes * int(sizeof(T)); line += 64)
          __builtin_prefetch(next_w + line), __builtin_prefetch(next_g + line);
        __m512 a[2], b[2];
        lanes_of(w[q] + i, a), lanes_of(g[q] + i, b);
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const __m512 p = a[k] * b[k];
          wg[q][k] += p;
          if constexpr (Absolute) abs_wg[q][k] += _mm512_abs_ps(p);
          gg[q][k] += b[k] * b[k];
        }
      }
    }
  }
  for (int q = 0; q < 2; ++q) {
    Lanes lanes;
    put(wg[q], lanes.wg), put(gg[q], lanes.gg);
    if constexpr (Absolute) put(abs_wg[q], lanes.abs_wg);
    add_rest<Absolute>(w[q], g[q], i, n, lanes);
    out[q] = total_of(lanes, Absolute);
  }
}

LEAML_V3 void load_f16_v3(const fp16* source, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 x;
    widen(source + i, x);
    _mm256_storeu_ps(out + i, x);
  }
  for (; i < n; ++i) out[i] = to_float(source[i]);
}

LEAML_V3 void store_f16_v3(const float* values, int64_t n, fp16* target) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) narrow(_mm256_loadu_ps(values + i), target + i);
  for (; i < n; ++i) from_float(values[i], target[i]);
}

#define LEAML_RELEVANCE_FOR(name, target, W, A, B) \
  target Sums name##_signed(const void* w, const void* g, int64_t n) { \
    return row_body<W, false>(static_cast<const A*>(w), static_cast<const B*>(g), n); \
  } \
  target Sums name##_both(const void* w, const void* g, int64_t n) { \
    return row_body<W, true>(static_cast<const A*>(w), static_cast<const B*>(g), n); \
  }
#define LEAML_RELEVANCE(name, A, B) \
  LEAML_RELEVANCE_FOR(name##_v4, LEAML_V4, 16, A, B) \
  LEAML_RELEVANCE_FOR(name##_v3, LEAML_V3, 8, A, B) \
  LEAML_RELEVANCE_FOR(name##_v2, , 4, A, B) \
  RowRelevance name(bool absolute) { \
    if (level() == 4) return absolute ? name##_v4_both : name##_v4_signed; \
    if (level() == 3) return absolute ? name##_v3_both : name##_v3_signed; \
    return absolute ? name##_v2_both : name##_v2_signed; \
  }
#else
#define LEAML_RELEVANCE(name, A, B) \
  Sums name##_signed(const void* w, const void* g, int64_t n) { \
    return row_body<4, false>(static_cast<const A*>(w), static_cast<const B*>(g), n); \
  } \
  Sums name##_both(const void* w, const void* g, int64_t n) { \
    return row_body<4, true>(static_cast<const A*>(w), static_cast<const B*>(g), n); \
  } \
  RowRelevance name(bool absolute) { return absolute ? name##_both : name##_signed; }
#endif
LEAML_RELEVANCE(relevance_f32_f32, float, float)
LEAML_RELEVANCE(relevance_bf16_bf16, bf16, bf16)
LEAML_RELEVANCE(relevance_f16_f16, fp16, fp16)
LEAML_RELEVANCE(relevance_bf16_f32, bf16, float)
LEAML_RELEVANCE(relevance_f16_f32, fp16, float)

// A tile of a strided row, already fp32.
LEAML_CLONES void add_tile(const float* w, const float* g, int64_t n, Lanes& lanes) {
  relevance_body<4, true>(w, g, n, false, lanes);
}

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

// Row by row into the columns' sums.
template <bool Absolute, class A, class B>
LEAML_HD void columns_body(const A* w, const B* g, int64_t w_stride, int64_t g_stride, int64_t rows, int64_t n,
                           const ColumnSums& into) {
  float *__restrict wg = into.wg, *__restrict abs_wg = into.abs_wg, *__restrict gg = into.gg;
  for (int64_t r = 0; r < rows; ++r, w += w_stride, g += g_stride) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float b = to_float(g[i]), p = to_float(w[i]) * b;
      wg[i] += p;
      if constexpr (Absolute) abs_wg[i] += fabsf(p);
      gg[i] += b * b;
    }
  }
}

#if defined(LEAML_DISPATCH)
// The same with the sums in registers for some rows at once. Half types take four rows and fetch the next four line by
// line: widening is what takes time there. fp32 takes one, as memory does: a single stream, which the hardware follows,
// is faster than what can be fetched by hand. But where reads_in_pairs(), it takes two and asks for both early (Pairs).
#define LEAML_COLUMNS(name, target, F) \
  template <bool Absolute, bool Pairs, class A, class B> \
  target void name(const void* weights, const void* grads, int64_t w_stride, int64_t g_stride, int64_t rows, int64_t n, \
                   const ColumnSums* into) { \
    const A* w = static_cast<const A*>(weights); \
    const B* g = static_cast<const B*>(grads); \
    constexpr bool stream = sizeof(A) == 4 && !Pairs; \
    constexpr int width = sizeof(F) / 4, chunk = 2 * width, together = stream ? 1 : Pairs ? 2 : 4; \
    const int64_t w_ahead = Pairs ? kAheadBytes / int64_t(sizeof(A)) : together * w_stride; \
    const int64_t g_ahead = Pairs ? kAheadBytes / int64_t(sizeof(B)) : together * g_stride; \
    int64_t r = 0; \
    for (; r + together <= rows; r += together, w += together * w_stride, g += together * g_stride) { \
      int64_t i = 0; \
      while (i + chunk <= n) { \
        if constexpr (stream) touch_next_pages(w + i, g + i); \
        const int64_t stop = n - i < kPage<A, B> ? n : i + kPage<A, B>; \
        for (; i + chunk <= stop; i += chunk) { \
          F wg[2], abs_wg[2], gg[2]; \
          _Pragma("GCC unroll 2") for (int k = 0; k < 2; ++k) { \
            widen(into->wg + i + width * k, wg[k]), widen(into->gg + i + width * k, gg[k]); \
            if constexpr (Absolute) widen(into->abs_wg + i + width * k, abs_wg[k]); \
          } \
          _Pragma("GCC unroll 4") for (int q = 0; q < together; ++q) { \
            const A* own_w = w + q * w_stride + i; \
            const B* own_g = g + q * g_stride + i; \
            if constexpr (!stream) { \
              _Pragma("GCC unroll 2") for (int k = 0; k < chunk; k += 64 / int(sizeof(A))) \
                __builtin_prefetch(own_w + w_ahead + k); \
              _Pragma("GCC unroll 2") for (int k = 0; k < chunk; k += 64 / int(sizeof(B))) \
                __builtin_prefetch(own_g + g_ahead + k); \
            } \
            F a[2], b[2], size; \
            widen_pair(own_w, a), widen_pair(own_g, b); \
            _Pragma("GCC unroll 2") for (int k = 0; k < 2; ++k) { \
              const F p = a[k] * b[k]; \
              wg[k] += p; \
              if constexpr (Absolute) magnitude(p, size), abs_wg[k] += size; \
              gg[k] += b[k] * b[k]; \
            } \
          } \
          _Pragma("GCC unroll 2") for (int k = 0; k < 2; ++k) { \
            memcpy(into->wg + i + width * k, &wg[k], sizeof(F)), memcpy(into->gg + i + width * k, &gg[k], sizeof(F)); \
            if constexpr (Absolute) memcpy(into->abs_wg + i + width * k, &abs_wg[k], sizeof(F)); \
          } \
        } \
      } \
      const ColumnSums rest{into->wg + i, into->abs_wg + i, into->gg + i}; \
      columns_body<Absolute>(w + i, g + i, w_stride, g_stride, together, n - i, rest); \
    } \
    columns_body<Absolute>(w, g, w_stride, g_stride, rows - r, n, *into); \
  }
LEAML_COLUMNS(columns_v3, LEAML_V3, __m256)
LEAML_COLUMNS(columns_v4, LEAML_V4, __m512)
#endif

template <bool Absolute, class A, class B>
void columns_v2(const void* w, const void* g, int64_t w_stride, int64_t g_stride, int64_t rows, int64_t n,
                const ColumnSums* into) {
  columns_body<Absolute>(static_cast<const A*>(w), static_cast<const B*>(g), w_stride, g_stride, rows, n, *into);
}

template <class A, class B>
AddColumns columns(bool absolute) {
#if defined(LEAML_DISPATCH)
  if constexpr (sizeof(A) == 4)
    if (reads_in_pairs()) return absolute ? columns_v4<true, true, A, B> : columns_v4<false, true, A, B>;
  if (level() == 4) return absolute ? columns_v4<true, false, A, B> : columns_v4<false, false, A, B>;
  if (level() == 3) return absolute ? columns_v3<true, false, A, B> : columns_v3<false, false, A, B>;
#endif
  return absolute ? columns_v2<true, A, B> : columns_v2<false, A, B>;
}

constexpr int32_t kChunk = 64, kDistance = 512;  // elements stepped at once, and how far ahead is fetched

LEAML_CLONES void step_clones(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                              int64_t n, float unscale, float factor, const Hyper* hyper, const RowCoefficients* row,
                              Ahead ahead) {
  const Hyper h = *hyper;
  const RowCoefficients c = *row;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    // a few lines at a time: a burst would stall on the processor's line buffers
    if (ahead.w) {
      for (int64_t i = 0; i < kChunk * ahead.w_bytes; i += 64) __builtin_prefetch(ahead.w + begin * ahead.w_bytes + i);
      for (int64_t i = 0; i < kChunk * ahead.g_bytes; i += 64) __builtin_prefetch(ahead.g + begin * ahead.g_bytes + i);
    }
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) adamw_element(w[i], (g[i] * unscale) * factor, m[i], v[i], h, c);
  }
}

// Fetches what is needed kDistance elements after `begin`, in this row or the next, which lies far away in memory: no
// hardware prefetcher finds it. A chunk at a time: a burst would stall on the processor's line buffers.
template <class W, class G>
LEAML_HD void prefetch_ahead(const W* w, const G* g, const float* m, const float* v, const float* master, int32_t begin,
                             int32_t n, const Ahead& next) {
  const int32_t lead = n < kDistance ? n : kDistance;
  const bool own = begin + lead < n;
  const int32_t at = own ? begin + lead : begin + lead - n;
  const W* ahead_w = own ? w : reinterpret_cast<const W*>(next.w);
  const G* ahead_g = own ? g : reinterpret_cast<const G*>(next.g);
  // a row's state and master are followed by the next row's
  const int64_t flat = int64_t(begin) + lead;
  if (ahead_w) {
    for (int32_t i = 0; i < kChunk; i += 64 / int32_t(sizeof(W))) __builtin_prefetch(ahead_w + at + i);
    for (int32_t i = 0; i < kChunk; i += 64 / int32_t(sizeof(G))) __builtin_prefetch(ahead_g + at + i);
  }
  for (int32_t i = 0; i < kChunk; i += 16) __builtin_prefetch(m + flat + i);
  for (int32_t i = 0; i < kChunk; i += 16) __builtin_prefetch(v + flat + i);
  if (master)
    for (int32_t i = 0; i < kChunk; i += 16) __builtin_prefetch(master + flat + i);
}

template <Keep keep, class W, class G>
LEAML_HD void step_element(W& w, const G& g, float& m, float& v, float* master, float unscale, float factor,
                           const Hyper& h, const RowCoefficients& c, uint32_t key, int32_t column) {
  float value = keep == Keep::master ? *master : to_float(w);
  adamw_element(value, (to_float(g) * unscale) * factor, m, v, h, c);
  if constexpr (keep == Keep::master) *master = value;
  if constexpr (keep == Keep::stochastic)
    round_stochastically(value, random_bits(key, uint32_t(column), kWeightStream), w);
  else
    from_float(value, w);
}

template <Keep keep, class W, class G>
LEAML_HD void step_row_body(W* __restrict w, const G* __restrict g, float* __restrict m, float* __restrict v,
                            float* __restrict master, int32_t n, float unscale, float factor, const Hyper& h,
                            const RowCoefficients& c, const Ahead& next, uint32_t key) {
  for (int32_t begin = 0; begin < n; begin += kChunk) {
    prefetch_ahead(w, g, m, v, keep == Keep::master ? master : nullptr, begin, n, next);
    const int32_t end = begin + kChunk < n ? begin + kChunk : n;
#pragma omp simd
    for (int32_t i = begin; i < end; ++i)
      step_element<keep>(w[i], g[i], m[i], v[i], keep == Keep::master ? master + i : nullptr, unscale, factor, h, c, key,
                         i);
  }
}

#define LEAML_STEP_ARGUMENTS \
  void *w, const void *g, float *m, float *v, float *master, int32_t n, float unscale, float factor, const Hyper *hyper, \
      const RowCoefficients *row, const Ahead *next, uint32_t key
// On any processor.
template <Keep keep, class W, class G>
void step_v2(LEAML_STEP_ARGUMENTS) {
  step_row_body<keep>(static_cast<W*>(w), static_cast<const G*>(g), m, v, master, n, unscale, factor, *hyper, *row, *next,
                      key);
}

#if defined(LEAML_DISPATCH)
// The same in explicit vectors: a compiler takes more instructions for the half types, and none of those for fp16.
#define LEAML_STEP(name, target, F) \
  template <Keep keep, class W, class G> \
  target void name(LEAML_STEP_ARGUMENTS) { \
    const Hyper h = *hyper; \
    const RowCoefficients c = *row; \
    const Ahead ahead = *next; \
    W* weights = static_cast<W*>(w); \
    const G* grads = static_cast<const G*>(g); \
    constexpr int32_t width = sizeof(F) / 4; \
    for (int32_t begin = 0; begin < n; begin += kChunk) { \
      prefetch_ahead(weights, grads, m, v, keep == Keep::master ? master : nullptr, begin, n, ahead); \
      const int32_t end = begin + kChunk < n ? begin + kChunk : n; \
      float values[kChunk]; \
      int32_t i = begin; \
      for (; i + width <= end; i += width) { \
        F value, grad, mean, square, deviation; \
        if constexpr (keep == Keep::master) \
          widen(master + i, value); \
        else \
          widen(weights + i, value); \
        widen(grads + i, grad), widen(m + i, mean), widen(v + i, square); \
        grad = (grad * unscale) * factor; \
        adamw_moments(grad, mean, square, h); \
        root(square, deviation); \
        adamw_weight(value, mean, deviation, h, c); \
        memcpy(m + i, &mean, sizeof(F)), memcpy(v + i, &square, sizeof(F)); \
        if constexpr (keep == Keep::master) memcpy(master + i, &value, sizeof(F)); \
        if constexpr (keep == Keep::stochastic) \
          memcpy(values + (i - begin), &value, sizeof(F)); \
        else \
          narrow(value, weights + i); \
      } \
      if constexpr (keep == Keep::stochastic) \
        stochastic_body(values, i - begin, weights + begin, 1, key, uint32_t(begin)); \
      for (; i < end; ++i) \
        step_element<keep>(weights[i], grads[i], m[i], v[i], keep == Keep::master ? master + i : nullptr, unscale, factor, \
                           h, c, key, i); \
    } \
  }
LEAML_STEP(step_v3, LEAML_V3, __m256)
LEAML_STEP(step_v4, LEAML_V4, __m512)
#endif

template <Keep keep, class W, class G>
StepRow step_of() {
#if defined(LEAML_DISPATCH)
  if (level() == 4) return step_v4<keep, W, G>;
  if (level() == 3) return step_v3<keep, W, G>;
#endif
  return step_v2<keep, W, G>;
}

template <class W, class G>
StepRow step_of(Keep keep) {
  if (keep == Keep::master) return step_of<Keep::master, W, G>();
  return keep == Keep::stochastic ? step_of<Keep::stochastic, W, G>() : step_of<Keep::nearest, W, G>();
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
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = float_bits(values[i]) & 0x7fffffffu;  // second moments are never negative
    largest = u > largest ? u : largest;
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

void add_relevance(const float* w, const float* g, int64_t n, Lanes& lanes) { add_tile(w, g, n, lanes); }

RowRelevance row_relevance(Type wt, Type gt, bool absolute) {
  if (wt == Type::f32) return relevance_f32_f32(absolute);
  if (wt == Type::bf16) return gt == Type::f32 ? relevance_bf16_f32(absolute) : relevance_bf16_bf16(absolute);
#if defined(LEAML_DISPATCH)
  if (gt == Type::f16 && level() == 4) return absolute ? relevance_f16_v4<true> : relevance_f16_v4<false>;
  if (gt == Type::f16 && level() == 3) return absolute ? relevance_f16_v3<true> : relevance_f16_v3<false>;
#endif
  return gt == Type::f32 ? relevance_f16_f32(absolute) : relevance_f16_f16(absolute);
}

PairRelevance pair_relevance(Type wt, Type gt, bool absolute) {
#if defined(LEAML_DISPATCH)
  if (wt != gt || !reads_in_pairs()) return nullptr;
  if (wt == Type::f32) return absolute ? pair_v4<true, float> : pair_v4<false, float>;
  if (wt == Type::bf16) return absolute ? pair_v4<true, bf16> : pair_v4<false, bf16>;
  return absolute ? pair_v4<true, fp16> : pair_v4<false, fp16>;
#else
  return nullptr;
#endif
}

Sums total(const Lanes& lanes) { return total_of(lanes, true); }

AddColumns add_columns(Type wt, Type gt, bool absolute) {
  if (wt == Type::f32) return columns<float, float>(absolute);
  if (wt == Type::bf16) return gt == Type::f32 ? columns<bf16, float>(absolute) : columns<bf16, bf16>(absolute);
  return gt == Type::f32 ? columns<fp16, float>(absolute) : columns<fp16, fp16>(absolute);
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

StepRow step_row(Type wt, Type gt, Keep keep) {
  if (gt != wt && gt != Type::f32) return nullptr;
  if (wt == Type::f32) return keep == Keep::master ? nullptr : step_of<Keep::nearest, float, float>();
  if (wt == Type::bf16) return gt == wt ? step_of<bf16, bf16>(keep) : step_of<bf16, float>(keep);
  return gt == wt ? step_of<fp16, fp16>(keep) : step_of<fp16, float>(keep);
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
