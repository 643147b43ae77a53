// RMSNorm of queries and keys, then rotary positions (or the other way round); contract in
// opensora/ops/qk_norm_rope.py.
//
//   forward   n = round(x * rstd) * weight, rotated: (a, b) -> (a c - b s, b c + a s)
//   backward  g = (grad, rotated back) * weight;  dx = rstd * (g - n * mean(g * n))
//             dweight = sum of (grad, rotated back) * n, over tokens and heads
//
// Memory-bound: a head is loaded once and stays in registers. It is held as VECTORS Vecs of pairs;
// where D is no multiple of WIDTH the last one begins early and overlaps the one before: its first
// lanes are computed twice, stored twice and summed once, so no load is ragged (D = 72 = 32 + 32 +
// 8). Axes: N tokens, H heads, D head width.
#include "../simd.h"

namespace opensora {

struct QkNormRope {
  const void* qkv;           // [N, 3, H, D]
  const void* grad;          // [N, 3, H, D], backward only
  void* out;                 // [N, 3, H, D]; may be qkv itself in the forward
  const float* weights;      // [2, 2, pairs]: of q and k, even columns and odd ones; null: no norm
  const float* table;        // [positions, 2, pairs]: cos and sin; null: no rotation
  float* partial;            // [units, 2, 2, pairs], backward only
  int64_t N, H, D, pairs;    // pairs: D / 2, rounded up
  int64_t positions, inner;  // a token's position is token / inner % positions
  float eps;
  bool legacy, bf16, inplace;
};

// Tokens that add into one partial sum; fixed, so that gradients do not depend on the threads.
constexpr int64_t TOKENS = 32;

// The widest head, an even number.
constexpr int64_t MOST_COLUMNS = 4096;

namespace OPENSORA_SIMD {
namespace {

// What a head needs beside its own values.
struct Head {
  const float *even, *odd;  // weight
  const float *cos, *sin;
  int64_t D;
  float eps;
  bool legacy;
};

inline Vec rotate(Vec v, Floats c, Floats s) { return {v.a * c - v.b * s, v.b * c + v.a * s}; }

inline Floats at(const float* from) { return *(const FloatsAt*)from; }

// A head of D even columns, WIDTH or more; VECTORS = 0 where their number is not known before.
template <class T, int VECTORS>
struct Wide {
  static constexpr int64_t MOST = VECTORS > 0 ? VECTORS : 64;

  static int64_t count(int64_t D) { return VECTORS > 0 ? VECTORS : (D + WIDTH - 1) / WIDTH; }
  static int64_t place(int64_t k, int64_t D) { return k + 1 < count(D) ? k * WIDTH : D - WIDTH; }

  // Clear the lanes of the last Vec that the one before holds as well.
  static Vec fresh(Vec v, int64_t k, int64_t D) {
    if (k + 1 < count(D)) return v;
    const int64_t twice = (count(D) * WIDTH - D) / 2;
    Bits keep{};
    for (int64_t i = 0; i < BYTES / 4; ++i) keep[i] = i < twice ? 0u : ~0u;
    return {(Floats)((Bits)v.a & keep), (Floats)((Bits)v.b & keep)};
  }

  static float reciprocal_rms(const Vec* v, const Head& h) {
    Vec squares{};
    for (int64_t k = 0; k < count(h.D); ++k) squares = squares + fresh(v[k] * v[k], k, h.D);
    return 1.0f / __builtin_sqrtf(sum(squares) / h.D + h.eps);
  }

  static void turn(Vec* v, const Head& h, float sign) {
    for (int64_t k = 0; k < count(h.D); ++k) {
      const int64_t pair = place(k, h.D) / 2;
      v[k] = rotate(v[k], at(h.cos + pair), at(h.sin + pair) * sign);
    }
  }

  static void forward(const T* x, T* y, const Head& h) {
    Vec v[MOST];
    for (int64_t k = 0; k < count(h.D); ++k) v[k] = load_pairs(x + place(k, h.D));
    if (h.cos != nullptr && h.legacy) turn(v, h, 1);
    if (h.even != nullptr) {
      const float rstd = reciprocal_rms(v, h);
      for (int64_t k = 0; k < count(h.D); ++k) {
        const int64_t pair = place(k, h.D) / 2;
        const Vec n = rounded_to(x, v[k] * rstd);
        v[k] = {n.a * at(h.even + pair), n.b * at(h.odd + pair)};
      }
    }
    if (h.cos != nullptr && !h.legacy) turn(v, h, 1);
    for (int64_t k = 0; k < count(h.D); ++k) store_pairs(y + place(k, h.D), v[k]);
  }

