// Share what the adaLN kernels have in common: rows [B, C] of modulation that are chosen per frame,
// statistics of a row, and the order in which gradients of shared rows are added up.
#pragma once

#include "../simd.h"

namespace opensora {

// Rows [B, C] of x's dtype, `stride` elements apart; no data where there are none.
struct Rows {
  const void* data;
  int64_t stride;
};

// One of shift, scale and gate: the rows of chosen frames and those of the others.
struct Modulation {
  Rows chosen, other;
};

// Tokens [B, T, S, C].
struct Frames {
  const bool* select;  // [B, T], or null: every frame is chosen, T = 1
  int64_t B, T, S, C;
  int64_t chunks, padded;  // of a partial sum, see CHUNK; C in whole Vecs
  bool bf16;               // else float
};

// Rows that add into one partial sum. Fixed, so that gradients do not depend on the threads;
// with 64 the partial sums are 2 % of the bytes moved for bfloat16, 1 % for float.
constexpr int64_t CHUNK = 64;

// Columns that one task adds up, a multiple of every WIDTH: 18 tasks for a sample of 1152 channels.
constexpr int64_t BLOCK = 128;

namespace OPENSORA_SIMD {
namespace {

// The mean is rounded to float, so what it misses comes off as well: at a mean of 300 and a spread
// of 1e-3 it is 7 % of the result.
struct Statistics {
  float mean, rstd, missed;  // missed: -(true mean - mean) * rstd

  Vec normalise(Vec x) const { return (x - mean) * rstd + missed; }
};

template <class T>
Statistics statistics(const T* x, int64_t C, float eps) {
  const float total = sum_columns(C, [=](int64_t i, int64_t n) { return load(x + i, n); });
  const float mean = total / C;
  Vec rest{};
  const float squares = sum_columns(C, [&](int64_t i, int64_t n) {
    const Vec centred = only<T>(load(x + i, n) - mean, n);
    rest = rest + centred;
    return centred * centred;
  });
  const float missed = sum(rest) / C;
  const float rstd = 1.0f / __builtin_sqrtf(squares / C - missed * missed + eps);
  return {mean, rstd, -missed * rstd};
}

// How the gradient of a row x follows from that of n * (1 + scale) + shift, n the normalised x.
template <class T>
struct NormGradient {
  const T *x, *dy, *scale;
  Statistics s;
  float mean_g, mean_gn;  // of g = dy * (1 + scale), and of g * n

  Vec operator()(int64_t i, int64_t n) const {
    const Vec normed = s.normalise(load(x + i, n));
    const Vec g = load(dy + i, n) * (load(scale + i, n) + 1.0f);
    return (g - mean_g - normed * mean_gn) * s.rstd;
  }
};

// Add the row's shares to the sums dshift and dscale on the way.
template <class T>
NormGradient<T> norm_gradient(const T* x, const T* dy, const T* scale, float* dshift, float* dscale,
                              int64_t C, float eps) {
  const Statistics s = statistics(x, C, eps);
  Vec sum_g{}, sum_gn{};
  for_columns(C, [&](int64_t i, int64_t n) {
    const Vec normed = s.normalise(load(x + i, n));
    const Vec grad = load(dy + i, n);
    const Vec g = grad * (load(scale + i, n) + 1.0f);
    store(dshift + i, load(dshift + i) + grad);
    store(dscale + i, load(dscale + i) + grad * normed);
    sum_g = sum_g + g;
    sum_gn = sum_gn + g * normed;
  });
  return {x, dy, scale, s, sum(sum_g) / C, sum(sum_gn) / C};
}

// Return the row that modulates a frame, one of B*T.
template <class T>
const T* row_of(const Frames& f, const Modulation& m, int64_t frame) {
  const Rows& rows = f.select == nullptr || f.select[frame] ? m.chosen : m.other;
  return static_cast<const T*>(rows.data) + frame / f.T * rows.stride;
}

// Rows [first, last) of B*T*S that unit `unit` of B*T*chunks adds up.
struct Unit {
  int64_t frame, first, last;
};

inline Unit unit_of(const Frames& f, int64_t unit) {
  const int64_t frame = unit / f.chunks, first = frame * f.S + unit % f.chunks * CHUNK;
  const int64_t end = (frame + 1) * f.S;
  return {frame, first, first + CHUNK < end ? first + CHUNK : end};
}

// Add up partial sums [B*T*chunks, K, padded] into blocks [begin, end) of gradients [B, K or 2K,
// C].
inline void reduce_units(const Frames& f, const float* partial, int64_t K, void* gradients,
                         int64_t begin, int64_t end) {
  const int64_t sets = f.select == nullptr ? 1 : 2, blocks = (f.C + BLOCK - 1) / BLOCK;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks, column = block % blocks * BLOCK;
    const int64_t batch = row / (K * sets), other = row / K % sets, which = row % K;
    const int64_t rest = f.C - column;
    for_columns(rest < BLOCK ? rest : BLOCK, [&](int64_t i, int64_t n) {
      Vec total{};
      for (int64_t frame = batch * f.T; frame < (batch + 1) * f.T; ++frame) {
        if (f.select != nullptr && f.select[frame] == (other == 1)) continue;
        for (int64_t unit = frame * f.chunks; unit < (frame + 1) * f.chunks; ++unit) {
          total = total + load(partial + (unit * K + which) * f.padded + column + i);
        }
      }
      const int64_t at = row * f.C + column + i;
      f.bf16 ? store(static_cast<Bf16*>(gradients) + at, total, n)
             : store(static_cast<float*>(gradients) + at, total, n);
    });
  }
}

}  // namespace
}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include "../common.h"

