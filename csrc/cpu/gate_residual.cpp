// A gated residual, z = x + gate * y; contract in opensora/ops/gate_residual.py.
//
//   backward  dy = gate * dz;  dgate = sum of dz * y over the rows that share it
//
// Memory-bound: every element is read and written once. Axes as in modulation.h; x and z are T, the
// branch y may be another U.
#include "modulation.h"

namespace opensora {

struct GateResidual {
  Frames f;
  const void* x;   // [B, T, S, C]: x, or dz
  const void* y;   // [B, T, S, C]
  void* out;       // [B, T, S, C]: z, or dy
  float* partial;  // [B*T*chunks, 1, padded] sums of dz * y; backward only
  Modulation gate;
  bool branch_bf16;
};

namespace OPENSORA_SIMD {
namespace {

template <class T, class U>
__attribute__((flatten)) void forward_rows(const GateResidual& a, int64_t begin, int64_t end) {
  const int64_t C = a.f.C;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * C;
    const U* y = static_cast<const U*>(a.y) + row * C;
    const T* gate = row_of<T>(a.f, a.gate, row / a.f.S);
    T* z = static_cast<T*>(a.out) + row * C;
    for_columns(C, [=](int64_t i, int64_t n) {
      store(z + i, load(x + i, n) + load(gate + i, n) * load_as<T>(y + i, n), n);
    });
  }
}

// One unit is a chunk of one frame's rows; its sums go to its own row of `partial`.
template <class T, class U>
__attribute__((flatten)) void backward_unit(const GateResidual& a, int64_t unit) {
  const int64_t C = a.f.C;
  const Unit u = unit_of(a.f, unit);
  const T* gate = row_of<T>(a.f, a.gate, u.frame);
  float* dgate = a.partial + unit * a.f.padded;
  __builtin_memset(dgate, 0, sizeof(float) * a.f.padded);
  for (int64_t row = u.first; row < u.last; ++row) {
    const T* dz = static_cast<const T*>(a.x) + row * C;
    const U* y = static_cast<const U*>(a.y) + row * C;
    U* dy = static_cast<U*>(a.out) + row * C;
    for_columns(C, [=](int64_t i, int64_t n) {
      const Vec d = load(dz + i, n);
      store(dgate + i, load(dgate + i) + d * load_as<T>(y + i, n));
      store_as<T>(dy + i, d * load(gate + i, n), n);
    });
  }
}

}  // namespace

void gate_residual_forward(const GateResidual& a, int64_t begin, int64_t end) {
  const auto rows = a.f.bf16 ? a.branch_bf16 ? forward_rows<Bf16, Bf16> : forward_rows<Bf16, float>
                    : a.branch_bf16 ? forward_rows<float, Bf16>
                                    : forward_rows<float, float>;
  rows(a, begin, end);
}

void gate_residual_backward(const GateResidual& a, int64_t begin, int64_t end) {
  const auto one = a.f.bf16 ? a.branch_bf16 ? backward_unit<Bf16, Bf16> : backward_unit<Bf16, float>
                   : a.branch_bf16 ? backward_unit<float, Bf16>
                                   : backward_unit<float, float>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, unit);
}

void gate_residual_reduce(const GateResidual& a, void* dgate, int64_t begin, int64_t end) {
  reduce_units(a.f, a.partial, 1, dgate, begin, end);
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND

namespace opensora {

SIMD_DECLARE(gate_residual_forward, const GateResidual&, int64_t, int64_t)
SIMD_DECLARE(gate_residual_backward, const GateResidual&, int64_t, int64_t)
SIMD_DECLARE(gate_residual_reduce, const GateResidual&, void*, int64_t, int64_t)

namespace {

Tensor forward(const Tensor& x, const Tensor& y, const Tensor& gate,
               const std::optional<Tensor>& select, const std::optional<Tensor>& gate0) {
  GateResidual a{};
  a.f = frames_of(x, select);
  CHECK_BRANCH(y, x);
  a.gate = modulation_of(x, select, gate, gate0);
  a.branch_bf16 = y.scalar_type() == ScalarType::BFloat16;
  Tensor z = torch::stable::empty_like(x);
  if (x.numel() == 0) return z;
  a.x = x.const_data_ptr();
  a.y = y.const_data_ptr();
  a.out = z.mutable_data_ptr();
  const auto kernel = SIMD_CALL(gate_residual_forward);
  for_rows(a.f, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return z;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dz, const Tensor& y, const Tensor& gate,
                                    const std::optional<Tensor>& select,
                                    const std::optional<Tensor>& gate0) {
  GateResidual a{};
  a.f = frames_of(dz, select);
  CHECK_BRANCH(y, dz);
  a.gate = modulation_of(dz, select, gate, gate0);
  a.branch_bf16 = y.scalar_type() == ScalarType::BFloat16;
  const int64_t sums = select ? 2 : 1;
  Tensor dy = torch::stable::empty_like(y);
  Tensor dgate = torch::stable::new_empty(dz, {a.f.B, sums, a.f.C});
  Tensor partial =
      torch::stable::new_empty(dz, {a.f.B * a.f.T * a.f.chunks, a.f.padded}, ScalarType::Float);
  a.x = dz.const_data_ptr();
  a.y = y.const_data_ptr();
  a.out = dy.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr<float>();
  const auto kernel = SIMD_CALL(gate_residual_backward);
  const auto reduce = SIMD_CALL(gate_residual_reduce);
  void* gradients = dgate.mutable_data_ptr();
  for_units(
      a.f, sums, [&](int64_t begin, int64_t end) { kernel(a, begin, end); },
      [&](int64_t begin, int64_t end) { reduce(a, gradients, begin, end); });
  return {dy, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("gate_residual_forward", TORCH_BOX(&forward));
  m.impl("gate_residual_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
