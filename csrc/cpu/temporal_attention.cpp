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
#include "heads.h"
#include "products.h"

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

// How to prepare a head, called through pointers: the loops around it are compiled once per dtype.
template <class T>
struct Prepare {
  void (*forward)(const T*, T*, const Head&);
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

// Rows of queries at a time.
constexpr int64_t BLOCK_ROWS = 16;

// Words of the second cache level that the heads of a group fill.
constexpr int64_t GROUP_WORDS = 1 << 16;

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

// Columns of a head in Vecs, the last of which overlaps the one before.
struct Columns {
  int64_t D, count;

  int64_t place(int64_t k) const { return k + 1 < count || D < WIDTH ? k * WIDTH : D - WIDTH; }
  int64_t size() const { return D < WIDTH ? D : WIDTH; }
};

inline Columns columns_of(int64_t D) { return {D, (D + WIDTH - 1) / WIDTH}; }

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
    width = columns_of(a.D).count * WIDTH;
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

// Lay a row of values, or two rows side by side for bfloat16, where the product wants them.
inline void lay_values(const float* row, const float*, const Columns& c, uint32_t* to) {
  for (int64_t k = 0; k < c.count; ++k) {
    store((float*)to + k * WIDTH, load(row + c.place(k), c.size()));
  }
}

inline void lay_values(const Bf16* row, const Bf16* next, const Columns& c, uint32_t* to) {
  for (int64_t k = 0; k < c.count; ++k) {
    const Vec one = load(row + c.place(k), c.size());
    const Vec other = next == nullptr ? Vec{} : load(next + c.place(k), c.size());
    BitsAt* at = (BitsAt*)(to + k * WIDTH);
    at[0] = ((Bits)one.a >> 16) | (Bits)other.a;
    at[1] = ((Bits)one.b >> 16) | (Bits)other.b;
  }
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

template <class T>
__attribute__((flatten)) void forward_patches(const TemporalAttention& a, int64_t begin,
                                              int64_t end, uint32_t* memory) {
  const Forward<T> f(a, memory);
  const Prepare<T> prepare = prepare_of<T>(a.D);
  const Columns c = columns_of(a.D);
  const int64_t W = f.words * PER_WORD<T>;
  for (int64_t unit = begin; unit < end; ++unit) {
    T* out = static_cast<T*>(a.out) + (unit / a.S * a.T * a.S + unit % a.S) * a.H * a.D;
    for (int64_t first = 0; first < a.H; first += f.group) {
      const int64_t heads = first + f.group < a.H ? f.group : a.H - first;
      for (int64_t t = 0; t < a.T; ++t) {
        const T* row = row_of<T>(a, unit, t) + first * a.D;
        const Head of_q = head_of(a.rules, t, 0), of_k = head_of(a.rules, t, 1);
        for (int64_t h = 0; h < heads; ++h) {
          prepare.forward(row + h * a.D, (T*)f.q + (h * f.rows + t) * W, of_q);
        }
        for (int64_t h = 0; h < heads; ++h) {
          prepare.forward(row + (a.H + h) * a.D, (T*)f.k + (h * f.padded + t) * W, of_k);
        }
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
          for (int64_t r = 0; r < rows; ++r) {
            softmax(f.s + r * f.padded, a.T, a.scale);
            pack(f.s + r * f.padded, f.padded, (T*)f.p + r * f.padded);
          }
          T* to = out + from * a.S * a.H * a.D + (first + h) * a.D;
          multiply<T>({f.p, f.padded / PER_WORD<T>, 1}, f.v + h * f.pairs * f.width, f.width, rows,
                      f.width, f.pairs, [&](int64_t r, int64_t i, Floats one, Floats other) {
                        if (r >= rows) return;
                        store(to + r * a.S * a.H * a.D + c.place(i / WIDTH), Vec{one, other},
                              c.size());
                      });
        }
      }
    }
  }
}

struct Backward {
  int64_t padded, width;            // frames and columns in whole vectors
  float *q, *k, *v, *dy, *dk, *dv;  // [padded, width]
  float *kt, *vt;                   // [width, padded]
  float *p, *ds, *dq;               // [BLOCK_ROWS, padded or width]
  int64_t total;