  // dweight: even columns, then, `pairs` further, odd ones.
  static void backward(const T* grad, const T* x, T* dx, float* dweight, int64_t pairs,
                       const Head& h) {
    Vec g[MOST], v[MOST];
    for (int64_t k = 0; k < count(h.D); ++k) g[k] = load_pairs(grad + place(k, h.D));
    if (h.cos != nullptr && !h.legacy) turn(g, h, -1);
    if (h.even != nullptr) {
      for (int64_t k = 0; k < count(h.D); ++k) v[k] = load_pairs(x + place(k, h.D));
      if (h.cos != nullptr && h.legacy) turn(v, h, 1);
      const float rstd = reciprocal_rms(v, h);
      Vec total{};
      for (int64_t k = 0; k < count(h.D); ++k) {
        const int64_t pair = place(k, h.D) / 2;
        v[k] = v[k] * rstd;
        const Vec share = fresh(g[k] * v[k], k, h.D);
        *(FloatsAt*)(dweight + pair) += share.a;
        *(FloatsAt*)(dweight + pairs + pair) += share.b;
        g[k] = {g[k].a * at(h.even + pair), g[k].b * at(h.odd + pair)};
        total = total + fresh(g[k] * v[k], k, h.D);
      }
      const float mean = sum(total) / h.D;
      for (int64_t k = 0; k < count(h.D); ++k) g[k] = (g[k] - v[k] * mean) * rstd;
    }
    if (h.cos != nullptr && h.legacy) turn(g, h, -1);
    for (int64_t k = 0; k < count(h.D); ++k) store_pairs(dx + place(k, h.D), g[k]);
  }
};

// A head of any width, column by column.
template <class T>
struct Narrow {
  static void read(const T* from, float* to, int64_t D) {
    for (int64_t i = 0; i < D; ++i) to[i] = to_float(from[i]);
  }

  static void write(T* to, const float* from, int64_t D) {
    for (int64_t i = 0; i < D; ++i) put(to + i, from[i]);
  }

  static void put(float* to, float value) { *to = value; }
  static void put(Bf16* to, float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    to->bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }

  static float rounded(float value) {
    T narrow;
    put(&narrow, value);
    return to_float(narrow);
  }

  static float weight(const Head& h, int64_t i) {
    const float* columns = i % 2 ? h.odd : h.even;
    return columns[i / 2];
  }

  static float reciprocal_rms(const float* v, const Head& h) {
    float squares = 0;
    for (int64_t i = 0; i < h.D; ++i) squares += v[i] * v[i];
    return 1.0f / __builtin_sqrtf(squares / h.D + h.eps);
  }

  static void turn(float* v, const Head& h, float sign) {
    for (int64_t i = 0; i + 1 < h.D; i += 2) {
      const float c = h.cos[i / 2], s = h.sin[i / 2] * sign, a = v[i], b = v[i + 1];
      v[i] = a * c - b * s;
      v[i + 1] = b * c + a * s;
    }
  }

  static void forward(const T* x, T* y, const Head& h) {
    float v[MOST_COLUMNS];
    read(x, v, h.D);
    if (h.cos != nullptr && h.legacy) turn(v, h, 1);
    if (h.even != nullptr) {
      const float rstd = reciprocal_rms(v, h);
      for (int64_t i = 0; i < h.D; ++i) v[i] = rounded(v[i] * rstd) * weight(h, i);
    }
    if (h.cos != nullptr && !h.legacy) turn(v, h, 1);
    write(y, v, h.D);
  }

