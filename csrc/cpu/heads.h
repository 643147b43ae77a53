// Prepare queries and keys, a head at a time: RMSNorm over the head, then rotary positions (or the
// other way round).
//
//   forward   n = round(x * rstd) * weight, rotated: (a, b) -> (a c - b s, b c + a s)
//   backward  g = (grad, rotated back) * weight;  dx = rstd * (g - n * mean(g * n))
//             dweight = sum of (grad, rotated back) * n
//
// A head is loaded once and stays in registers. It is held as VECTORS Vecs of pairs; where D is no
// multiple of WIDTH the last one begins early and overlaps the one before: its first lanes are
// computed twice, stored twice and summed once, so no load is ragged (D = 72 = 32 + 32 + 8).
#pragma once

#include "../simd.h"

namespace opensora {

// What is done to a head of D columns; `pairs` is D / 2, rounded up.
struct HeadRules {
  const float* weights;  // [2, 2, pairs]: of q and k, even columns and odd ones; null: no norm
  const float* table;    // [positions, 2, pairs]: cos and sin; null: no rotation
  int64_t D, pairs;
  float eps;
  bool legacy;  // rotate before the norm
};

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

// Call visit(0) to visit(N - 1), each place a constant: vectors in an array then stay in registers.
template <int N, int K = 0, class Visit>
inline __attribute__((always_inline)) void unrolled(Visit visit) {
  if constexpr (K < N) {
    visit(K);
    unrolled<N, K + 1>(visit);
  }
}

// A head of D even columns, WIDTH or more; VECTORS = 0 where their number is not known before.
template <class T, int VECTORS>
struct Wide {
  static constexpr int64_t MOST = VECTORS > 0 ? VECTORS : 64;

  template <class Visit>
  static inline __attribute__((always_inline)) void each(int64_t D, Visit visit) {
    if constexpr (VECTORS > 0) {
      unrolled<VECTORS>(visit);
    } else {
      for (int64_t k = 0; k < count(D); ++k) visit(k);
    }
  }

  static int64_t count(int64_t D) { return VECTORS > 0 ? VECTORS : (D + WIDTH - 1) / WIDTH; }
  static int64_t place(int64_t k, int64_t D) { return k + 1 < count(D) ? k * WIDTH : D - WIDTH; }

  // Clear the lanes of the last Vec that the one before holds as well.
  static Vec fresh(Vec v, int64_t k, int64_t D) {
    if (k + 1 < count(D)) return v;
    const Bits keep = (Bits)(lane_numbers() >= (uint32_t)((count(D) * WIDTH - D) / 2));
    return {(Floats)((Bits)v.a & keep), (Floats)((Bits)v.b & keep)};
  }

  static Vec squares(const Vec* v, int64_t D) {
    Vec total{};
    each(D, [&](int64_t k) { total = total + fresh(v[k] * v[k], k, D); });
    return total;
  }

  static float reciprocal_rms(const Vec* v, const Head& h) {
    return 1.0f / __builtin_sqrtf(sum(squares(v, h.D)) / h.D + h.eps);
  }

  static void turn(Vec* v, const Head& h, float sign) {
    each(h.D, [&](int64_t k) {
      const int64_t pair = place(k, h.D) / 2;
      v[k] = rotate(v[k], at(h.cos + pair), at(h.sin + pair) * sign);
    });
  }

  static void read(const T* x, Vec* v, const Head& h) {
    each(h.D, [&](int64_t k) { v[k] = load_pairs(x + place(k, h.D)); });
    if (h.cos != nullptr && h.legacy) turn(v, h, 1);
  }

  static void write(T* y, const Vec* v, const Head& h) {
    each(h.D, [&](int64_t k) { store_pairs(y + place(k, h.D), v[k]); });
  }

  static void normalise(const T* x, Vec* v, float rstd, const Head& h) {
    each(h.D, [&](int64_t k) { v[k] = rounded_to(x, v[k] * rstd); });
  }

  static void weigh(Vec* v, const Head& h) {
    each(h.D, [&](int64_t k) {
      const int64_t pair = place(k, h.D) / 2;
      v[k] = v[k] * Vec{at(h.even + pair), at(h.odd + pair)};
    });
  }

  // Return partial sums of a head's squares.
  static Floats partial_squares(const T* x, const Head& h) {
#if defined(__AVX512BF16__)
    if (sizeof(T) == 2 && (h.cos == nullptr || !h.legacy)) {
      Floats total{};
      each(h.D, [&](int64_t k) {
        const Floats pairs = (Floats) * (const BitsAt*)(x + place(k, h.D));
        const __m512bh words = (__m512bh)fresh(Vec{pairs, pairs}, k, h.D).a;
        total = (Floats)_mm512_dpbf16_ps((__m512)total, words, words);
      });
      return total;
    }
#endif
    Vec v[MOST];
    read(x, v, h);
    const Vec total = squares(v, h.D);
    return total.a + total.b;
  }

