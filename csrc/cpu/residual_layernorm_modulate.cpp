// A gated residual, then LayerNorm and modulation of the sum; contract in
// opensora/ops/residual_layernorm_modulate.py.
//
//   forward   total = x + gate * y, rounded;  normed = n * (1 + scale) + shift
//   backward  dx = dtotal + rstd * (g - mean(g) - n * mean(g * n))    g = dnormed * (1 + scale)
//             dy = gate * dx;  dgate = sum of dx * y, dshift of dnormed, dscale of dnormed * n
//
// Memory-bound: each row is read and written once; the sum is normalised while the first cache
// level holds it. Axes as in modulation.h; x, total and normed are T, the branch y may be another
// U.
#include "modulation.h"

namespace opensora {

struct ResidualLayernormModulate {
  Frames f;
  const void* x;        // [B, T, S, C], forward only
  const void* y;        // [B, T, S, C]
  void* total;          // [B, T, S, C], written by the forward and read by the backward
  void* normed;         // [B, T, S, C]: normed, or dx
  const void* dtotal;   // [B, T, S, C] or null
  const void* dnormed;  // [B, T, S, C], backward only
  void* dy;             // [B, T, S, C] or null
  float* partial;       // [B*T*chunks, 2 or 3, padded]: of (gate,) shift and scale
  Modulation gate, shift, scale;
  float eps;
  bool gated, branch_bf16;
};

namespace OPENSORA_SIMD {
namespace {

template <class T, class U>
__attribute__((flatten)) void forward_rows(const ResidualLayernormModulate& a, int64_t begin,
                                           int64_t end) {
  const int64_t C = a.f.C;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t frame = row / a.f.S;
    const T* x = static_cast<const T*>(a.x) + row * C;
    const U* y = static_cast<const U*>(a.y) + row * C;
    const T* shift = row_of<T>(a.f, a.shift, frame);
    const T* scale = row_of<T>(a.f, a.scale, frame);
    T* total = static_cast<T*>(a.total) + row * C;
    T* normed = static_cast<T*>(a.normed) + row * C;
    if (a.gated) {
      const T* gate = row_of<T>(a.f, a.gate, frame);
      for_columns(C, [=](int64_t i, int64_t n) {
        store(total + i, load(x + i, n) + load(gate + i, n) * load_as<T>(y + i, n), n);
      });
    } else {
      for_columns(C, [=](int64_t i, int64_t n) {
        store(total + i, load(x + i, n) + load_as<T>(y + i, n), n);
      });
    }
    const Statistics s = statistics<T>(total, C, a.eps);
    for_columns(C, [=](int64_t i, int64_t n) {
      const Vec centred = s.normalise(load(total + i, n));
      store(normed + i, centred * (load(scale + i, n) + 1.0f) + load(shift + i, n), n);
    });
  }
}

// One unit is a chunk of one frame's rows; its sums go to its own rows of `partial`.
template <class T, class U>
__attribute__((flatten)) void backward_unit(const ResidualLayernormModulate& a, int64_t unit) {
  const int64_t C = a.f.C, K = a.gated ? 3 : 2;
  const Unit u = unit_of(a.f, unit);
  const T* scale = row_of<T>(a.f, a.scale, u.frame);
  float* sums = a.partial + unit * K * a.f.padded;
  float* dgate = sums;
  float* dshift = sums + (K - 2) * a.f.padded;
  float* dscale = dshift + a.f.padded;
  __builtin_memset(sums, 0, sizeof(float) * K * a.f.padded);
  for (int64_t row = u.first; row < u.last; ++row) {
    const T* total = static_cast<const T*>(a.total) + row * C;
    const T* dnormed = static_cast<const T*>(a.dnormed) + row * C;
    const T* dtotal = a.dtotal == nullptr ? nullptr : static_cast<const T*>(a.dtotal) + row * C;
    T* dx = static_cast<T*>(a.normed) + row * C;
    const auto through = norm_gradient(total, dnormed, scale, dshift, dscale, C, a.eps);
    const auto gradient = [=](int64_t i, int64_t n) {
      const Vec d = through(i, n);
      return dtotal == nullptr ? d : d + load(dtotal + i, n);
    };
    if (!a.gated) {
      for_columns(C, [=](int64_t i, int64_t n) { store(dx + i, gradient(i, n), n); });
      continue;
    }
    const T* gate = row_of<T>(a.f, a.gate, u.frame);
    const U* y = static_cast<const U*>(a.y) + row * C;
    U* dy = static_cast<U*>(a.dy) + row * C;
    for_columns(C, [=](int64_t i, int64_t n) {
      const Vec d = gradient(i, n);
      store(dgate + i, load(dgate + i) + only<T>(d * load_as<T>(y + i, n), n));
      store_as<T>(dy + i, d * load(gate + i, n), n);
      store(dx + i, d, n);
    });
  }
}

}  // namespace

void residual_layernorm_modulate_forward(const ResidualLayernormModulate& a, int64_t begin,
                                         int64_t end) {
  const auto rows = a.f.bf16 ? a.branch_bf16 ? forward_rows<Bf16, Bf16> : forward_rows<Bf16, float>
                    : a.branch_bf16 ? forward_rows<float, Bf16>
                                    : forward_rows<float, float>;
  rows(a, begin, end);
}

void residual_layernorm_modulate_backward(const ResidualLayernormModulate& a, int64_t begin,
                                          int64_t end) {
  const auto one = a.f.bf16 ? a.branch_bf16 ? backward_unit<Bf16, Bf16> : backward_unit<Bf16, float>
                   : a.branch_bf16 ? backward_unit<float, Bf16>
                                   : backward_unit<float, float>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, unit);
}

