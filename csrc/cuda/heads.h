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
  const void *cos, *sin;            // [positions, D], float32 if `wide_table`, else of qkv's type
  Type weight_type;
  bool wide_table;
  bool legacy;  // rotate before the norm
  float eps;
};

// Packs of a head, and packs from one head to the next in shared memory.
template <class T, int D>
constexpr int HEAD_PACKS = D / PER_PACK<T>;
template <class T, int D>
constexpr int HEAD_STRIDE = HEAD_PACKS<T, D> | 1;

// Numbers [N] of a row from its i-th on.
template <class T, int N>
DEVICE void load_numbers(const Pack* row, int i, float (&x)[N]) {
  UNROLL for (int j = 0; j < N; j += PER_PACK<T>) {
    Numbers<T>::load(row[(i + j) / PER_PACK<T>], x + j);
  }
}

template <class T, int N>
DEVICE void store_numbers(Pack* row, int i, const float (&x)[N]) {
  UNROLL for (int j = 0; j < N; j += PER_PACK<T>) {
    row[(i + j) / PER_PACK<T>] = Numbers<T>::store(x + j);
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

// Numbers [N] from a place that no kernel writes.
template <class T, int N>
DEVICE void load_constants(const T* from, float (&x)[N]) {
  UNROLL for (int j = 0; j < N; j += PER_PACK<T>) {
    Numbers<T>::load(load_constant(from + j), x + j);
  }
}

// Turn N / 2 pairs by their angles, which begin at `at`. Both columns of a pair are used, though
// they are equal: else the compiler splits the loads to spare the second.
template <class Table, int N>
DEVICE void rotate(float (&x)[N], const HeadRules& rules, int64_t at) {
  float c[N], s[N];
  load_constants(static_cast<const Table*>(rules.cos) + at, c);
  load_constants(static_cast<const Table*>(rules.sin) + at, s);
  UNROLL for (int j = 0; j < N; j += 2) {
    const float even = x[j], odd = x[j + 1];
    x[j] = even * c[j] - odd * s[j];
    x[j + 1] = odd * c[j + 1] + even * s[j + 1];
  }
}

// Norm and rotation of a head in shared memory, pack by pack: store(i, x) receives the numbers of
// pack i. Once around for the norm, once more for the rest: registers hold a pack, not a head.
template <class T, int D, class Store>
DEVICE void prepare(const Pack* head, const HeadRules& rules, const float* weight, int64_t position,
                    Store store) {
  constexpr int N = PER_PACK<T>;
  const auto turn = [&](float (&x)[N], int i) {
    const int64_t at = position * D + i * N;
    rules.wide_table ? rotate<float>(x, rules, at) : rotate<T>(x, rules, at);
  };
  const bool first = rules.cos != nullptr && rules.legacy;
  const bool last = rules.cos != nullptr && !rules.legacy;
  float rstd = 1.0f;
  if (rules.q_weight != nullptr) {
    float sums[2] = {0.0f, 0.0f};
    UNROLL_BY_3
    for (int i = 0; i < HEAD_PACKS<T, D>; ++i) {
      float x[N];
      Numbers<T>::load(head[i], x);
      if (first) turn(x, i);
      UNROLL for (int j = 0; j < N; ++j) { sums[j % 2] += x[j] * x[j]; }
    }
    rstd = inverse_sqrt((sums[0] + sums[1]) * (1.0f / D) + rules.eps);
  }
  UNROLL_BY_3
  for (int i = 0; i < HEAD_PACKS<T, D>; ++i) {
    float x[N];
    Numbers<T>::load(head[i], x);
    if (first) turn(x, i);
    if (rules.q_weight != nullptr) {
      float w[N];
      load_numbers<float>(reinterpret_cast<const Pack*>(weight + i * N), 0, w);
      UNROLL for (int j = 0; j < N; ++j) { x[j] = Numbers<T>::round(x[j] * rstd) * w[j]; }
    }
    if (last) turn(x, i);
    store(i, x);
  }
}

}  // namespace opensora
