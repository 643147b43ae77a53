// LayerNorm without affine, fused with adaLN modulation; contract in
// opensora/ops/layernorm_modulate.py.
//
//   forward   y = n * (1 + scale) + shift            n = (x - mean) * rstd, per row of C
//   backward  dx = rstd * (g - mean(g) - n * mean(g * n))      g = dy * (1 + scale)
//             dshift = sum of dy, dscale = sum of dy * n, over the rows that share them
//
// Memory-bound: a row is read from memory once, its statistics and second use come from the first
// cache level. Two-pass variance, float32 throughout, one rounding at the end. Axes: B batch,
// T frames (1 without `select`), S rows per frame, C channels; a row is one of B*T*S.
#include "modulation.h"

namespace opensora {

struct LayernormModulate {
  Frames f;
  const void* x;   // [B, T, S, C]
  const void* dy;  // [B, T, S, C], backward only
  void* out;       // y or dx, [B, T, S, C]
  float* partial;  // [B*T*chunks, 2, padded] sums of dy and of dy*n; backward only
  Modulation shift, scale;
  float eps;
};

namespace OPENSORA_SIMD {
namespace {

template <class T>
__attribute__((flatten)) void forward_rows(const LayernormModulate& a, int64_t begin, int64_t end) {
  const int64_t C = a.f.C;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * C;
    const T* shift = row_of<T>(a.f, a.shift, row / a.f.S);
    const T* scale = row_of<T>(a.f, a.scale, row / a.f.S);
    T* y = static_cast<T*>(a.out) + row * C;
    const Statistics s = statistics(x, C, a.eps);
    for_columns(C, [=](int64_t i, int64_t n) {
      const Vec normed = s.normalise(load(x + i, n));
      store(y + i, normed * (load(scale + i, n) + 1.0f) + load(shift + i, n), n);
    });
  }
}

// One unit is a chunk of one frame's rows; its sums go to its own rows of `partial`.
template <class T>
__attribute__((flatten)) void backward_unit(const LayernormModulate& a, int64_t unit) {
  const int64_t C = a.f.C;
  const Unit u = unit_of(a.f, unit);
  const T* scale = row_of<T>(a.f, a.scale, u.frame);
  float* dshift = a.partial + unit * 2 * a.f.padded;
  float* dscale = dshift + a.f.padded;
  __builtin_memset(dshift, 0, sizeof(float) * 2 * a.f.padded);
  for (int64_t row = u.first; row < u.last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * C;
    const T* dy = static_cast<const T*>(a.dy) + row * C;
    T* dx = static_cast<T*>(a.out) + row * C;
    const auto gradient = norm_gradient(x, dy, scale, dshift, dscale, C, a.eps);
    for_columns(C, [=](int64_t i, int64_t n) { store(dx + i, gradient(i, n), n); });
  }
}

}  // namespace

void layernorm_modulate_forward(const LayernormModulate& a, int64_t begin, int64_t end) {
  a.f.bf16 ? forward_rows<Bf16>(a, begin, end) : forward_rows<float>(a, begin, end);
}

void layernorm_modulate_backward(const LayernormModulate& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    a.f.bf16 ? backward_unit<Bf16>(a, unit) : backward_unit<float>(a, unit);
  }
}

void layernorm_modulate_reduce(const LayernormModulate& a, void* dmodulation, int64_t begin,
                               int64_t end) {
  reduce_units(a.f, a.partial, 2, dmodulation, begin, end);
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND

namespace opensora {

SIMD_DECLARE(layernorm_modulate_forward, const LayernormModulate&, int64_t, int64_t)
SIMD_DECLARE(layernorm_modulate_backward, const LayernormModulate&, int64_t, int64_t)
SIMD_DECLARE(layernorm_modulate_reduce, const LayernormModulate&, void*, int64_t, int64_t)

namespace {

Tensor forward(const Tensor& x, const Tensor& shift, const Tensor& scale,
               const std::optional<Tensor>& select, const std::optional<Tensor>& shift0,
               const std::optional<Tensor>& scale0, double eps) {
  LayernormModulate a{};
  a.f = frames_of(x, select);
  a.shift = modulation_of(x, select, shift, shift0);
  a.scale = modulation_of(x, select, scale, scale0);
  a.eps = static_cast<float>(eps);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  a.x = x.const_data_ptr();
  a.out = y.mutable_data_ptr();
  const auto kernel = SIMD_CALL(layernorm_modulate_forward);
  for_rows(a.f, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& scale,
                                    const std::optional<Tensor>& select,
                                    const std::optional<Tensor>& scale0, double eps) {
  LayernormModulate a{};
  a.f = frames_of(x, select);
  CHECK_ROWS(dy);
  CHECK_LIKE(dy, x);
  a.scale = modulation_of(x, select, scale, scale0);
  a.eps = static_cast<float>(eps);
  const int64_t sums = select ? 4 : 2;
  Tensor dx = torch::stable::empty_like(x);
  Tensor dmodulation = torch::stable::new_empty(x, {a.f.B, sums, a.f.C});
  Tensor partial =
      torch::stable::new_empty(x, {a.f.B * a.f.T * a.f.chunks, 2, a.f.padded}, ScalarType::Float);
  a.x = x.const_data_ptr();
  a.dy = dy.const_data_ptr();
  a.out = dx.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr<float>();
  const auto kernel = SIMD_CALL(layernorm_modulate_backward);
  const auto reduce = SIMD_CALL(layernorm_modulate_reduce);
  void* gradients = dmodulation.mutable_data_ptr();
  for_units(
      a.f, sums, [&](int64_t begin, int64_t end) { kernel(a, begin, end); },
      [&](int64_t begin, int64_t end) { reduce(a, gradients, begin, end); });
  return {dx, dmodulation};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("layernorm_modulate_forward", TORCH_BOX(&forward));
  m.impl("layernorm_modulate_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
