// Share what attention kernels have in common: rows of heads laid out for products, and attention
// of many queries to many keys in blocks, softmax(q k' / sqrt(D)) v with a running maximum.
//
// Queries, keys and weights of the softmax are rounded to T and multiplied as such; sums are
// float32.
#pragma once

#include "heads.h"
#include "products.h"

namespace opensora {
namespace OPENSORA_SIMD {
namespace {

// How to prepare a head, called through pointers: the loops around it are compiled once per dtype.
template <class T>
struct Prepare {
  void (*forward)(const T*, int64_t, T*, int64_t, int64_t, const Head&);
  void (*backward)(const float*, const T*, T*, float*, int64_t, const Head&);
};

template <class T>
Prepare<T> prepare_of(int64_t D) {
  Prepare<T> p;
  choose<T>(D, [&](auto heads) {
    p = {decltype(heads)::forward, decltype(heads)::template backward<float>};
  });
  return p;
}

// The parts of one thread's memory; from null, only their sizes.
struct Memory {
  uint32_t* next;
  int64_t words;

  uint32_t* take(int64_t count) {
    uint32_t* at = next;
    const int64_t whole = rounded_up(count, 16);  // a cache line
    words += whole;
    if (next != nullptr) next += whole;
    return at;
  }
  float* floats(int64_t count) { return (float*)take(count); }
};

// Columns of a head: `full` Vecs, then half of one where that is enough for the rest (D = 72 = 32 +
// 32 + 8). The last piece begins early and overlaps the one before, so nothing is ragged but a head
// that is narrower than a Vec.
struct Columns {
  int64_t D, full;
  bool half;

  explicit Columns(int64_t width) : D(width) {
    const int64_t rest = D % WIDTH;
    half = D > WIDTH && rest > 0 && rest <= LANES;
    full = (D + WIDTH - 1) / WIDTH - half;
  }
  int64_t vectors() const { return 2 * full + half; }
  int64_t width() const { return vectors() * LANES; }
  int64_t size() const { return D < WIDTH ? D : WIDTH; }
  int64_t place(int64_t k) const {
    return half || k + 1 < full || D < WIDTH ? k * WIDTH : D - WIDTH;
  }
};

// Half a Vec of neighbouring columns.
inline Floats load_half(const float* from) { return *(const FloatsAt*)from; }
inline void store_half(float* to, Floats v) { *(FloatsAt*)to = v; }

typedef uint16_t HalfWords __attribute__((vector_size(BYTES / 2)));
typedef HalfWords HalfWordsAt __attribute__((aligned(1), may_alias));

inline Bits load_half_words(const Bf16* from) {
  return __builtin_convertvector(*(const HalfWordsAt*)from, Bits);
}
inline void store_half(Bf16* to, Floats v) {
  *(HalfWordsAt*)to = __builtin_convertvector(rounded_pairs(Vec{v, v}) & 0xffffu, HalfWords);
}

// Lay a row of values, or two rows side by side for bfloat16, where the product wants them.
inline void lay_values(const float* row, const float*, const Columns& c, uint32_t* to) {
  for (int64_t k = 0; k < c.full; ++k) {
    store((float*)to + k * WIDTH, load(row + c.place(k), c.size()));
  }
  if (c.half) store_half((float*)to + c.full * WIDTH, load_half(row + c.D - LANES));
}

inline void lay_values(const Bf16* row, const Bf16* next, const Columns& c, uint32_t* to) {
  for (int64_t k = 0; k < c.full; ++k) {
    const Vec one = load(row + c.place(k), c.size());
    const Vec other = next == nullptr ? Vec{} : load(next + c.place(k), c.size());
    BitsAt* at = (BitsAt*)(to + k * WIDTH);
    at[0] = ((Bits)one.a >> 16) | (Bits)other.a;
    at[1] = ((Bits)one.b >> 16) | (Bits)other.b;
  }
  if (!c.half) return;
  const Bits other = next == nullptr ? Bits{} : load_half_words(next + c.D - LANES);
  *(BitsAt*)(to + c.full * WIDTH) = load_half_words(row + c.D - LANES) | (other << 16);
}

// Store vectors `i` and, of a whole Vec, `i + LANES` of a product whose right factor was laid so.
template <class T>
inline void store_values(T* to, const Columns& c, int64_t i, Vec v) {
  const int64_t k = i / WIDTH;
  k < c.full ? store(to + c.place(k), v, c.size()) : store_half(to + c.D - LANES, v.a);
}

// Round a row of weights to T, in words.
inline void pack(const float*, int64_t, float*) {}  // in place

inline void pack(const float* row, int64_t padded, Bf16* to) {
  int64_t i = 0;
  for (; i + WIDTH <= padded; i += WIDTH) store_pairs(to + i, load_pairs(row + i));
  if (i == padded) return;
  float rest[WIDTH] = {};
  Bf16 narrow[WIDTH];
  for (int64_t j = i; j < padded; ++j) rest[j - i] = row[j];
  store_pairs(narrow, load_pairs(rest));
  for (int64_t j = i; j < padded; ++j) to[j] = narrow[j - i];
}

// Attention of queries to the keys that were prepared last.
template <class T>
class Flash {
 public:
  // Queries and keys at a time: their scores fill the first cache level.
  static constexpr int64_t ROWS = 32, KEYS = 256;