  static void forward_one(const T* x, T* y, const Head& h) {
    Vec v[MOST];
    read(x, v, h);
    if (h.even != nullptr) {
      normalise(x, v, reciprocal_rms(v, h), h);
      weigh(v, h);
    }
    if (h.cos != nullptr && !h.legacy) turn(v, h, 1);
    write(y, v, h);
  }

  // Prepare `count` heads that stand at one position, x_step and y_step elements apart. Their norms
  // are taken together: one by one, each head would wait for its own sum, root and quotient.
  __attribute__((flatten)) static void forward(const T* x, int64_t x_step, T* y, int64_t y_step,
                                               int64_t count, const Head& h) {
    const bool rotated = h.cos != nullptr && !h.legacy;
    if (count == 1 || h.even == nullptr) {
      for (int64_t i = 0; i < count; ++i) forward_one(x + i * x_step, y + i * y_step, h);
      return;
    }
    // What each column keeps of itself and, rotated, takes of its neighbour.
    Vec kept[MOST], taken[MOST];
    each(h.D, [&](int64_t k) {
      const int64_t pair = place(k, h.D) / 2;
      const Floats even = at(h.even + pair), odd = at(h.odd + pair);
      const Floats c = rotated ? at(h.cos + pair) : Floats{} + 1.0f;
      const Floats s = rotated ? at(h.sin + pair) : Floats{};
      kept[k] = {even * c, odd * c}, taken[k] = {odd * s, even * s};
    });
    for (int64_t first = 0; first < count; first += LANES) {
      const int64_t heads = first + LANES < count ? LANES : count - first;
      Floats lanes[LANES];
      float rstd[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        lanes[i] = i < heads ? partial_squares(x + (first + i) * x_step, h) : Floats{};
      }
      *(FloatsAt*)rstd = reduce_each(lanes, Add{});
      for (float& r : rstd) r = 1.0f / __builtin_sqrtf(r / h.D + h.eps);
      for (int64_t i = 0; i < heads; ++i) {
        Vec v[MOST];
        read(x + (first + i) * x_step, v, h);
        normalise(x, v, rstd[i], h);
        if (rotated) {
          each(h.D, [&](int64_t k) {
            const Vec n = v[k], own = kept[k], other = taken[k];
            v[k] = {n.a * own.a - n.b * other.a, n.b * own.b + n.a * other.b};
          });
        } else {
          weigh(v, h);
        }
        write(y + (first + i) * y_step, v, h);
      }
    }
  }

