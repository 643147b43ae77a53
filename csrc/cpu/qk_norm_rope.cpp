// RMSNorm of queries and keys, then rotary positions (or the other way round); contract in
// opensora/ops/qk_norm_rope.py, arithmetic in heads.h. Memory-bound. Axes: N tokens, H heads, D
// head width.
#include "heads.h"

namespace opensora {

struct QkNormRope {
  const void* qkv;   // [N, 3, H, D]
  const void* grad;  // [N, 3, H, D], backward only
  void* out;         // [N, 3, H, D]; may be qkv itself in the forward
  float* partial;    // [units, 2, 2, pairs], backward only
  HeadRules rules;
  int64_t N, H, D;
  int64_t positions, inner;  // a token's position is token / inner % positions
  bool bf16, inplace;
};

// Tokens that add into one partial sum; fixed, so that gradients do not depend on the threads.
constexpr int64_t TOKENS = 32;

namespace OPENSORA_SIMD {
namespace {

template <class T, class Heads>
__attribute__((flatten)) void forward_tokens(const QkNormRope& a, int64_t begin, int64_t end) {
  const int64_t row = a.H * a.D;
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(a.qkv) + token * 3 * row;
    T* y = static_cast<T*>(a.out) + token * 3 * row;
    for (int64_t part = 0; part < 2; ++part) {
      const Head h = head_of(a.rules, token / a.inner % a.positions, part);
      Heads::forward(x + part * row, a.D, y + part * row, a.D, a.H, h);
    }
    if (!a.inplace) __builtin_memcpy(y + 2 * row, x + 2 * row, sizeof(T) * row);
  }
}

// One unit is TOKENS tokens; its sums go to its own row of `partial`.
template <class T, class Heads>
__attribute__((flatten)) void backward_units(const QkNormRope& a, int64_t begin, int64_t end) {
  const int64_t row = a.H * a.D, pairs = a.rules.pairs;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dweight = a.partial + unit * 4 * pairs;
    __builtin_memset(dweight, 0, sizeof(float) * 4 * pairs);
    const int64_t last = (unit + 1) * TOKENS < a.N ? (unit + 1) * TOKENS : a.N;
    for (int64_t token = unit * TOKENS; token < last; ++token) {
      const T* grad = static_cast<const T*>(a.grad) + token * 3 * row;
      const T* x = static_cast<const T*>(a.qkv) + token * 3 * row;
      T* dx = static_cast<T*>(a.out) + token * 3 * row;
      for (int64_t part = 0; part < 2; ++part) {
        const Head h = head_of(a.rules, token / a.inner % a.positions, part);
        // Heads, then tokens, then units: errors grow with the longest of the three sums.
        float sums[MOST_COLUMNS];
        __builtin_memset(sums, 0, sizeof(float) * 2 * pairs);
        for (int64_t i = part * row; i < (part + 1) * row; i += a.D) {
          Heads::backward(grad + i, x + i, dx + i, sums, pairs, h);
        }
        float* unit_sums = dweight + part * 2 * pairs;
        for (int64_t i = 0; i < 2 * pairs; ++i) unit_sums[i] += sums[i];
      }
      __builtin_memcpy(dx + 2 * row, grad + 2 * row, sizeof(T) * row);
    }
  }
}

template <class T>
void forward(const QkNormRope& a, int64_t begin, int64_t end) {
  choose<T>(a.D, [&](auto heads) { forward_tokens<T, decltype(heads)>(a, begin, end); });
}

template <class T>
void backward(const QkNormRope& a, int64_t begin, int64_t end) {
  choose<T>(a.D, [&](auto heads) { backward_units<T, decltype(heads)>(a, begin, end); });
}

}  // namespace

void qk_norm_rope_forward(const QkNormRope& a, int64_t begin, int64_t end) {
  a.bf16 ? forward<Bf16>(a, begin, end) : forward<float>(a, begin, end);
}

