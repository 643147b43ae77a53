// Attention of the tokens of each frame to one another; contract in
// opensora/ops/spatial_attention.py, arithmetic in attention.h.
//
// Bound by products. Axes: B batch, T frames, S tokens per frame, H heads, D head width.
#include "attention.h"

namespace opensora {

struct SpatialAttention {
  const void* qkv;     // [B, T, S, 3, H, D], D dense
  int64_t strides[5];  // of all other axes, in elements
  void* y;             // [B, T, S, H * D]; or dqkv, dense
  const void* grad;    // [B, T, S, H * D], backward only
  float* partial;      // [B * T * H, 2, 2, pairs], backward only
  float* stats;        // forward only, [1 or 3, B, T, H, S]
  HeadRules rules;
  int64_t B, T, S, H, D;
  int64_t chunks;  // of a frame's queries
  float scale;
  bool bf16;
};

// Queries per unit of work: preparing the keys once more is 3 % of the work then.
constexpr int64_t QUERIES = 512;

namespace OPENSORA_SIMD {
namespace {

template <class T>
float reciprocal_rms(const T* x, int64_t D, float eps) {
  const float squares = sum_columns(D, [=](int64_t i, int64_t n) {
    const Vec v = load(x + i, n);
    return v * v;
  });
  return 1.0f / __builtin_sqrtf(squares / D + eps);
}

// One unit is a chunk of the queries of one head of one frame.
template <class T>
void forward(const SpatialAttention& a, int64_t begin, int64_t end, uint32_t* memory) {
  Flash<T> flash(a.rules, a.scale, a.S, memory);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / a.chunks, first = unit % a.chunks * QUERIES;
    const int64_t frame = head / a.H, h = head % a.H;
    const T* q = static_cast<const T*>(a.qkv) + frame / a.T * a.strides[0] +
                 frame % a.T * a.strides[1] + h * a.strides[4];
    const T* k = q + a.strides[3];
    if (unit == begin || first == 0) flash.keys(k, k + a.strides[3], a.strides[2], a.S);
    const int64_t count = first + QUERIES < a.S ? QUERIES : a.S - first;
    T* y = static_cast<T*>(a.y) + ((frame * a.S + first) * a.H + h) * a.D;
    float* stats = a.stats + head * a.S + first;
    flash.queries(q + first * a.strides[2], a.strides[2], count, y, a.H * a.D, stats);
    if (a.rules.weights == nullptr) continue;
    for (int64_t part = 1; part < 3; ++part) {
      const T* x = q + (part - 1) * a.strides[3] + first * a.strides[2];
      float* rstd = stats + part * a.B * a.T * a.H * a.S;
      for (int64_t i = 0; i < count; ++i) {
        rstd[i] = reciprocal_rms(x + i * a.strides[2], a.D, a.rules.eps);
      }
    }
  }
}

// One unit is one head of one frame; its sums go to its own row of `partial`.
template <class T>
void backward(const SpatialAttention& a, int64_t begin, int64_t end, uint32_t* memory) {
  Gradients<T> gradients(a.rules, a.scale, a.S, memory);
  const int64_t pairs = a.rules.pairs, row = a.H * a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dweight = a.partial + unit * 4 * pairs;
    __builtin_memset(dweight, 0, sizeof(float) * 4 * pairs);
    const int64_t frame = unit / a.H, h = unit % a.H;
    const T* q = static_cast<const T*>(a.qkv) + frame / a.T * a.strides[0] +
                 frame % a.T * a.strides[1] + h * a.strides[4];
    const T* k = q + a.strides[3];
    const T* dy = static_cast<const T*>(a.grad) + frame * a.S * row + h * a.D;
    T* dq = static_cast<T*>(a.y) + frame * a.S * 3 * row + h * a.D;
    gradients.keys(k, k + a.strides[3], a.strides[2], a.S);
    gradients.queries({q, a.strides[2], dy, row, dq, 3 * row, a.S}, dweight);
    gradients.store_keys(dq + row, dq + 2 * row, 3 * row, dweight + 2 * pairs);
  }
}

}  // namespace

// `memory`: as many words as the function after it says.
void spatial_attention_forward(const SpatialAttention& a, int64_t begin, int64_t end,
                               uint32_t* memory) {
  a.bf16 ? forward<Bf16>(a, begin, end, memory) : forward<float>(a, begin, end, memory);
}

int64_t spatial_attention_forward_words(const SpatialAttention& a) {
  return a.bf16 ? Flash<Bf16>(a.rules, a.scale, a.S, nullptr).words()
                : Flash<float>(a.rules, a.scale, a.S, nullptr).words();
}