  Backward(const TemporalAttention& a, uint32_t* memory) {
    padded = rounded_up(a.T, BLOCK_ROWS);
    width = rounded_up(a.D, LANES);
    Memory m{memory, 0};
    const int64_t whole = padded * width;
    q = m.floats(whole), k = m.floats(whole), v = m.floats(whole), dy = m.floats(whole);
    dk = m.floats(whole), dv = m.floats(whole), kt = m.floats(whole), vt = m.floats(whole);
    p = m.floats(BLOCK_ROWS * padded), ds = m.floats(BLOCK_ROWS * padded);
    dq = m.floats(BLOCK_ROWS * width);
    total = m.words;
  }
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

template <class T>
__attribute__((flatten)) void backward_patches(const TemporalAttention& a, int64_t begin,
                                               int64_t end, uint32_t* memory) {
  const Backward f(a, memory);
  const Prepare<T> prepare = prepare_of<T>(a.D);
  const int64_t pairs = a.rules.pairs, row = a.H * a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dweight = a.partial + unit * 4 * pairs;
    __builtin_memset(dweight, 0, sizeof(float) * 4 * pairs);
    const int64_t token = unit / a.S * a.T * a.S + unit % a.S;
    T* dqkv = static_cast<T*>(a.out) + token * 3 * row;
    const T* grad = static_cast<const T*>(a.grad) + token * row;
    for (int64_t h = 0; h < a.H; ++h) {
      for (int64_t t = 0; t < a.T; ++t) {
        const T* x = row_of<T>(a, unit, t) + h * a.D;
        T prepared[MOST_COLUMNS];
        prepare.forward(x, prepared, head_of(a.rules, t, 0));
        widen(prepared, f.q + t * f.width, a.D);
        prepare.forward(x + row, prepared, head_of(a.rules, t, 1));
        widen(prepared, f.k + t * f.width, a.D);
        widen(x + 2 * row, f.v + t * f.width, a.D);
        widen(grad + t * a.S * row + h * a.D, f.dy + t * f.width, a.D);
      }
      transpose((uint32_t*)f.k, f.width, (uint32_t*)f.kt, f.padded, f.padded, a.D);
      transpose((uint32_t*)f.v, f.width, (uint32_t*)f.vt, f.padded, f.padded, a.D);
      __builtin_memset(f.dk, 0, sizeof(float) * f.padded * f.width);
      __builtin_memset(f.dv, 0, sizeof(float) * f.padded * f.width);
      float sums[2 * MOST_COLUMNS];
      __builtin_memset(sums, 0, sizeof(float) * 4 * pairs);
      for (int64_t from = 0; from < a.T; from += BLOCK_ROWS) {
        const int64_t rows = from + BLOCK_ROWS < a.T ? BLOCK_ROWS : a.T - from;
        multiply_to<false>(words_of(f.q + from * f.width, f.width), f.kt, rows, f.padded, a.D, f.p);
        multiply_to<false>(words_of(f.dy + from * f.width, f.width), f.vt, rows, f.padded, a.D,
                           f.ds);
        for (int64_t r = 0; r < rows; ++r) {
          float *p = f.p + r * f.padded, *ds = f.ds + r * f.padded;
          softmax(p, a.T, a.scale);
          Floats total{};
          for (int64_t i = 0; i < a.T; i += LANES) {  // p is 0 past T, and dp finite there
            total = total + *(FloatsAt*)(p + i) * *(FloatsAt*)(ds + i);
          }
          const float mean = sum(total);
          for (int64_t i = 0; i < f.padded; i += LANES) {
            FloatsAt* to = (FloatsAt*)(ds + i);
            *to = *(FloatsAt*)(p + i) * (*to - mean) * a.scale;
          }
        }
        multiply_to<false>(words_of(f.ds, f.padded), f.k, rows, f.width, a.T, f.dq);
        multiply_to<true>(transposed(f.p, f.padded), f.dy + from * f.width, a.T, f.width, rows,
                          f.dv);
        multiply_to<true>(transposed(f.ds, f.padded), f.q + from * f.width, a.T, f.width, rows,
                          f.dk);
        for (int64_t t = from; t < from + rows; ++t) {
          prepare.backward(f.dq + (t - from) * f.width, row_of<T>(a, unit, t) + h * a.D,
                           dqkv + t * a.S * 3 * row + h * a.D, sums, pairs, head_of(a.rules, t, 0));
        }
      }
      for (int64_t t = 0; t < a.T; ++t) {
        T* to = dqkv + t * a.S * 3 * row + h * a.D;
        prepare.backward(f.dk + t * f.width, row_of<T>(a, unit, t) + row + h * a.D, to + row,
                         sums + 2 * pairs, pairs, head_of(a.rules, t, 1));
        narrow(f.dv + t * f.width, to + 2 * row, a.D);
      }
      // Frames, then heads, then patches: errors grow with the longest of the three sums.
      for (int64_t i = 0; i < 4 * pairs; ++i) dweight[i] += sums[i];
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
  return Backward(a, nullptr).total;
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include <cmath>
#include <memory>

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
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.D)));
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

// Call kernel(begin, end, memory) for all patches, each thread with memory of its own.
template <class Kernel>
void for_patches(const TemporalAttention& a, int64_t words, Kernel kernel) {
  parallel_for(0, a.B * a.S, GRAIN_ELEMENTS / (3 * a.T * a.H * a.D + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 std::vector<uint32_t> memory(words + 16);
                 void* start = memory.data();
                 size_t space = memory.size() * sizeof(uint32_t);
                 std::align(64, words * sizeof(uint32_t), start, space);
                 kernel(a, begin, end, static_cast<uint32_t*>(start));
               });
}

Tensor forward(const Tensor& qkv, const std::optional<Tensor>& q_weight,
               const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, double eps) {
  const int64_t frames = frames_of(qkv);
  const HeadTables tables(qkv.size(5), frames, q_weight, k_weight, cos, sin, false, eps);
  TemporalAttention a = arguments(qkv, tables);
  Tensor y = torch::stable::new_empty(qkv, {a.B, a.T, a.S, a.H * a.D});
  if (y.numel() == 0) return y;
  a.out = y.mutable_data_ptr();
  for_patches(a, SIMD_CALL(temporal_attention_forward_words)(a),
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
    for_patches(a, SIMD_CALL(temporal_attention_backward_words)(a),
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
