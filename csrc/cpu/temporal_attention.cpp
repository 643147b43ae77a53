// Attention of each patch, in each head, to itself in all frames; contract in
// opensora/ops/temporal_attention.py, norm and rotation in heads.h.
//
//   forward   p = round(softmax(q k' / sqrt(D))),  y = p v
//   backward  dv = p' dy, ds = p * (dp - sum(p * dp)) / sqrt(D) with dp = dy v', dq = ds k, dk =
//   ds' q
//
// Memory-bound for few frames: a patch is read once, row by row, its heads prepared on the way into
// the second cache level; everything after that stays there. Axes: B batch, T frames, S patches,
// H heads, D head width.
#include "attention.h"

namespace opensora {

struct TemporalAttention {
  const void* qkv;                             // [B, T, S, 3, H, D], the last three dense
  int64_t batch_stride, frame_stride, stride;  // of qkv, in elements
  void* out;                                   // [B, T, S, H * D]; or dqkv, dense
  const void* grad;                            // [B, T, S, H * D], backward only
  float* partial;                              // [B * S, 2, 2, pairs], backward only
  HeadRules rules;
  int64_t B, T, S, H, D;
  float scale;
  bool bf16;
};

namespace OPENSORA_SIMD {
namespace {

// Rows of queries at a time.
constexpr int64_t BLOCK_ROWS = 16;

// Words of the second cache level that the heads of a group fill: all 16 of 64 frames, so that a
// row is read in one piece (in two: 6 % slower).
constexpr int64_t GROUP_WORDS = 1 << 17;

template <class T>
struct Forward {
  int64_t group;               // heads at a time
  int64_t words, padded;       // of a row of q or k; frames in whole vectors
  int64_t rows, pairs, width;  // of q; of v: rows in words, and words per row
  uint32_t *q, *k, *kt, *v, *p;
  float* s;
  int64_t total;