  // dweight: even columns, then, `pairs` further, odd ones. The gradient may be wider than x.
  template <class G>
  __attribute__((flatten)) static void backward(const G* grad, const T* x, T* dx, float* dweight,
                                                int64_t pairs, const Head& h) {
    Vec g[MOST], v[MOST];
    each(h.D, [&](int64_t k) { g[k] = load_pairs(grad + place(k, h.D)); });
    if (h.cos != nullptr && !h.legacy) turn(g, h, -1);
    if (h.even != nullptr) {
      each(h.D, [&](int64_t k) { v[k] = load_pairs(x + place(k, h.D)); });
      if (h.cos != nullptr && h.legacy) turn(v, h, 1);
      const float rstd = reciprocal_rms(v, h);
      Vec total{};
      each(h.D, [&](int64_t k) {
        const int64_t pair = place(k, h.D) / 2;
        v[k] = v[k] * rstd;
        const Vec share = fresh(g[k] * v[k], k, h.D);
        *(FloatsAt*)(dweight + pair) += share.a;
        *(FloatsAt*)(dweight + pairs + pair) += share.b;
        g[k] = {g[k].a * at(h.even + pair), g[k].b * at(h.odd + pair)};
        total = total + fresh(g[k] * v[k], k, h.D);
      });
      const float mean = sum(total) / h.D;
      each(h.D, [&](int64_t k) { g[k] = (g[k] - v[k] * mean) * rstd; });
    }
    if (h.cos != nullptr && h.legacy) turn(g, h, -1);
    each(h.D, [&](int64_t k) { store_pairs(dx + place(k, h.D), g[k]); });
  }
};

// A head of any width, column by column.
template <class T>
struct Narrow {
  template <class U>
  static void read(const U* from, float* to, int64_t D) {
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

  static void forward(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t count,
                      const Head& h) {
    for (int64_t i = 0; i < count; ++i) forward(x + i * x_step, y + i * y_step, h);
  }

  template <class G>
  static void backward(const G* grad, const T* x, T* dx, float* dweight, int64_t pairs,
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

// Return what head `part` (0: of queries, 1: of keys) needs at a position.
inline Head head_of(const HeadRules& r, int64_t position, int64_t part) {
  Head h{nullptr, nullptr, nullptr, nullptr, r.D, r.eps, r.legacy};
  if (r.weights != nullptr) {
    h.even = r.weights + part * 2 * r.pairs;
    h.odd = h.even + r.pairs;
  }
  if (r.table != nullptr) {
    h.cos = r.table + position * 2 * r.pairs;
    h.sin = h.cos + r.pairs;
  }
  return h;
}

// Call `with` with the way to hold a head that fits its width.
template <class T, class With>
void choose(int64_t D, With with) {
  const int64_t count = (D + WIDTH - 1) / WIDTH;
  if (D % 2 != 0 || D < WIDTH || count > Wide<T, 0>::MOST) return with(Narrow<T>{});
  // Heads of 32 to 128 columns: of 72 those of STDiT3, of 32 those of the embedded model.
  constexpr int64_t SOME[] = {BYTES == 64 ? 1 : 2, BYTES == 64 ? 2 : 4, BYTES == 64 ? 3 : 5};
  if (count == SOME[0]) return with(Wide<T, SOME[0]>{});
  if (count == SOME[1]) return with(Wide<T, SOME[1]>{});
  if (count == SOME[2]) return with(Wide<T, SOME[2]>{});
  with(Wide<T, 0>{});
}

}  // namespace
}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include <vector>

#include "../common.h"

namespace opensora {
namespace {

template <class T>
inline void split(const T* from, float* even, float* odd, int64_t D) {
  for (int64_t i = 0; i < D; ++i) {
    float* to = i % 2 ? odd : even;
    to[i / 2] = static_cast<float>(from[i]);
  }
}

// Split row `row` of t [..., D] into its even and odd columns, as floats.
inline void split_row(const Tensor& t, int64_t row, int64_t D, float* even, float* odd) {
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

// Rules for qkv's heads of D columns, with the memory that they point to.
class HeadTables {
 public:
  HeadTables(int64_t D, int64_t positions, const std::optional<Tensor>& q_weight,
             const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
             const std::optional<Tensor>& sin, bool legacy, double eps) {
    STD_TORCH_CHECK(D <= MOST_COLUMNS, "heads must be at most 4096 wide");
    rules_ = {nullptr, nullptr, D, (D + 1) / 2, static_cast<float>(eps), legacy};
    const int64_t pairs = rules_.pairs;
    STD_TORCH_CHECK(q_weight.has_value() == k_weight.has_value(), "weights come together");
    if (q_weight) {
      weights_.resize(4 * pairs);
      for (int64_t part = 0; part < 2; ++part) {
        const Tensor& weight = part == 0 ? *q_weight : *k_weight;
        STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == D && weight.is_contiguous(),
                        "weights must be dense [D]");
        float* even = weights_.data() + part * 2 * pairs;
        split_row(weight, 0, D, even, even + pairs);
      }
      rules_.weights = weights_.data();
    }
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin come together");
    if (cos) {
      table_.resize(positions * 2 * pairs);
      std::vector<float> unread(pairs);  // columns 2i and 2i + 1 are equal
      for (int64_t part = 0; part < 2; ++part) {
        const Tensor& table = part == 0 ? *cos : *sin;
        STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == positions && table.size(1) == D &&
                            table.is_contiguous() && D % 2 == 0,
                        "cos and sin must be dense [N, D] with D even");
        for (int64_t n = 0; n < positions; ++n) {
          split_row(table, n, D, table_.data() + (2 * n + part) * pairs, unread.data());
        }
      }
      rules_.table = table_.data();
    }
  }
  HeadTables(const HeadTables&) = delete;  // the rules point into it

  const HeadRules& rules() const { return rules_; }

 private:
  HeadRules rules_;
  std::vector<float> weights_, table_;
};

// Add up the units' sums [units, 2, 2, pairs] of both weights' gradients into dweights [2, D].
inline void sum_dweights(const HeadRules& r, const std::vector<float>& partial, int64_t units,
                         Tensor& dweights) {
  if (r.weights == nullptr) return;
  float* sums = dweights.mutable_data_ptr<float>();
  for (int64_t i = 0; i < 2 * r.D; ++i) {
    const int64_t part = i / r.D, column = i % r.D;
    double total = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      total += partial[(unit * 4 + part * 2 + column % 2) * r.pairs + column / 2];
    }
    sums[i] = static_cast<float>(total);
  }
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
