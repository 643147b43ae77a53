// Attention of the tokens of every sample to its own rows of the text; contract in
// opensora/ops/cross_attention.py, arithmetic in attention.h.
//
// Bound by products. Axes: B batch, N tokens, L rows of text, H heads, D head width.
#include "attention.h"

namespace opensora {

struct CrossAttention {
  const void* q;                    // [B, N, H, D], D dense
  int64_t q_strides[3];             // of B, N and H, in elements
  const void* kv;                   // [L, 2, H, D], D dense
  int64_t kv_strides[3];            // of L, keys or values, and H
  const int32_t *starts, *lengths;  // [B], rows of kv
  void* y;                          // [B, N, H * D]; or dq
  const void* grad;                 // [B, N, H * D], backward only
  void* dkv;                        // [L, 2, H, D] or null, backward only
  float* lse;                       // forward only, [B, H, N]
  HeadRules rules;
  int64_t B, N, H, D, longest;
  int64_t chunks;  // of a sample's tokens
  float scale;
  bool bf16;
};

// Tokens per unit of work: preparing the keys of a long text once more is 15 % of the work then.
constexpr int64_t TOKENS_OF_UNIT = 512;

namespace OPENSORA_SIMD {
namespace {

// One unit is a chunk of the tokens of one head of one sample.
template <class T>
void forward(const CrossAttention& a, int64_t begin, int64_t end, uint32_t* memory) {
  Flash<T> flash(a.rules, a.scale, a.longest, memory);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / a.chunks, first = unit % a.chunks * TOKENS_OF_UNIT;
    const int64_t sample = head / a.H, h = head % a.H;
    if (unit == begin || first == 0) {
      const T* k =
          static_cast<const T*>(a.kv) + a.starts[sample] * a.kv_strides[0] + h * a.kv_strides[2];
      flash.keys(k, k + a.kv_strides[1], a.kv_strides[0], a.lengths[sample]);
    }
    const int64_t count = first + TOKENS_OF_UNIT < a.N ? TOKENS_OF_UNIT : a.N - first;
    const T* q = static_cast<const T*>(a.q) + sample * a.q_strides[0] + first * a.q_strides[1] +
                 h * a.q_strides[2];
    T* y = static_cast<T*>(a.y) + ((sample * a.N + first) * a.H + h) * a.D;
    flash.queries(q, a.q_strides[1], count, y, a.H * a.D, a.lse + head * a.N + first);
  }
}

// One unit is one head of one sample.
template <class T>
void backward(const CrossAttention& a, int64_t begin, int64_t end, uint32_t* memory) {
  Gradients<T> gradients(a.rules, a.scale, a.longest, memory);
  const int64_t row = a.H * a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / a.H, h = unit % a.H;
    const T* k =
        static_cast<const T*>(a.kv) + a.starts[sample] * a.kv_strides[0] + h * a.kv_strides[2];
    const T* q = static_cast<const T*>(a.q) + sample * a.q_strides[0] + h * a.q_strides[2];
    const int64_t at = sample * a.N * row + h * a.D;
    gradients.keys(k, k + a.kv_strides[1], a.kv_strides[0], a.lengths[sample]);
    gradients.queries({q, a.q_strides[1], static_cast<const T*>(a.grad) + at, row,
                       static_cast<T*>(a.y) + at, row, a.N},
                      nullptr);
    if (a.dkv == nullptr) continue;
    T* dk = static_cast<T*>(a.dkv) + a.starts[sample] * 2 * row + h * a.D;
    gradients.store_keys(dk, dk + row, 2 * row, nullptr);
  }
}

}  // namespace

// `memory`: as many words as the function after it says.
void cross_attention_forward(const CrossAttention& a, int64_t begin, int64_t end,
                             uint32_t* memory) {
  a.bf16 ? forward<Bf16>(a, begin, end, memory) : forward<float>(a, begin, end, memory);
}

int64_t cross_attention_forward_words(const CrossAttention& a) {
  return a.bf16 ? Flash<Bf16>(a.rules, a.scale, a.longest, nullptr).words()
                : Flash<float>(a.rules, a.scale, a.longest, nullptr).words();
}

void cross_attention_backward(const CrossAttention& a, int64_t begin, int64_t end,
                              uint32_t* memory) {
  a.bf16 ? backward<Bf16>(a, begin, end, memory) : backward<float>(a, begin, end, memory);
}