  Forward(const TemporalAttention& a, uint32_t* memory) {
    words = (a.D + PER_WORD<T> - 1) / PER_WORD<T>;
    padded = rounded_up(a.T, LANES);
    rows = rounded_up(a.T, BLOCK_ROWS);
    pairs = (a.T + PER_WORD<T> - 1) / PER_WORD<T>;
    width = Columns(a.D).width();
    const int64_t head = (rows + padded) * words + pairs * width;
    group = GROUP_WORDS / head;
    group = group < 1 ? 1 : group > a.H ? a.H : group;
    Memory m{memory, 0};
    q = m.take(group * rows * words);
    k = m.take(group * padded * words + LANES);  // transpose() reads whole squares
    kt = m.take(words * padded);
    v = m.take(group * pairs * width);
    s = m.floats(BLOCK_ROWS * padded);
    p = sizeof(T) == 4 ? (uint32_t*)s : m.take(BLOCK_ROWS * padded / PER_WORD<T>);
    total = m.words;
  }
};

template <class T>
const T* row_of(const TemporalAttention& a, int64_t unit, int64_t frame) {
  return static_cast<const T*>(a.qkv) + unit / a.S * a.batch_stride + frame * a.frame_stride +
         unit % a.S * a.stride;
}

template <class T>
__attribute__((flatten)) void forward_patches(const TemporalAttention& a, int64_t begin,
                                              int64_t end, uint32_t* memory) {
  const Forward<T> f(a, memory);
  const Prepare<T> prepare = prepare_of<T>(a.D);
  const Columns c(a.D);
  const int64_t W = f.words * PER_WORD<T>;
  for (int64_t unit = begin; unit < end; ++unit) {
    T* out = static_cast<T*>(a.out) + (unit / a.S * a.T * a.S + unit % a.S) * a.H * a.D;
    for (int64_t first = 0; first < a.H; first += f.group) {
      const int64_t heads = first + f.group < a.H ? f.group : a.H - first;
      for (int64_t t = 0; t < a.T; ++t) {
        const T* row = row_of<T>(a, unit, t) + first * a.D;
        const Head of_q = head_of(a.rules, t, 0), of_k = head_of(a.rules, t, 1);
        prepare.forward(row, a.D, (T*)f.q + t * W, f.rows * W, heads, of_q);
        prepare.forward(row + a.H * a.D, a.D, (T*)f.k + t * W, f.padded * W, heads, of_k);
        if (t % PER_WORD<T> != 0) continue;
        const T* values = row + 2 * a.H * a.D;
        const T* next = t + 1 < a.T ? values + a.frame_stride : nullptr;
        for (int64_t h = 0; h < heads; ++h) {
          lay_values(values + h * a.D, next == nullptr ? nullptr : next + h * a.D, c,
                     f.v + (h * f.pairs + t / PER_WORD<T>)*f.width);
        }
      }
      for (int64_t h = 0; h < heads; ++h) {
        transpose(f.k + h * f.padded * f.words, f.words, f.kt, f.padded, f.padded, f.words);
        for (int64_t from = 0; from < a.T; from += BLOCK_ROWS) {
          const int64_t rows = from + BLOCK_ROWS < a.T ? BLOCK_ROWS : a.T - from;
          multiply<T>({f.q + (h * f.rows + from) * f.words, f.words, 1}, f.kt, f.padded, rows,
                      f.padded, f.words, [&](int64_t r, int64_t i, Floats one, Floats other) {
                        *(FloatsAt*)(f.s + r * f.padded + i) = one;
                        if (i + LANES < f.padded)
                          *(FloatsAt*)(f.s + r * f.padded + i + LANES) = other;
                      });
          softmax(f.s, f.padded, rows, a.T, a.scale);
          for (int64_t r = 0; r < rows; ++r) {
            pack(f.s + r * f.padded, f.padded, (T*)f.p + r * f.padded);
          }
          T* to = out + from * a.S * a.H * a.D + (first + h) * a.D;
          multiply<T>({f.p, f.padded / PER_WORD<T>, 1}, f.v + h * f.pairs * f.width, f.width, rows,
                      f.width, f.pairs, [&](int64_t r, int64_t i, Floats one, Floats other) {
                        if (r >= rows) return;
                        store_values(to + r * a.S * a.H * a.D, c, i, Vec{one, other});
                      });
        }
      }
    }
  }
}

// One unit is a patch; its sums go to its own row of `partial`.
template <class T>
void backward_patches(const TemporalAttention& a, int64_t begin, int64_t end, uint32_t* memory) {
  Gradients<T> gradients(a.rules, a.scale, a.T, memory);
  const int64_t pairs = a.rules.pairs, row = a.H * a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dweight = a.partial + unit * 4 * pairs;
    __builtin_memset(dweight, 0, sizeof(float) * 4 * pairs);
    const int64_t token = unit / a.S * a.T * a.S + unit % a.S;
    for (int64_t h = 0; h < a.H; ++h) {
      const T* q = row_of<T>(a, unit, 0) + h * a.D;
      const T* dy = static_cast<const T*>(a.grad) + token * row + h * a.D;
      T* dq = static_cast<T*>(a.out) + token * 3 * row + h * a.D;
      gradients.keys(q + row, q + 2 * row, a.frame_stride, a.T);
      gradients.queries({q, a.frame_stride, dy, a.S * row, dq, a.S * 3 * row, a.T}, dweight);
      gradients.store_keys(dq + row, dq + 2 * row, a.S * 3 * row, dweight + 2 * pairs);
    }
  }
}

}  // namespace

// `memory`: as many words as the function after it says.
void temporal_attention_forward(const TemporalAttention& a, int64_t begin, int64_t end,
                                uint32_t* memory) {
  a.bf16 ? forward_patches<Bf16>(a, begin, end, memory)
         : forward_patches<float>(a, begin, end, memory);
}

int64_t temporal_attention_forward_words(const TemporalAttention& a) {
  return a.bf16 ? Forward<Bf16>(a, nullptr).total : Forward<float>(a, nullptr).total;
}

void temporal_attention_backward(const TemporalAttention& a, int64_t begin, int64_t end,
                                 uint32_t* memory) {
  a.bf16 ? backward_patches<Bf16>(a, begin, end, memory)
         : backward_patches<float>(a, begin, end, memory);
}

int64_t temporal_attention_backward_words(const TemporalAttention& a) {
  return a.bf16 ? Gradients<Bf16>(a.rules, a.scale, a.T, nullptr).words()
                : Gradients<float>(a.rules, a.scale, a.T, nullptr).words();
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
namespace opensora {

SIMD_DECLARE(temporal_attention_forward, const TemporalAttention&, int64_t, int64_t, uint32_t*)
SIMD_DECLARE_RETURNING(int64_t, temporal_attention_forward_words, const TemporalAttention&)
SIMD_DECLARE(temporal_attention_backward, const TemporalAttention&, int64_t, int64_t, uint32_t*)
SIMD_DECLARE_RETURNING(int64_t, temporal_attention_backward_words, const TemporalAttention&)

namespace {

// Return the arguments that forward and backward share.
TemporalAttention arguments(const Tensor& qkv, const HeadTables& tables) {
  TemporalAttention a{};
  a.rules = tables.rules();
  a.B = qkv.size(0), a.T = qkv.size(1), a.S = qkv.size(2), a.H = qkv.size(4), a.D = qkv.size(5);
  a.batch_stride = qkv.stride(0), a.frame_stride = qkv.stride(1), a.stride = qkv.stride(2);
  a.scale = scale_of(a.D);
  a.bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  a.qkv = qkv.const_data_ptr();
  return a;
}

int64_t frames_of(const Tensor& qkv) {
  CHECK_KERNEL_DTYPE(qkv);
  STD_TORCH_CHECK(qkv.dim() == 6 && qkv.size(3) == 3 &&
                      (qkv.numel() == 0 || (qkv.stride(5) == 1 && qkv.stride(4) == qkv.size(5) &&
                                            qkv.stride(3) == qkv.size(4) * qkv.size(5))),
                  "qkv must be [B, T, S, 3, H, D], its last three dimensions dense");
  return qkv.size(1);
}

// Patches per task: below this much work another thread costs more than it brings.
int64_t grain(const TemporalAttention& a) { return GRAIN_ELEMENTS / (3 * a.T * a.H * a.D + 1) + 1; }

Tensor forward(const Tensor& qkv, const std::optional<Tensor>& q_weight,
               const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, double eps) {
  const int64_t frames = frames_of(qkv);
  const HeadTables tables(qkv.size(5), frames, q_weight, k_weight, cos, sin, false, eps);
  TemporalAttention a = arguments(qkv, tables);
  Tensor y = torch::stable::new_empty(qkv, {a.B, a.T, a.S, a.H * a.D});
  if (y.numel() == 0) return y;
  a.out = y.mutable_data_ptr();
  for_units(a, a.B * a.S, grain(a), SIMD_CALL(temporal_attention_forward_words)(a),
            SIMD_CALL(temporal_attention_forward));
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& qkv,
                                    const std::optional<Tensor>& q_weight,
                                    const std::optional<Tensor>& k_weight,
                                    const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin, double eps) {
  const int64_t frames = frames_of(qkv);
  const HeadTables tables(qkv.size(5), frames, q_weight, k_weight, cos, sin, false, eps);
  TemporalAttention a = arguments(qkv, tables);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() * 3 == qkv.numel() &&
                      grad.scalar_type() == qkv.scalar_type(),
                  "grad must be contiguous [B, T, S, H * D] of qkv's dtype");
  Tensor dqkv = torch::stable::new_empty(qkv, {a.B, a.T, a.S, 3, a.H, a.D});
  Tensor dweights = torch::stable::new_empty(qkv, {2, q_weight ? a.D : 0}, ScalarType::Float);
  const int64_t units = qkv.numel() == 0 ? 0 : a.B * a.S;
  std::vector<float> partial(units * 4 * a.rules.pairs);
  a.grad = grad.const_data_ptr();
  a.out = dqkv.mutable_data_ptr();
  a.partial = partial.data();
  if (units > 0) {
    for_units(a, units, grain(a), SIMD_CALL(temporal_attention_backward_words)(a),
              SIMD_CALL(temporal_attention_backward));
  }
  sum_dweights(a.rules, partial, units, dweights);
  return {dqkv, dweights};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("temporal_attention_forward", TORCH_BOX(&forward));
  m.impl("temporal_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