  // At most `keys` keys; `memory` of words() words, or null to ask for their number.
  Flash(const HeadRules& rules, float scale, int64_t keys, uint32_t* memory)
      : rules_(rules), columns_(rules.D), scale_(scale), prepare_(prepare_of<T>(rules.D)) {
    words_ = (rules.D + PER_WORD<T> - 1) / PER_WORD<T>;
    const int64_t blocks = (keys + KEYS - 1) / KEYS;
    Memory m{memory, 0};
    kt_ = m.take(blocks * words_ * KEYS);
    v_ = m.take(blocks * (KEYS / PER_WORD<T>)*columns_.width());
    rows_ = m.take(rounded_up(LANES, ROWS) * words_ + LANES);  // transpose() reads whole squares
    s_ = m.floats(ROWS * KEYS);
    p_ = sizeof(T) == 4 ? (uint32_t*)s_ : m.take(ROWS * KEYS / PER_WORD<T>);
    o_ = m.floats(ROWS * columns_.width());
    size_ = m.words;
  }
  int64_t words() const { return size_; }

  // Prepare `count` keys and values, `stride` elements apart.
  void keys(const T* k, const T* v, int64_t stride, int64_t count) {
    count_ = count;
    const Head head = head_of(rules_, 0, 1);
    for (int64_t first = 0; first < count; first += LANES) {
      const int64_t rows = first + LANES < count ? LANES : count - first;
      prepare_.forward(k + first * stride, stride, (T*)rows_, words_ * PER_WORD<T>, rows, head);
      transpose(rows_, words_, kt_ + first / KEYS * words_ * KEYS + first % KEYS, KEYS, LANES,
                words_);
    }
    for (int64_t i = 0; i < count; i += PER_WORD<T>) {
      const T* next = i + 1 < count ? v + (i + 1) * stride : nullptr;
      lay_values(v + i * stride, next, columns_, v_ + i / PER_WORD<T> * columns_.width());
    }
  }

  // Attend `count` queries; lse: log2 of the sum of exp(score), -inf where there are no keys.
  __attribute__((flatten)) void queries(const T* q, int64_t stride, int64_t count, T* y,
                                        int64_t y_stride, float* lse) {
    const Head head = head_of(rules_, 0, 0);
    const int64_t width = columns_.width();
    for (int64_t first = 0; first < count; first += ROWS) {
      const int64_t rows = first + ROWS < count ? ROWS : count - first;
      prepare_.forward(q + first * stride, stride, (T*)rows_, words_ * PER_WORD<T>, rows, head);
      float most[ROWS], total[ROWS];
      for (int64_t r = 0; r < ROWS; ++r) most[r] = -__builtin_inff(), total[r] = 0;
      __builtin_memset(o_, 0, sizeof(float) * ROWS * width);
      for (int64_t key = 0; key < count_; key += KEYS) {
        const int64_t n = key + KEYS < count_ ? KEYS : count_ - key;
        add_block(key, n, rows, most, total);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float weight = count_ == 0 ? 0 : 1 / total[r];
        for (int64_t i = 0; i < width; i += WIDTH) {
          const FloatsAt* at = (const FloatsAt*)(o_ + r * width + i);
          const Vec v{at[0] * weight, i + LANES < width ? at[1] * weight : Floats{}};
          store_values(y + (first + r) * y_stride, columns_, i, v);
        }
        lse[first + r] = most[r] * (scale_ * 1.44269504f) + __builtin_log2f(total[r]);
      }
    }
  }

