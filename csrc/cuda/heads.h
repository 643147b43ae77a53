// Heads of queries and keys, one to a lane; cf. opensora/ops/_heads.py and csrc/cpu/heads.h.
//
// A head of 72 numbers of 16 bits is 9 packs. Lanes read their own head from shared memory, where
// heads lie an odd number of packs apart: eight lanes then meet all banks, and no lane needs
// another's numbers for the norm or for a pair of the rotation. D head width.
#pragma once

#include "portable.h"

namespace opensora {

// Numbers of any floating type, read one by one.
enum class Type : int { f32, bf16, f16 };

DEVICE float number(const void* from, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(from)[i];
  if (type == Type::bf16) return Numbers<Bf16>::one(static_cast<const Bf16*>(from) + i);
  return Numbers<F16>::one(static_cast<const F16*>(from) + i);
}

// What is done to heads; a null pointer says that a step is left out.
struct HeadRules {
  const void *q_weight, *k_weight;  // [D]
  const float *cos, *sin;           // [positions, D], equal in pairs
  Type weight_type;
  bool legacy;  // rotate before the norm
  float eps;
};

// Packs of a head, and packs from one head to the next in shared memory.
template <class T, int D>
constexpr int HEAD_PACKS = D / PER_PACK<T>;
template <class T, int D>
constexpr int HEAD_STRIDE = HEAD_PACKS<T, D> | 1;

template <class T, int D>
DEVICE void load_head(const Pack* packs, float (&x)[D]) {
  UNROLL for (int i = 0; i < HEAD_PACKS<T, D>; ++i) {
    Numbers<T>::load(packs[i], x + i * PER_PACK<T>);
  }
}

template <class T, int D>
DEVICE void store_head(Pack* packs, const float (&x)[D]) {
  UNROLL for (int i = 0; i < HEAD_PACKS<T, D>; ++i) {
    packs[i] = Numbers<T>::store(x + i * PER_PACK<T>);
  }
}

// Put both weights into shared memory [2, D] as float32; all threads of the block take part.
template <int D>
DEVICE void stage_weights(const HeadRules& rules, float* weights) {
  if (rules.q_weight == nullptr) return;
  for (int i = threadIdx.x; i < 2 * D; i += blockDim.x) {
    weights[i] = number(i < D ? rules.q_weight : rules.k_weight, rules.weight_type, i % D);
  }
}

// x = round(x / rms(x)) * weight; four sums side by side.
template <class T, int D>
DEVICE void normalise(float (&x)[D], const float* weight, float eps) {
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  UNROLL for (int i = 0; i < D; ++i) { sums[i % 4] += x[i] * x[i]; }
  const float mean = (sums[0] + sums[1] + (sums[2] + sums[3])) * (1.0f / D);
  const float rstd = inverse_sqrt(mean + eps);
  UNROLL for (int i = 0; i < D; i += 4) {
    float w[4];
    Numbers<float>::load(*reinterpret_cast<const Pack*>(weight + i), w);
    UNROLL for (int j = 0; j < 4; ++j) { x[i + j] = Numbers<T>::round(x[i + j] * rstd) * w[j]; }
  }
}

// Turn the pairs (2i, 2i + 1) by the angles of one row of the tables.
template <int D>
DEVICE void rotate(float (&x)[D], const float* cos, const float* sin) {
  UNROLL for (int i = 0; i < D; i += 4) {
    float c[4], s[4];
    Numbers<float>::load(*reinterpret_cast<const Pack*>(cos + i), c);
    Numbers<float>::load(*reinterpret_cast<const Pack*>(sin + i), s);
    UNROLL for (int j = 0; j < 4; j += 2) {
      const float even = x[i + j], odd = x[i + j + 1];
      x[i + j] = even * c[j] - odd * s[j];
      x[i + j + 1] = odd * c[j] + even * s[j];
    }
  }
}

// Norm and rotation of a head at a position, as the rules say.
template <class T, int D>
DEVICE void prepare(float (&x)[D], const HeadRules& rules, const float* weight, int64_t position) {
  const float *cos = rules.cos + position * D, *sin = rules.sin + position * D;
  if (rules.cos != nullptr && rules.legacy) rotate(x, cos, sin);
  if (rules.q_weight != nullptr) normalise<T>(x, weight, rules.eps);
  if (rules.cos != nullptr && !rules.legacy) rotate(x, cos, sin);
}

}  // namespace opensora