void residual_layernorm_modulate_reduce(const ResidualLayernormModulate& a, void* dmodulation,
                                        int64_t begin, int64_t end) {
  reduce_units(a.f, a.partial, a.gated ? 3 : 2, dmodulation, begin, end);
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND

namespace opensora {

SIMD_DECLARE(residual_layernorm_modulate_forward, const ResidualLayernormModulate&, int64_t,
             int64_t)
SIMD_DECLARE(residual_layernorm_modulate_backward, const ResidualLayernormModulate&, int64_t,
             int64_t)
SIMD_DECLARE(residual_layernorm_modulate_reduce, const ResidualLayernormModulate&, void*, int64_t,
             int64_t)

namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& y,
                                   const std::optional<Tensor>& gate, const Tensor& shift,
                                   const Tensor& scale, const std::optional<Tensor>& select,
                                   const std::optional<Tensor>& gate0,
                                   const std::optional<Tensor>& shift0,
                                   const std::optional<Tensor>& scale0, double eps) {
  ResidualLayernormModulate a{};
  a.f = frames_of(x, select);
  CHECK_BRANCH(y, x);
  a.gated = gate.has_value();
  if (gate) a.gate = modulation_of(x, select, *gate, gate0);
  a.shift = modulation_of(x, select, shift, shift0);
  a.scale = modulation_of(x, select, scale, scale0);
  a.eps = static_cast<float>(eps);
  a.branch_bf16 = y.scalar_type() == ScalarType::BFloat16;
  Tensor total = torch::stable::empty_like(x), normed = torch::stable::empty_like(x);
  if (x.numel() == 0) return {total, normed};
  a.x = x.const_data_ptr();
  a.y = y.const_data_ptr();
  a.total = total.mutable_data_ptr();
  a.normed = normed.mutable_data_ptr();
  const auto kernel = SIMD_CALL(residual_layernorm_modulate_forward);
  for_rows(a.f, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {total, normed};
}

std::tuple<Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& dtotal,
                                            const Tensor& dnormed, const Tensor& total,
                                            const std::optional<Tensor>& y,
                                            const std::optional<Tensor>& gate, const Tensor& scale,
                                            const std::optional<Tensor>& select,
                                            const std::optional<Tensor>& gate0,
                                            const std::optional<Tensor>& scale0, double eps) {
  ResidualLayernormModulate a{};
  a.f = frames_of(total, select);
  CHECK_ROWS(dnormed);
  CHECK_LIKE(dnormed, total);
  if (dtotal) {
    CHECK_ROWS(*dtotal);
    CHECK_LIKE(*dtotal, total);
    a.dtotal = dtotal->const_data_ptr();
  }
  a.gated = gate.has_value();
  Tensor dy = torch::stable::new_empty(total, {0});
  if (gate) {
    STD_TORCH_CHECK(y, "gate needs y");
    CHECK_BRANCH(*y, total);
    a.gate = modulation_of(total, select, *gate, gate0);
    a.branch_bf16 = y->scalar_type() == ScalarType::BFloat16;
    dy = torch::stable::empty_like(*y);
    a.y = y->const_data_ptr();
    a.dy = dy.mutable_data_ptr();
  }
  a.scale = modulation_of(total, select, scale, scale0);
  a.eps = static_cast<float>(eps);
  const int64_t K = gate ? 3 : 2, sums = select ? 2 * K : K;
  Tensor dx = torch::stable::empty_like(total);
  Tensor dmodulation = torch::stable::new_empty(total, {a.f.B, sums, a.f.C});
  Tensor partial = torch::stable::new_empty(total, {a.f.B * a.f.T * a.f.chunks, K, a.f.padded},
                                            ScalarType::Float);
  a.total = const_cast<void*>(total.const_data_ptr());
  a.dnormed = dnormed.const_data_ptr();
  a.normed = dx.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr<float>();
  const auto kernel = SIMD_CALL(residual_layernorm_modulate_backward);
  const auto reduce = SIMD_CALL(residual_layernorm_modulate_reduce);
  void* gradients = dmodulation.mutable_data_ptr();
  for_units(
      a.f, sums, [&](int64_t begin, int64_t end) { kernel(a, begin, end); },
      [&](int64_t begin, int64_t end) { reduce(a, gradients, begin, end); });
  return {dx, dy, dmodulation};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("residual_layernorm_modulate_forward", TORCH_BOX(&forward));
  m.impl("residual_layernorm_modulate_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