 private:
  inline __attribute__((always_inline)) void add_block(int64_t key, int64_t n, int64_t rows,
                                                       float* most, float* total) {
    const int64_t padded = rounded_up(n, LANES), width = columns_.width();
    multiply<T>({rows_, words_, 1}, kt_ + key * words_, KEYS, rows, padded, words_,
                [&](int64_t r, int64_t i, Floats one, Floats other) {
                  FloatsAt* to = (FloatsAt*)(s_ + r * KEYS + i);
                  to[0] = one;
                  if (i + LANES < padded) to[1] = other;
                });
    for (int64_t r = 0; r < rows; ++r) {
      float* s = s_ + r * KEYS;
      const float block = largest(s, n), before = most[r];
      // A NaN stays where it is: its own weight is NaN, and so is its row.
      most[r] = block > before ? block : before;
      const float sum = exponentials(s, n, most[r], scale_);
      pack(s, padded, (T*)p_ + r * KEYS);
      if (most[r] != before) {
        const float factor = key == 0 ? 0 : __builtin_expf((before - most[r]) * scale_);
        total[r] *= factor;
        for (int64_t i = 0; i < width; i += LANES) {
          FloatsAt* o = (FloatsAt*)(o_ + r * width + i);
          *o = *o * factor;
        }
      }
      total[r] += sum;
    }
    multiply<T>({p_, KEYS / PER_WORD<T>, 1}, v_ + key / PER_WORD<T> * width, width, rows, width,
                (n + PER_WORD<T> - 1) / PER_WORD<T>,
                [&](int64_t r, int64_t i, Floats one, Floats other) {
                  FloatsAt* o = (FloatsAt*)(o_ + r * width + i);
                  o[0] = o[0] + one;
                  if (i + LANES < width) o[1] = o[1] + other;
                });
  }

  HeadRules rules_;
  Columns columns_;
  float scale_;
  Prepare<T> prepare_;
  int64_t words_, size_, count_ = 0;
  uint32_t *kt_, *v_, *rows_, *p_;  // kt: [blocks, words, KEYS]
  float *s_, *o_;
};

inline void widen(const float* from, float* to, int64_t D) {
  __builtin_memcpy(to, from, sizeof(float) * D);
}

inline void widen(const Bf16* from, float* to, int64_t D) {
  int64_t i = 0;
  for (; i + WIDTH <= D; i += WIDTH) store_pairs(to + i, load_pairs(from + i));
  for (; i < D; ++i) to[i] = to_float(from[i]);
}

inline void narrow(const float* from, float* to, int64_t D) { widen(from, to, D); }
inline void narrow(const float* from, Bf16* to, int64_t D) { pack(from, D, to); }

// product[row][column] = or += left * right, rows in whole tiles and columns in whole vectors.
template <bool ADD>
inline __attribute__((always_inline)) void multiply_to(Left left, const float* right, int64_t rows,
                                                       int64_t columns, int64_t K, float* product) {
  multiply<float>(left, (const uint32_t*)right, columns, rows, columns, K,
                  [&](int64_t r, int64_t i, Floats one, Floats other) {
                    FloatsAt* to = (FloatsAt*)(product + r * columns + i);
                    to[0] = ADD ? to[0] + one : one;
                    if (i + LANES < columns) to[1] = ADD ? to[1] + other : other;
                  });
}

inline Left words_of(const float* rows, int64_t stride) {
  return {(const uint32_t*)rows, stride, 1};
}

inline Left transposed(const float* rows, int64_t stride) {
  return {(const uint32_t*)rows, 1, stride};
}

// Queries of one head with the gradient of what they attended to, and where their own goes.
template <class T>
struct Queries {
  const T* q;
  int64_t stride;
  const T* dy;
  int64_t dy_stride;
  T* dq;
  int64_t dq_stride;
  int64_t count;
};

// Gradients of one head after another, of all its queries and of its keys and values:
//
//   dv = p' dy, ds = p * (dp - sum(p * dp)) / sqrt(D) with dp = dy v', dq = ds k, dk = ds' q
//
// and of queries and keys through what prepared them. Products are float32.
template <class T>
class Gradients {
 public:
  // Rows of queries at a time.
  static constexpr int64_t ROWS = 16;

  // At most `keys` keys; `memory` of words() words, or null to ask for their number.
  Gradients(const HeadRules& rules, float scale, int64_t keys, uint32_t* memory)
      : rules_(rules), scale_(scale), prepare_(prepare_of<T>(rules.D)) {
    width_ = rounded_up(rules.D, LANES);
    const int64_t padded = rounded_up(keys, ROWS), whole = padded * width_;
    Memory m{memory, 0};
    k_ = m.floats(whole), v_ = m.floats(whole), kt_ = m.floats(whole), vt_ = m.floats(whole);
    dk_ = m.floats(whole), dv_ = m.floats(whole);
    q_ = m.floats(ROWS * width_), dy_ = m.floats(ROWS * width_), dq_ = m.floats(ROWS * width_);
    p_ = m.floats(ROWS * padded), ds_ = m.floats(ROWS * padded);
    size_ = m.words;
  }
  int64_t words() const { return size_; }