int64_t cross_attention_backward_words(const CrossAttention& a) {
  return a.bf16 ? Gradients<Bf16>(a.rules, a.scale, a.longest, nullptr).words()
                : Gradients<float>(a.rules, a.scale, a.longest, nullptr).words();
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
namespace opensora {

SIMD_DECLARE(cross_attention_forward, const CrossAttention&, int64_t, int64_t, uint32_t*)
SIMD_DECLARE_RETURNING(int64_t, cross_attention_forward_words, const CrossAttention&)
SIMD_DECLARE(cross_attention_backward, const CrossAttention&, int64_t, int64_t, uint32_t*)
SIMD_DECLARE_RETURNING(int64_t, cross_attention_backward_words, const CrossAttention&)

namespace {

void check(const Tensor& q, const Tensor& kv, const Tensor& starts, const Tensor& lengths) {
  CHECK_KERNEL_DTYPE(q);
  STD_TORCH_CHECK(q.dim() == 4 && (q.stride(3) == 1 || q.size(3) == 1),
                  "q must be [B, N, H, D] with D dense");
  STD_TORCH_CHECK(kv.dim() == 4 && kv.size(1) == 2 && kv.size(2) == q.size(2) &&
                      kv.size(3) == q.size(3) && kv.scalar_type() == q.scalar_type() &&
                      (kv.stride(3) == 1 || kv.size(3) == 1),
                  "kv must be [L, 2, H, D] of q's dtype with D dense");
  for (const Tensor* rows : {&starts, &lengths}) {
    STD_TORCH_CHECK(rows->dim() == 1 && rows->size(0) == q.size(0) && rows->is_contiguous() &&
                        rows->scalar_type() == ScalarType::Int,
                    "starts and lengths must be dense int32 [B]");
  }
}

// Return the arguments that forward and backward share.
CrossAttention arguments(const Tensor& q, const Tensor& kv, const Tensor& starts,
                         const Tensor& lengths, const HeadTables& tables) {
  CrossAttention a{};
  a.rules = tables.rules();
  a.B = q.size(0), a.N = q.size(1), a.H = q.size(2), a.D = q.size(3);
  for (int64_t i = 0; i < 3; ++i) a.q_strides[i] = q.stride(i), a.kv_strides[i] = kv.stride(i);
  a.starts = starts.const_data_ptr<int32_t>();
  a.lengths = lengths.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < a.B; ++b) {
    STD_TORCH_CHECK(
        a.starts[b] >= 0 && a.lengths[b] >= 0 && int64_t{a.starts[b]} + a.lengths[b] <= kv.size(0),
        "starts and lengths must name rows of kv");
    if (a.lengths[b] > a.longest) a.longest = a.lengths[b];
  }
  a.chunks = (a.N + TOKENS_OF_UNIT - 1) / TOKENS_OF_UNIT;
  a.scale = scale_of(a.D);
  a.bf16 = q.scalar_type() == ScalarType::BFloat16;
  a.q = q.const_data_ptr();
  a.kv = kv.const_data_ptr();
  return a;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& kv, const Tensor& starts,
                                   const Tensor& lengths) {
  check(q, kv, starts, lengths);
  const HeadTables tables(q.size(3), 1, {}, {}, {}, {}, false, 1.0);
  CrossAttention a = arguments(q, kv, starts, lengths, tables);
  Tensor y = torch::stable::new_empty(q, {a.B, a.N, a.H * a.D});
  Tensor lse = torch::stable::new_empty(q, {a.B, a.H, a.N}, ScalarType::Float);
  if (y.numel() == 0) return {y, lse};
  a.y = y.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<float>();
  const int64_t unit = (a.N < TOKENS_OF_UNIT ? a.N : TOKENS_OF_UNIT) * (a.longest + 1) * a.D;
  for_units(a, a.B * a.H * a.chunks, 16 * GRAIN_ELEMENTS / (unit + 1) + 1,
            SIMD_CALL(cross_attention_forward_words)(a), SIMD_CALL(cross_attention_forward));
  return {y, lse};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& kv,
                                    const Tensor& starts, const Tensor& lengths, const Tensor&,
                                    const Tensor&, int64_t, bool text) {
  check(q, kv, starts, lengths);
  const HeadTables tables(q.size(3), 1, {}, {}, {}, {}, false, 1.0);
  CrossAttention a = arguments(q, kv, starts, lengths, tables);
  STD_TORCH_CHECK(
      grad.is_contiguous() && grad.numel() == q.numel() && grad.scalar_type() == q.scalar_type(),
      "grad must be contiguous [B, N, H * D] of q's dtype");
  Tensor dq = torch::stable::new_empty(q, {a.B, a.N, a.H, a.D});
  Tensor dkv = torch::stable::new_empty(q, {0});
  if (text) {  // rows of no sample keep a gradient of zero
    dkv = torch::stable::new_zeros(q, {kv.size(0), 2, a.H, a.D});
    a.dkv = dkv.mutable_data_ptr();
  }
  if (q.numel() == 0) return {dq, dkv};
  a.grad = grad.const_data_ptr();
  a.y = dq.mutable_data_ptr();
  for_units(a, a.B * a.H, 16 * GRAIN_ELEMENTS / (a.N * (a.longest + 1) * a.D + 1) + 1,
            SIMD_CALL(cross_attention_backward_words)(a), SIMD_CALL(cross_attention_backward));
  return {dq, dkv};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("cross_attention_backward", TORCH_BOX(&backward));
  m.impl("cross_attention_forward", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