void spatial_attention_backward(const SpatialAttention& a, int64_t begin, int64_t end,
                                uint32_t* memory) {
  a.bf16 ? backward<Bf16>(a, begin, end, memory) : backward<float>(a, begin, end, memory);
}

int64_t spatial_attention_backward_words(const SpatialAttention& a) {
  return a.bf16 ? Gradients<Bf16>(a.rules, a.scale, a.S, nullptr).words()
                : Gradients<float>(a.rules, a.scale, a.S, nullptr).words();
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
namespace opensora {

SIMD_DECLARE(spatial_attention_forward, const SpatialAttention&, int64_t, int64_t, uint32_t*)
SIMD_DECLARE_RETURNING(int64_t, spatial_attention_forward_words, const SpatialAttention&)
SIMD_DECLARE(spatial_attention_backward, const SpatialAttention&, int64_t, int64_t, uint32_t*)
SIMD_DECLARE_RETURNING(int64_t, spatial_attention_backward_words, const SpatialAttention&)

namespace {

void check(const Tensor& qkv) {
  CHECK_KERNEL_DTYPE(qkv);
  STD_TORCH_CHECK(qkv.dim() == 6 && qkv.size(3) == 3 && (qkv.stride(5) == 1 || qkv.size(5) == 1),
                  "qkv must be [B, T, S, 3, H, D] with D dense");
}

// Return the arguments that forward and backward share.
SpatialAttention arguments(const Tensor& qkv, const HeadTables& tables) {
  SpatialAttention a{};
  a.rules = tables.rules();
  a.B = qkv.size(0), a.T = qkv.size(1), a.S = qkv.size(2), a.H = qkv.size(4), a.D = qkv.size(5);
  for (int64_t i = 0; i < 5; ++i) a.strides[i] = qkv.stride(i);
  a.chunks = (a.S + QUERIES - 1) / QUERIES;
  a.scale = scale_of(a.D);
  a.bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  a.qkv = qkv.const_data_ptr();
  return a;
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                                   const std::optional<Tensor>& k_weight, double eps) {
  check(qkv);
  const HeadTables tables(qkv.size(5), 1, q_weight, k_weight, {}, {}, false, eps);
  SpatialAttention a = arguments(qkv, tables);
  Tensor y = torch::stable::new_empty(qkv, {a.B, a.T, a.S, a.H * a.D});
  Tensor stats =
      torch::stable::new_empty(qkv, {q_weight ? 3 : 1, a.B, a.T, a.H, a.S}, ScalarType::Float);
  if (y.numel() == 0) return {y, stats};
  a.y = y.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr<float>();
  const int64_t unit = (a.S < QUERIES ? a.S : QUERIES) * a.S * a.D;
  for_units(a, a.B * a.T * a.H * a.chunks, 16 * GRAIN_ELEMENTS / (unit + 1) + 1,
            SIMD_CALL(spatial_attention_forward_words)(a), SIMD_CALL(spatial_attention_forward));
  return {y, stats};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& qkv,
                                    const std::optional<Tensor>& q_weight,
                                    const std::optional<Tensor>& k_weight, const Tensor&,
                                    const Tensor&, double eps) {
  check(qkv);
  const HeadTables tables(qkv.size(5), 1, q_weight, k_weight, {}, {}, false, eps);
  SpatialAttention a = arguments(qkv, tables);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() * 3 == qkv.numel() &&
                      grad.scalar_type() == qkv.scalar_type(),
                  "grad must be contiguous [B, T, S, H * D] of qkv's dtype");
  Tensor dqkv = torch::stable::new_empty(qkv, {a.B, a.T, a.S, 3, a.H, a.D});
  Tensor dweights =
      torch::stable::new_empty(qkv, {q_weight ? 2 : 0, q_weight ? a.D : 0}, ScalarType::Float);
  const int64_t units = qkv.numel() == 0 ? 0 : a.B * a.T * a.H;
  std::vector<float> partial(units * 4 * a.rules.pairs);
  a.grad = grad.const_data_ptr();
  a.y = dqkv.mutable_data_ptr();
  a.partial = partial.data();
  if (units > 0) {
    for_units(a, units, 16 * GRAIN_ELEMENTS / (a.S * a.S * a.D + 1) + 1,
              SIMD_CALL(spatial_attention_backward_words)(a),
              SIMD_CALL(spatial_attention_backward));
  }
  sum_dweights(a.rules, partial, units, dweights);
  return {dqkv, dweights};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("spatial_attention_backward", TORCH_BOX(&backward));
  m.impl("spatial_attention_forward", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