void qk_norm_rope_backward(const QkNormRope& a, int64_t begin, int64_t end) {
  a.bf16 ? backward<Bf16>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
namespace opensora {

SIMD_DECLARE(qk_norm_rope_forward, const QkNormRope&, int64_t, int64_t)
SIMD_DECLARE(qk_norm_rope_backward, const QkNormRope&, int64_t, int64_t)

namespace {

// Return the arguments that all three ops share.
QkNormRope arguments(const Tensor& qkv, const HeadTables& tables, int64_t position_dim) {
  QkNormRope a{};
  const int64_t dims = qkv.dim();
  a.rules = tables.rules();
  a.H = qkv.size(dims - 2);
  a.D = qkv.size(dims - 1);
  a.N = qkv.numel() == 0 ? 0 : qkv.numel() / (3 * a.H * a.D);
  a.positions = qkv.size(dims + position_dim);
  a.inner = 1;
  for (int64_t i = dims + position_dim + 1; i < dims - 3; ++i) a.inner *= qkv.size(i);
  a.bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  a.qkv = qkv.const_data_ptr();
  return a;
}

// Return the number of positions that qkv's tokens take, one after the other.
int64_t positions_of(const Tensor& qkv, int64_t position_dim) {
  CHECK_KERNEL_DTYPE(qkv);
  const int64_t dims = qkv.dim();
  STD_TORCH_CHECK(qkv.is_contiguous() && dims >= 4 && qkv.size(dims - 3) == 3 &&
                      -dims <= position_dim && position_dim <= -4,
                  "qkv must be contiguous [..., N, ..., 3, H, D]");
  return qkv.size(dims + position_dim);
}

void run(const QkNormRope& a) {
  const auto kernel = SIMD_CALL(qk_norm_rope_forward);
  parallel_for(0, a.N, GRAIN_ELEMENTS / (3 * a.H * a.D + 1) + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor forward(const Tensor& qkv, const std::optional<Tensor>& q_weight,
               const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, int64_t position_dim, bool legacy, double eps) {
  const HeadTables tables(qkv.size(-1), positions_of(qkv, position_dim), q_weight, k_weight, cos,
                          sin, legacy, eps);
  QkNormRope a = arguments(qkv, tables, position_dim);
  Tensor y = torch::stable::empty_like(qkv);
  a.out = y.mutable_data_ptr();
  if (a.N > 0) run(a);
  return y;
}

void inplace(const Tensor& qkv, const std::optional<Tensor>& q_weight,
             const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
             const std::optional<Tensor>& sin, int64_t position_dim, bool legacy, double eps) {
  const HeadTables tables(qkv.size(-1), positions_of(qkv, position_dim), q_weight, k_weight, cos,
                          sin, legacy, eps);
  QkNormRope a = arguments(qkv, tables, position_dim);
  a.out = qkv.mutable_data_ptr();
  a.inplace = true;
  if (a.N > 0) run(a);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& qkv,
                                    const std::optional<Tensor>& q_weight,
                                    const std::optional<Tensor>& k_weight,
                                    const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin, int64_t position_dim,
                                    bool legacy, double eps) {
  const HeadTables tables(qkv.size(-1), positions_of(qkv, position_dim), q_weight, k_weight, cos,
                          sin, legacy, eps);
  QkNormRope a = arguments(qkv, tables, position_dim);
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  CHECK_LIKE(grad, qkv);
  const int64_t units = (a.N + TOKENS - 1) / TOKENS;
  std::vector<float> partial(units * 4 * a.rules.pairs);
  Tensor dqkv = torch::stable::empty_like(qkv);
  Tensor dweights = torch::stable::new_empty(qkv, {2, q_weight ? a.D : 0}, ScalarType::Float);
  a.grad = grad.const_data_ptr();
  a.out = dqkv.mutable_data_ptr();
  a.partial = partial.data();
  const auto kernel = SIMD_CALL(qk_norm_rope_backward);
  parallel_for(0, units, GRAIN_ELEMENTS / (3 * a.H * a.D * TOKENS + 1) + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  sum_dweights(a.rules, partial, units, dweights);
  return {dqkv, dweights};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("qk_norm_rope_forward", TORCH_BOX(&forward));
  m.impl("qk_norm_rope_inplace", TORCH_BOX(&inplace));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