  static void backward(const T* grad, const T* x, T* dx, float* dweight, int64_t pairs,
                       const Head& h) {
    float g[MOST_COLUMNS], v[MOST_COLUMNS];
    read(grad, g, h.D);
    if (h.cos != nullptr && !h.legacy) turn(g, h, -1);
    if (h.even != nullptr) {
      read(x, v, h.D);
      if (h.cos != nullptr && h.legacy) turn(v, h, 1);
      const float rstd = reciprocal_rms(v, h);
      float total = 0;
      for (int64_t i = 0; i < h.D; ++i) {
        v[i] *= rstd;
        dweight[i % 2 * pairs + i / 2] += g[i] * v[i];
        g[i] *= weight(h, i);
        total += g[i] * v[i];
      }
      const float mean = total / h.D;
      for (int64_t i = 0; i < h.D; ++i) g[i] = (g[i] - v[i] * mean) * rstd;
    }
    if (h.cos != nullptr && h.legacy) turn(g, h, -1);
    write(dx, g, h.D);
  }
};

inline Head head_of(const QkNormRope& a, int64_t token, int64_t part) {
  Head h{nullptr, nullptr, nullptr, nullptr, a.D, a.eps, a.legacy};
  if (a.weights != nullptr) {
    h.even = a.weights + part * 2 * a.pairs;
    h.odd = h.even + a.pairs;
  }
  if (a.table != nullptr) {
    h.cos = a.table + token / a.inner % a.positions * 2 * a.pairs;
    h.sin = h.cos + a.pairs;
  }
  return h;
}

template <class T, class Heads>
__attribute__((flatten)) void forward_tokens(const QkNormRope& a, int64_t begin, int64_t end) {
  const int64_t row = a.H * a.D;
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(a.qkv) + token * 3 * row;
    T* y = static_cast<T*>(a.out) + token * 3 * row;
    for (int64_t part = 0; part < 2; ++part) {
      const Head h = head_of(a, token, part);
      for (int64_t i = part * row; i < (part + 1) * row; i += a.D) Heads::forward(x + i, y + i, h);
    }
    if (!a.inplace) __builtin_memcpy(y + 2 * row, x + 2 * row, sizeof(T) * row);
  }
}

// One unit is TOKENS tokens; its sums go to its own row of `partial`.
template <class T, class Heads>
__attribute__((flatten)) void backward_units(const QkNormRope& a, int64_t begin, int64_t end) {
  const int64_t row = a.H * a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dweight = a.partial + unit * 4 * a.pairs;
    __builtin_memset(dweight, 0, sizeof(float) * 4 * a.pairs);
    const int64_t last = (unit + 1) * TOKENS < a.N ? (unit + 1) * TOKENS : a.N;
    for (int64_t token = unit * TOKENS; token < last; ++token) {
      const T* grad = static_cast<const T*>(a.grad) + token * 3 * row;
      const T* x = static_cast<const T*>(a.qkv) + token * 3 * row;
      T* dx = static_cast<T*>(a.out) + token * 3 * row;
      for (int64_t part = 0; part < 2; ++part) {
        const Head h = head_of(a, token, part);
        // Heads, then tokens, then units: errors grow with the longest of the three sums.
        float sums[MOST_COLUMNS];
        __builtin_memset(sums, 0, sizeof(float) * 2 * a.pairs);
        for (int64_t i = part * row; i < (part + 1) * row; i += a.D) {
          Heads::backward(grad + i, x + i, dx + i, sums, a.pairs, h);
        }
        float* unit_sums = dweight + part * 2 * a.pairs;
        for (int64_t i = 0; i < 2 * a.pairs; ++i) unit_sums[i] += sums[i];
      }
      __builtin_memcpy(dx + 2 * row, grad + 2 * row, sizeof(T) * row);
    }
  }
}

// Call `with` with the way to hold a head that fits its width.
template <class T, class With>
void choose(int64_t D, With with) {
  const int64_t count = (D + WIDTH - 1) / WIDTH;
  if (D % 2 != 0 || D < WIDTH || count > Wide<T, 0>::MOST) return with(Narrow<T>{});
  switch (count) {
    case 2:
      return with(Wide<T, 2>{});
    case 3:
      return with(Wide<T, 3>{});
    case 4:
      return with(Wide<T, 4>{});
    case 5:
      return with(Wide<T, 5>{});
    default:
      return with(Wide<T, 0>{});
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
#include <vector>

#include "../common.h"

namespace opensora {

SIMD_DECLARE(qk_norm_rope_forward, const QkNormRope&, int64_t, int64_t)
SIMD_DECLARE(qk_norm_rope_backward, const QkNormRope&, int64_t, int64_t)

namespace {

// Tokens or units per task: below this much work another thread costs more than it brings.
constexpr int64_t GRAIN_ELEMENTS = 32768;

template <class T>
void split(const T* from, float* even, float* odd, int64_t D) {
  for (int64_t i = 0; i < D; ++i) {
    float* to = i % 2 ? odd : even;
    to[i / 2] = static_cast<float>(from[i]);
  }
}

// Split row `row` of t [..., D] into its even and odd columns, as floats.
void split_row(const Tensor& t, int64_t row, int64_t D, float* even, float* odd) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return split(t.const_data_ptr<float>() + row * D, even, odd, D);
    case ScalarType::Double:
      return split(t.const_data_ptr<double>() + row * D, even, odd, D);
    case ScalarType::Half:
      return split(t.const_data_ptr<torch::headeronly::Half>() + row * D, even, odd, D);
    case ScalarType::BFloat16:
      return split(t.const_data_ptr<torch::headeronly::BFloat16>() + row * D, even, odd, D);
    default:
      STD_TORCH_CHECK(false, "weights and rotary tables must be floating point");
  }
}

// The arguments, and what they point to.
struct Call {
  QkNormRope a{};
  std::vector<float> weights, table;
};

void prepare(Call& call, const Tensor& qkv, const std::optional<Tensor>& q_weight,
             const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
             const std::optional<Tensor>& sin, int64_t position_dim, bool legacy, double eps) {
  QkNormRope& a = call.a;
  CHECK_KERNEL_DTYPE(qkv);
  const int64_t dims = qkv.dim();
  STD_TORCH_CHECK(qkv.is_contiguous() && dims >= 4 && qkv.size(dims - 3) == 3 &&
                      -dims <= position_dim && position_dim <= -4,
                  "qkv must be contiguous [..., N, ..., 3, H, D]");
  a.H = qkv.size(dims - 2);
  a.D = qkv.size(dims - 1);
  STD_TORCH_CHECK(a.D <= MOST_COLUMNS, "heads must be at most 4096 wide");
  a.N = qkv.numel() == 0 ? 0 : qkv.numel() / (3 * a.H * a.D);
  a.pairs = (a.D + 1) / 2;
  a.positions = qkv.size(dims + position_dim);
  a.inner = 1;
  for (int64_t i = dims + position_dim + 1; i < dims - 3; ++i) a.inner *= qkv.size(i);
  a.eps = static_cast<float>(eps);
  a.legacy = legacy;
  a.bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(q_weight.has_value() == k_weight.has_value(), "weights come together");
  if (q_weight) {
    call.weights.resize(4 * a.pairs);
    for (int64_t part = 0; part < 2; ++part) {
      const Tensor& weight = part == 0 ? *q_weight : *k_weight;
      STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == a.D && weight.is_contiguous(),
                      "weights must be dense [D]");
      float* even = call.weights.data() + part * 2 * a.pairs;
      split_row(weight, 0, a.D, even, even + a.pairs);
    }
    a.weights = call.weights.data();
  }
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin come together");
  if (cos) {
    call.table.resize(a.positions * 2 * a.pairs);
    std::vector<float> unread(a.pairs);  // columns 2i and 2i + 1 are equal
    for (int64_t part = 0; part < 2; ++part) {
      const Tensor& table = part == 0 ? *cos : *sin;
      STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == a.positions && table.size(1) == a.D &&
                          table.is_contiguous() && a.D % 2 == 0,
                      "cos and sin must be dense [N, D] with D even");
      for (int64_t n = 0; n < a.positions; ++n) {
        split_row(table, n, a.D, call.table.data() + (2 * n + part) * a.pairs, unread.data());
      }
    }
    a.table = call.table.data();
  }
  a.qkv = qkv.const_data_ptr();
}

void run(const QkNormRope& a) {
  const auto kernel = SIMD_CALL(qk_norm_rope_forward);
  parallel_for(0, a.N, GRAIN_ELEMENTS / (3 * a.H * a.D + 1) + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor forward(const Tensor& qkv, const std::optional<Tensor>& q_weight,
               const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, int64_t position_dim, bool legacy, double eps) {
  Call call;
  prepare(call, qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps);
  Tensor y = torch::stable::empty_like(qkv);
  call.a.out = y.mutable_data_ptr();
  if (call.a.N > 0) run(call.a);
  return y;
}

void inplace(const Tensor& qkv, const std::optional<Tensor>& q_weight,
             const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
             const std::optional<Tensor>& sin, int64_t position_dim, bool legacy, double eps) {
  Call call;
  prepare(call, qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps);
  call.a.out = qkv.mutable_data_ptr();
  call.a.inplace = true;
  if (call.a.N > 0) run(call.a);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& qkv,
                                    const std::optional<Tensor>& q_weight,
                                    const std::optional<Tensor>& k_weight,
                                    const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin, int64_t position_dim,
                                    bool legacy, double eps) {
  Call call;
  prepare(call, qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps);
  QkNormRope& a = call.a;
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  CHECK_LIKE(grad, qkv);
  const int64_t units = (a.N + TOKENS - 1) / TOKENS;
  std::vector<float> partial(units * 4 * a.pairs);
  Tensor dqkv = torch::stable::empty_like(qkv);
  Tensor dweights = torch::stable::new_empty(qkv, {2, q_weight ? a.D : 0}, ScalarType::Float);
  a.grad = grad.const_data_ptr();
  a.out = dqkv.mutable_data_ptr();
  a.partial = partial.data();
  const auto kernel = SIMD_CALL(qk_norm_rope_backward);
  parallel_for(0, units, GRAIN_ELEMENTS / (3 * a.H * a.D * TOKENS + 1) + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  if (q_weight) {
    float* sums = dweights.mutable_data_ptr<float>();
    for (int64_t i = 0; i < 2 * a.D; ++i) {
      const int64_t part = i / a.D, column = i % a.D;
      double total = 0;
      for (int64_t unit = 0; unit < units; ++unit) {
        total += partial[(unit * 4 + part * 2 + column % 2) * a.pairs + column / 2];
      }
      sums[i] = static_cast<float>(total);
    }
  }
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