  // Prepare `count` keys and values, `stride` elements apart, and clear their gradients.
  void keys(const T* k, const T* v, int64_t stride, int64_t count) {
    raw_keys_ = k, stride_ = stride, count_ = count;
    padded_ = rounded_up(count, ROWS);
    for (int64_t t = 0; t < count; ++t) {
      prepare(k + t * stride, k_ + t * width_, t, 1);
      widen(v + t * stride, v_ + t * width_, rules_.D);
    }
    transpose((uint32_t*)k_, width_, (uint32_t*)kt_, padded_, padded_, rules_.D);
    transpose((uint32_t*)v_, width_, (uint32_t*)vt_, padded_, padded_, rules_.D);
    __builtin_memset(dk_, 0, sizeof(float) * padded_ * width_);
    __builtin_memset(dv_, 0, sizeof(float) * padded_ * width_);
  }

  // Store the queries' gradients, add to the keys', and to the query weight's [2, pairs].
  __attribute__((flatten)) void queries(const Queries<T>& x, float* dweight) {
    for (int64_t first = 0; first < x.count; first += ROWS) {
      const int64_t rows = first + ROWS < x.count ? ROWS : x.count - first;
      for (int64_t r = 0; r < rows; ++r) {
        prepare(x.q + (first + r) * x.stride, q_ + r * width_, first + r, 0);
        widen(x.dy + (first + r) * x.dy_stride, dy_ + r * width_, rules_.D);
      }
      multiply_to<false>(words_of(q_, width_), kt_, rows, padded_, rules_.D, p_);
      multiply_to<false>(words_of(dy_, width_), vt_, rows, padded_, rules_.D, ds_);
      softmax(p_, padded_, rows, count_, scale_);
      for (int64_t r = 0; r < rows; ++r) differentiate(p_ + r * padded_, ds_ + r * padded_);
      multiply_to<false>(words_of(ds_, padded_), k_, rows, width_, count_, dq_);
      multiply_to<true>(transposed(p_, padded_), dy_, count_, width_, rows, dv_);
      multiply_to<true>(transposed(ds_, padded_), q_, count_, width_, rows, dk_);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = first + r;
        prepare_.backward(dq_ + r * width_, x.q + t * x.stride, x.dq + t * x.dq_stride, dweight,
                          rules_.pairs, head_of(rules_, t, 0));
      }
    }
  }

  // Store the gradients of keys and values, and add to that of the key weight [2, pairs].
  void store_keys(T* dk, T* dv, int64_t stride, float* dweight) {
    for (int64_t t = 0; t < count_; ++t) {
      prepare_.backward(dk_ + t * width_, raw_keys_ + t * stride_, dk + t * stride, dweight,
                        rules_.pairs, head_of(rules_, t, 1));
      narrow(dv_ + t * width_, dv + t * stride, rules_.D);
    }
  }

 private:
  void prepare(const T* x, float* to, int64_t position, int64_t part) {
    T prepared[MOST_COLUMNS];
    prepare_.forward(x, 0, prepared, 0, 1, head_of(rules_, position, part));
    widen(prepared, to, rules_.D);
  }

  // Turn a row of dp into ds, p being known.
  void differentiate(float* p, float* ds) {
    // Between the last whole vector and `padded`, scores and dp are products with what was there.
    for (int64_t i = rounded_up(count_, LANES); i < padded_; ++i) p[i] = ds[i] = 0;
    Floats total{};
    for (int64_t i = 0; i < count_; i += LANES) {
      const Floats weight = *(FloatsAt*)(p + i);
      const Floats share = weight * *(FloatsAt*)(ds + i);
      total = total + (weight != 0.0f ? share : Floats{});
    }
    const float mean = sum(total);
    for (int64_t i = 0; i < count_; i += LANES) {
      FloatsAt* to = (FloatsAt*)(ds + i);
      const Floats weight = *(FloatsAt*)(p + i);
      const Floats value = weight * (*to - mean) * scale_;
      *to = weight != 0.0f ? value : Floats{};
    }
  }

  HeadRules rules_;
  float scale_;
  Prepare<T> prepare_;
  int64_t width_, size_, padded_ = 0, count_ = 0, stride_ = 0;
  const T* raw_keys_ = nullptr;
  float *k_, *v_, *dk_, *dv_;        // [padded, width]
  float *kt_, *vt_;                  // [width, padded]
  float *q_, *dy_, *dq_, *p_, *ds_;  // [ROWS, width or padded]
};

}  // namespace
}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include <cmath>
#include <memory>
#include <vector>

namespace opensora {
namespace {

// Call kernel(a, begin, end, memory) for all units, each thread with `words` words of its own.
template <class Arguments, class Kernel>
void for_units(const Arguments& a, int64_t units, int64_t grain, int64_t words, Kernel kernel) {
  parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> memory(words + 16);
    void* start = memory.data();
    size_t space = memory.size() * sizeof(uint32_t);
    std::align(64, words * sizeof(uint32_t), start, space);
    kernel(a, begin, end, static_cast<uint32_t*>(start));
  });
}

inline float scale_of(int64_t D) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(D)));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
