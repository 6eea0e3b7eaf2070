// Vectorised inner loops of the CPU path. No torch type crosses this header.
#pragma once

#include "numerics.h"

namespace leaml::cpu {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int kLanes = 32;  // partial sums of a row reduction: fixed, so that no vector width changes a result
constexpr int kTile = 512;   // elements a step handles at once; a multiple of kBlock and of kLanes

// 3 x kLanes partial sums: w*g, |w*g|, g*g. Which element joins which lane depends on its position, on the dtypes and on
// whether the row is contiguous: not on the instruction set.
struct Lanes {
  alignas(64) float wg[kLanes], abs_wg[kLanes], gg[kLanes];
};

// Adds n contiguous elements, the first of which belongs to lane 0.
void add_relevance(const float* w, const float* g, int64_t n, Lanes& lanes);
// The fixed-order total of the lanes.
Sums total(const Lanes& lanes);
// The same for a whole contiguous row of n elements at once: the function for these types. abs_wg only where `absolute`.
using RowRelevance = Sums (*)(const void* w, const void* g, int64_t n);
RowRelevance row_relevance(Type wt, Type gt, bool absolute);
// The same for two rows at once, row_relevance's bits for each; w_next and g_next (in bytes) lead to the second row, and
// from there to what is likely read next. Null where one row at a time is as fast on this processor.
using PairRelevance = void (*)(const void* w, const void* g, int64_t w_next, int64_t g_next, int64_t n, Sums* out);
PairRelevance pair_relevance(Type wt, Type gt, bool absolute);
// Sums of n columns; abs_wg is used only where it was asked for.
struct ColumnSums {
  float *wg, *abs_wg, *gg;
};
// Adds `rows` rows of n adjacent columns, the strides (in elements) apart, to the sums, in the order of the rows: the
// function for these types.
using AddColumns = void (*)(const void* w, const void* g, int64_t w_stride, int64_t g_stride, int64_t rows, int64_t n,
                            const ColumnSums* into);
AddColumns add_columns(Type wt, Type gt, bool absolute);

// n elements, `stride` elements apart, to contiguous fp32 and back.
void load(const void* source, Type type, int64_t stride, int64_t n, float* out);
void store(const float* values, int64_t n, void* target, Type type, int64_t stride);
void store_stochastic(const float* values, int64_t n, void* target, Type type, int64_t stride, uint32_t key, int64_t column);

// What will be read next: prefetched along the way. Null where nobody knows.
struct Ahead {
  const char *w = nullptr, *g = nullptr;
  int64_t w_bytes = 0, g_bytes = 0;  // of an element
};

// One AdamW step of n <= kTile elements. The gradient is multiplied by `unscale`, then by `factor`.
void step(float* w, const float* g, float* m, float* v, int64_t n, float unscale, float factor, const Hyper& h,
          const RowCoefficients& c, const Ahead& ahead);

// How a half-precision weight keeps what a step adds to it: rounded to nearest, stochastically, or in an fp32 master.
enum class Keep : int { nearest = 0, stochastic = 1, master = 2 };

// One AdamW step of a whole contiguous row in place, with fp32 state: nothing passes through buffers. `master` is the row
// of fp32 masters (null but for Keep::master), `next` the row to come (null: not far) with its state, which follows this
// row's. `key` seeds stochastic rounding.
using StepRow = void (*)(void* w, const void* g, float* m, float* v, float* master, int32_t n, float unscale, float factor,
                         const Hyper* h, const RowCoefficients* c, const Ahead* next, uint32_t key);
// The function for these types; null where there is none: fp32 with a master, half gradients of another type.
StepRow step_row(Type wt, Type gt, Keep keep);

// 8-bit states of n <= kTile elements whose first one starts a block; `column` is its position in the row.
void decode(const uint8_t* code, const float* scales, int64_t n, bool is_signed, float* out);
void encode(const float* values, int64_t n, bool is_signed, uint32_t key, int64_t column, uint8_t* code, float* scales);

}  // namespace leaml::cpu