namespace opensora {
namespace {

inline Frames frames_of(const Tensor& x, const std::optional<Tensor>& select) {
  CHECK_KERNEL_DTYPE(x);
  CHECK_ROWS(x);
  Frames f{};
  f.B = x.size(0);
  f.T = 1;
  if (select) {
    STD_TORCH_CHECK(select->is_contiguous() && select->dim() == 2 &&
                        select->scalar_type() == ScalarType::Bool && select->size(0) == x.size(0),
                    "select must be contiguous bool [B, T]");
    f.select = select->const_data_ptr<bool>();
    f.T = select->size(1);
  }
  f.C = x.size(-1);
  f.S = x.numel() == 0 ? 0 : x.numel() / (f.B * f.T * f.C);
  STD_TORCH_CHECK(f.S * f.B * f.T * f.C == x.numel(), "select's frames must divide x's tokens");
  f.chunks = (f.S + CHUNK - 1) / CHUNK;
  f.padded = (f.C + BLOCK - 1) / BLOCK * BLOCK;
  f.bf16 = x.scalar_type() == ScalarType::BFloat16;
  return f;
}

inline Modulation modulation_of(const Tensor& x, const std::optional<Tensor>& select,
                                const Tensor& chosen, const std::optional<Tensor>& other) {
  CHECK_PER_SAMPLE(chosen, x);
  Modulation m{{chosen.const_data_ptr(), chosen.stride(0)}, {nullptr, 0}};
  if (select) {
    STD_TORCH_CHECK(other, "select needs a second modulation");
    CHECK_PER_SAMPLE(*other, x);
    m.other = {other->const_data_ptr(), other->stride(0)};
  }
  return m;
}

// Call kernel(begin, end) for all rows, in tasks of many.
template <class Kernel>
void for_rows(const Frames& f, Kernel kernel) {
  parallel_for(0, f.B * f.T * f.S, GRAIN_ELEMENTS / f.C + 1, kernel);
}

// Call kernel(begin, end) for all units, then reduce(begin, end) for the blocks of K gradients.
template <class Kernel, class Reduce>
void for_units(const Frames& f, int64_t gradients, Kernel kernel, Reduce reduce) {
  parallel_for(0, f.B * f.T * f.chunks, GRAIN_ELEMENTS / (f.C * CHUNK + 1) + 1, kernel);
  parallel_for(0, f.B * gradients * ((f.C + BLOCK - 1) / BLOCK), 1, reduce);
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
