// The arithmetic of the kernels, once, for the CPU and the CUDA code: number formats, the counter hash of stochastic
// rounding, the 8-bit code of optimizer states, one AdamW step of one element, the relevance criteria.
//
// Covers: scalar functions without branches that a vectoriser could not turn into selects. leaml_plugin/ops/reference.py
// is the same arithmetic in PyTorch, operation for operation.
// Does not cover: memory access and reductions (cpu_kernels.cpp, kernels.cuh).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LEAML_HD __host__ __device__ __forceinline__
#else
#define LEAML_HD inline __attribute__((always_inline))
#endif

// What a GPU works out in another way than the CPU though a CPU could: the tests of device code run that too.
#if defined(__CUDA_ARCH__) && !defined(LEAML_DEVICE_ARITHMETIC)
#define LEAML_DEVICE_ARITHMETIC
#endif

namespace leaml {

constexpr int kBlock = 256;  // elements that share one scale of an 8-bit state

enum Criterion : int { kTaylor = 0, kTaylorAbs = 1, kFisher = 2, kGradNorm = 3 };

LEAML_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

LEAML_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

// --- number formats: storage types that a compiler on the host knows nothing about ---------------------------------

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

LEAML_HD float to_float(float x) { return x; }

LEAML_HD float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

LEAML_HD float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  // exponent and mantissa moved into place; subnormals and Inf/NaN get their own exponent correction
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t rebased = magnitude + 0x38000000u;
  const float subnormal = bits_float(rebased + 0x00800000u) - bits_float(0x38800000u);
  const uint32_t special = rebased + 0x38000000u;
  uint32_t u = exponent == 0x0f800000u ? special : rebased;
  u = exponent == 0u ? float_bits(subnormal) : u;
  return bits_float(u | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

// Round to nearest, ties to even; NaN becomes the canonical quiet NaN, as in PyTorch on the CPU: fp16 keeps its sign.
LEAML_HD void from_float(float x, float& out) { out = x; }

LEAML_HD void from_float(float x, bf16& out) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

LEAML_HD void from_float(float x, fp16& out) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  // the instruction's own NaN is 0x7fff
  out.bits = x != x ? uint16_t(0x7e00u | (float_bits(x) >> 16 & 0x8000u)) : half;
#else
  const uint32_t raw = float_bits(x);
  const uint32_t sign = raw & 0x80000000u;
  const uint32_t u = raw ^ sign;
  const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = float_bits(bits_float(u) + 0.5f) - 0x3f000000u;  // 0.5's last bit is worth 2^-24
  const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  uint32_t half = u < 0x38800000u ? subnormal : normal;
  half = u >= 0x47800000u ? special : half;
  out.bits = uint16_t(half | (sign >> 16));
#endif
}

// --- counter hash ------------------------------------------------------------------------------------------------

LEAML_HD uint32_t mix32(uint32_t x) {  // lowbias32: a bijection with good avalanche
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// One key for each (seed, tensor, row, step); a row's random numbers are counted from it.
LEAML_HD uint32_t row_key(int64_t seed, int64_t tensor, int64_t row, float step) {
  uint32_t key = mix32(uint32_t(uint64_t(seed)) ^ 0x9e3779b9u);
  key = mix32(key ^ uint32_t(uint64_t(seed) >> 32));
  key = mix32(key ^ uint32_t(uint64_t(tensor)));
  key = mix32(key ^ uint32_t(uint64_t(row)));
  return mix32(key ^ uint32_t(int64_t(step)));
}

enum Stream : uint32_t { kWeightStream = 0, kAvgStream = 1, kSqStream = 2 };

LEAML_HD uint32_t random_bits(uint32_t key, uint32_t column, uint32_t stream) {
  return mix32(key + (column * 4u + stream) * 0x9e3779b1u);
}

LEAML_HD float uniform24(uint32_t bits) { return float(int32_t(bits >> 8)) * 5.9604644775390625e-08f; }  // [0, 1)

// --- stochastic rounding -----------------------------------------------------------------------------------------

LEAML_HD bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

LEAML_HD void round_stochastically(float x, uint32_t, float& out) { out = x; }

LEAML_HD void round_stochastically(float x, uint32_t bits, bf16& out) {
  bf16 nearest;
  from_float(x, nearest);
  const uint32_t rounded = (float_bits(x) + (bits >> 16)) >> 16;
  out.bits = is_finite(x) ? uint16_t(rounded) : nearest.bits;
}

LEAML_HD void round_stochastically(float x, uint32_t bits, fp16& out) {
  const uint32_t raw = float_bits(x);
  const float magnitude = bits_float(raw & 0x7fffffffu);
  const float normal = bits_float((raw + (bits >> 19)) & 0xffffe000u);  // 13 bits of mantissa go
  // below 2^-14 the spacing is a constant 2^-24
  const bool small = magnitude < 6.103515625e-05f;
  const float scaled = small ? magnitude * 16777216.0f + uniform24(bits) : 0.0f;
  const float floored = float(int32_t(scaled)) * 5.9604644775390625e-08f;
  const float subnormal = bits_float(float_bits(floored) | (raw & 0x80000000u));
  const float chosen = small ? subnormal : normal;
  from_float(is_finite(x) ? chosen : x, out);
}

// --- 8-bit states: scale * (q / q_max)^4 ---------------------------------------------------------------------------

LEAML_HD float decode_signed(uint8_t code, float scale) {
  const float unit = (float(int32_t(code)) - 128.0f) * (1.0f / 127.0f);
  return ((unit * unit) * (unit * fabsf(unit))) * scale;
}

LEAML_HD float decode_unsigned(uint8_t code, float scale) {
  const float unit = float(int32_t(code)) * (1.0f / 255.0f);
  return ((unit * unit) * (unit * unit)) * scale;
}

// What a block's elements are multiplied by before coding; 0 where the block is all zero, subnormal or not finite.
LEAML_HD float block_inverse(float scale) { return scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f; }

// A code only has to be near: rounding is decided against the exact value of the code below.
LEAML_HD float code_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

LEAML_HD float encode_magnitude(float magnitude, float inverse, float top, uint32_t bits) {
  // integer selects: they vectorise where float ones turn into branches
  uint32_t u = float_bits(magnitude * inverse);
  u = u < 0x7f800000u ? u : 0u;  // NaN and Inf code zero: the scale says NaN
  u = u > 0x3f800000u ? 0x3f800000u : u;
  const float x = bits_float(u);
  int32_t q = int32_t(code_root(code_root(x)) * top);
  q = q > int32_t(top) - 1 ? int32_t(top) - 1 : q;
  const float low = float(q);
  const float a = low * (1.0f / top), b = (low + 1.0f) * (1.0f / top);
  const float below = (a * a) * (a * a), above = (b * b) * (b * b);
  const float lead = (x - below) - uniform24(bits) * (above - below);  // positive: the upper code
  return low + float(int32_t(lead > 0.0f));
}

LEAML_HD uint8_t encode_signed(float value, float inverse, uint32_t bits) {
  const float q = encode_magnitude(bits_float(float_bits(value) & 0x7fffffffu), inverse, 127.0f, bits);
  return uint8_t(int32_t(128.0f + bits_float(float_bits(q) | (float_bits(value) & 0x80000000u))));
}

// A second moment that is not zero never becomes zero: beside a first moment that is not, the step would divide by eps.
LEAML_HD uint8_t encode_unsigned(float value, float inverse, uint32_t bits) {
  const int32_t q = int32_t(encode_magnitude(value, inverse, 255.0f, bits));
  const bool present = value > 0.0f && inverse > 0.0f;
  return uint8_t(q > int32_t(present) ? q : int32_t(present));
}

// --- AdamW ---------------------------------------------------------------------------------------------------------

struct Hyper {  // of one call
  double lr, weight_decay;
  double log_beta1, log_beta2;  // natural logarithms; -inf for a beta of 0
  float beta2, rest1, rest2;   // rest = 1 - beta
  float eps;
  float sign;  // -1 maximizes
  bool stochastic;
  int64_t seed;
};

struct RowCoefficients {  // of one row at its step
  float decay, step_size, inverse_root2;  // 1 / sqrt(1 - beta2^t): a multiplication an element, not a division
};

LEAML_HD RowCoefficients row_coefficients(const Hyper& h, double lr, float step) {
  RowCoefficients c;
  // expm1 keeps 1 - beta^t exact to the last bits where beta^t is next to 1
#if defined(LEAML_DEVICE_ARITHMETIC)
  // doubles are slow there, and no more exact by much: expm1 of a negative number never enlarges its relative error
  const float correction1 = -expm1f(step * float(h.log_beta1));
  c.inverse_root2 = 1.0f / sqrtf(-expm1f(step * float(h.log_beta2)));
#else
  const double correction1 = -expm1(double(step) * h.log_beta1);
  c.inverse_root2 = float(1.0 / sqrt(-expm1(double(step) * h.log_beta2)));
#endif
  c.decay = float(1.0 - lr * h.weight_decay);
  c.step_size = float(lr / double(correction1));
  return c;
}

// In two halves, so that whole vectors (T) take the same arithmetic: only their square root is another instruction.
template <class T>
LEAML_HD void adamw_moments(const T& g, T& m, T& v, const Hyper& h) {
  m = m + (g - m) * h.rest1;
  v = v * h.beta2 + (g * g) * h.rest2;
}

template <class T>
LEAML_HD void adamw_weight(T& w, const T& m, const T& root_v, const Hyper& h, const RowCoefficients& c) {
  w = w * c.decay;
  w = w - c.step_size * (m / (root_v * c.inverse_root2 + h.eps));
}

LEAML_HD void adamw_element(float& w, float g, float& m, float& v, const Hyper& h, const RowCoefficients& c) {
  adamw_moments(g, m, v, h);
  adamw_weight(w, m, sqrtf(v), h, c);
}

// --- relevance -----------------------------------------------------------------------------------------------------

struct Sums {
  float wg, abs_wg, gg;
};

LEAML_HD float criterion_value(int criterion, const Sums& s, float inverse_scale) {
  switch (criterion) {
    case kTaylor:
      return fabsf(s.wg * inverse_scale);
    case kTaylorAbs:
      return s.abs_wg * inverse_scale;
    case kFisher:
      return s.gg * (inverse_scale * inverse_scale);
    default:
      return sqrtf(s.gg * (inverse_scale * inverse_scale));
  }
}

// --- selection -----------------------------------------------------------------------------------------------------

// A key whose unsigned order is the order of the scores: NaN lowest, -0 equal to +0.
LEAML_HD uint32_t order_key(float score) {
  uint32_t u = float_bits(score == 0.0f ? 0.0f : score);
  u = (u & 0x80000000u) ? ~u : (u | 0x80000000u);
  return score != score ? float_bits(-INFINITY) ^ 0xffffffffu : u;  // as -Inf
}

}  // namespace leaml
