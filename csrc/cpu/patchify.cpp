// Tokens of a latent's patches; contract in opensora/ops/patchify.py.
//
//   forward   tokens[n, c] = sum over k of patch[n, k] * weight[c, k] + bias[c] + positions[s, c]
//   backward  dweight[c, k] = sum over n of grad[n, c] * patch[n, k];  dbias: the sum of grad
//             dx: pixel k of patch n takes the sum over c of grad[n, c] * weight[c, k]
//
// Memory-bound in tokens or grad: STDiT3 has K = 16 and C = 1152. Patches are gathered first, as
// floats, each with a 1 behind it for the bias. Float32 throughout, one rounding at the end.
// Axes: B batch, N tokens of all samples, S of a frame, C channels, K = I * pt * ph * pw.
#include "products.h"

namespace opensora {

// Columns of weights and sums are padded to a multiple of this and of every WIDTH.
constexpr int64_t PANEL = 32;

// Columns of one task of the backward, in which a unit of rows adds up.
constexpr int64_t COLUMNS = 128;

struct Patchify {
  const void* x;          // [B, I, T, H, W] by strides
  const void* weight;     // [C, K]
  const void* bias;       // [C]
  const void* positions;  // [S, C]
  const void* grad;       // [N, C]
  void* out;              // tokens [N, C], or dx [B, I, T, H, W]
  void *dweight, *dbias;  // [C, K], [C]
  float* patches;         // [N, K + 1], rows up to a multiple of MOST_ROWS
  float* panels;          // [columns / WIDTH, K + 1, WIDTH]: weight, then bias, see slot
  float* partial;         // [units, K + 1, columns] sums of grad * patch
  int64_t sizes[5], strides[5], patch[3], counts[3];
  int64_t N, S, C, K, columns;  // columns: C, padded
  int64_t units, rows;          // of grad: how many, and rows of each
  bool bf16, x_bf16;            // bf16: all but x
};

// The most rows of a product that are computed at once.
constexpr int64_t MOST_ROWS = 8;

namespace OPENSORA_SIMD {
namespace {

// Round to T, ties to even; NaN stays.
inline float rounded(const float*, float value) { return value; }
inline float rounded(const Bf16*, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits = value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
  return to_float(Bf16{(uint16_t)(bits >> 16)});
}

inline void put(float* to, float value) { *to = value; }
inline void put(Bf16* to, float value) {
  value = rounded(to, value);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  to->bits = bits >> 16;
}

// Call visit(k, element) for the places of patch `row` that x has, `element` counted by strides.
template <class Visit>
inline __attribute__((always_inline)) void for_pixels(const Patchify& a, int64_t row,
                                                      const int64_t (&strides)[5], Visit visit) {
  int64_t first[3], last[3], rest = row, k = 0;
  for (int64_t axis = 2; axis >= 0; --axis) {
    first[axis] = rest % a.counts[axis] * a.patch[axis];
    rest /= a.counts[axis];
    const int64_t end = first[axis] + a.patch[axis], size = a.sizes[axis + 2];
    last[axis] = end < size ? end : size;
  }
  for (int64_t i = 0; i < a.sizes[1]; ++i) {
    const int64_t plane = rest * strides[0] + i * strides[1];
    for (int64_t t = first[0]; t < last[0]; ++t) {
      for (int64_t h = first[1]; h < last[1]; ++h) {
        const int64_t at = k + ((t - first[0]) * a.patch[1] + h - first[1]) * a.patch[2];
        const int64_t line = plane + t * strides[2] + h * strides[3];
        for (int64_t w = first[2]; w < last[2]; ++w) {
          visit(at + w - first[2], line + w * strides[4]);
        }
      }
    }
    k += a.patch[0] * a.patch[1] * a.patch[2];
  }
}

// Write rows of `patches`, rounded to T; what lies past the ends of x is 0.
template <class T, class U>
void gather(const Patchify& a, int64_t begin, int64_t end) {
  const U* x = static_cast<const U*>(a.x);
  for (int64_t row = begin; row < end; ++row) {
    float* patch = a.patches + row * (a.K + 1);
    __builtin_memset(patch, 0, sizeof(float) * a.K);
    patch[a.K] = 1;
    for_pixels(a, row, a.strides, [&](int64_t k, int64_t element) {
      patch[k] = rounded(static_cast<const T*>(nullptr), to_float(x[element]));
    });
  }
}

// Write `panels`: a panel is WIDTH columns, in the order of lanes that T has.
template <class T>
void pack(const Patchify& a) {
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  for (int64_t c = 0; c < a.columns; ++c) {
    float* to = a.panels + c / WIDTH * (a.K + 1) * WIDTH + slot<T>(c % WIDTH);
    for (int64_t k = 0; k < a.K; ++k) to[k * WIDTH] = c < a.C ? to_float(weight[c * a.K + k]) : 0;
    to[a.K * WIDTH] = bias != nullptr && c < a.C ? to_float(bias[c]) : 0;
  }
}

// A task is TILE_ROWS rows: that many streams of memory, each written from end to end.
template <class T>
__attribute__((flatten)) void forward_tiles(const Patchify& a, int64_t begin, int64_t end) {
  const int64_t K = a.K + 1;
  for (int64_t row = begin * TILE_ROWS; row < end * TILE_ROWS; row += TILE_ROWS) {
    const Left patches{reinterpret_cast<const uint32_t*>(a.patches + row * K), K, 1};
    const int64_t rows = a.N - row < TILE_ROWS ? a.N - row : TILE_ROWS;
    const T* codes[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; ++r) {
      codes[r] = static_cast<const T*>(a.positions) + (row + r) % a.S * a.C;
    }
    for_columns(a.C, [&](int64_t i, int64_t n) {
      Floats total[TILE_ROWS][2];
      tile<float, 2>(patches, reinterpret_cast<const uint32_t*>(a.panels + i * K), WIDTH, K, total);
#pragma GCC unroll 8
      for (int64_t r = 0; r < TILE_ROWS; ++r) {
        if (r >= rows) break;
        const Vec token = Vec{total[r][0], total[r][1]} + load(codes[r] + i, n);
        store(static_cast<T*>(a.out) + (row + r) * a.C + i, token, n);
      }
    });
  }
}

// Add grad^T patches over rows [first, last) to sums [R, columns] of places k, ..., k + R - 1.
template <class T, int64_t R>
inline __attribute__((always_inline)) void add_products(const Patchify& a, int64_t first,
                                                        int64_t last, int64_t k, int64_t column,
                                                        int64_t count, float* sums) {
  Vec total[R];
  for (int64_t r = 0; r < R; ++r) total[r] = Vec{};
  const T* grad = static_cast<const T*>(a.grad) + column;
  for (int64_t row = first; row < last; ++row) {
    const Vec g = load(grad + row * a.C, count);
    const float* patch = a.patches + row * (a.K + 1) + k;
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) total[r] = total[r] + g * patch[r];
  }
  for (int64_t r = 0; r < R; ++r) {
    float* to = sums + r * a.columns + column;
    store(to, load(to) + total[r]);
  }
}

// Rows that add up in registers: their grad is read again from the second cache level, once for
// every tile of places, and errors grow with the longest of three sums, so not with all rows.
constexpr int64_t ROWS_AT_ONCE = 32;

// Places of a patch whose sums fit the registers; 17 of them are two or three tiles.
constexpr int64_t PLACES = BYTES == 64 ? 9 : 6;

// Tasks are COLUMNS columns of a unit, those of one unit after the other.
template <class T>
__attribute__((flatten)) void backward_tasks(const Patchify& a, int64_t begin, int64_t end) {
  const int64_t K = a.K + 1, blocks = (a.columns + COLUMNS - 1) / COLUMNS;
  while (begin < end) {
    const int64_t unit = begin / blocks,
                  next = (unit + 1) * blocks < end ? (unit + 1) * blocks : end;
    const int64_t from = begin % blocks * COLUMNS, to = (next - unit * blocks) * COLUMNS;
    const int64_t stop = to < a.C ? to : a.C, padded = to < a.columns ? to : a.columns;
    const int64_t final = (unit + 1) * a.rows < a.N ? (unit + 1) * a.rows : a.N;
    float* sums = a.partial + unit * K * a.columns;
    for (int64_t k = 0; k < K; ++k) {
      __builtin_memset(sums + k * a.columns + from, 0, sizeof(float) * (padded - from));
    }
    for (int64_t first = unit * a.rows; first < final; first += ROWS_AT_ONCE) {
      const int64_t last = first + ROWS_AT_ONCE < final ? first + ROWS_AT_ONCE : final;
      for_columns(stop - from, [&](int64_t i, int64_t n) {
        int64_t k = 0;
        for (; k + PLACES <= K; k += PLACES) {
          add_products<T, PLACES>(a, first, last, k, from + i, n, sums + k * a.columns);
        }
        for (; k + 4 <= K; k += 4) {
          add_products<T, 4>(a, first, last, k, from + i, n, sums + k * a.columns);
        }
        for (; k < K; ++k) {
          add_products<T, 1>(a, first, last, k, from + i, n, sums + k * a.columns);
        }
      });
    }
    begin = next;
  }
}

// Add up the units' sums of blocks of COLUMNS columns.
template <class T>
void reduce(const Patchify& a, int64_t begin, int64_t end) {
  const int64_t K = a.K + 1, stop = end * COLUMNS < a.C ? end * COLUMNS : a.C;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t column = begin * COLUMNS; column < stop; column += WIDTH) {
      Vec total{};
      for (int64_t unit = 0; unit < a.units; ++unit) {
        total = total + load(a.partial + (unit * K + k) * a.columns + column);
      }
      float lanes[WIDTH];
      store(lanes, total);
      for (int64_t i = 0; i < WIDTH && column + i < a.C; ++i) {
        T* to = k < a.K ? static_cast<T*>(a.dweight) + (column + i) * a.K + k
                        : static_cast<T*>(a.dbias) + column + i;
        put(to, lanes[slot<T>(i)]);
      }
    }
  }
}

// Rows and places of grad weight whose sums fit the registers, with LANES partial sums of each.
constexpr int64_t GRAD_ROWS = BYTES == 64 ? 4 : 2;
constexpr int64_t GRAD_PLACES = 4;

// Write dx, of type U, of the patches [begin, end).
template <class T, class U>
__attribute__((flatten)) void input_rows(const Patchify& a, int64_t begin, int64_t end) {
  const int64_t* sizes = a.sizes;
  const int64_t plane = sizes[3] * sizes[4], volume = plane * sizes[2];
  const int64_t dense[5] = {volume * sizes[1], volume, plane, sizes[4], 1};
  for (int64_t row = begin; row < end; row += GRAD_ROWS) {
    const int64_t rows = end - row < GRAD_ROWS ? end - row : GRAD_ROWS;
    for (int64_t k = 0; k < a.K; k += GRAD_PLACES) {
      const int64_t places = a.K - k < GRAD_PLACES ? a.K - k : GRAD_PLACES;
      Floats total[GRAD_ROWS][GRAD_PLACES] = {};
      for_columns(a.C, [&](int64_t i, int64_t n) {
        Vec g[GRAD_ROWS];
#pragma GCC unroll 4
        for (int64_t r = 0; r < GRAD_ROWS; ++r) {
          const int64_t place = row + (r < rows ? r : 0);
          g[r] = load(static_cast<const T*>(a.grad) + place * a.C + i, n);
        }
        const float* panel = a.panels + i * (a.K + 1) + k * WIDTH;
#pragma GCC unroll 4
        for (int64_t p = 0; p < GRAD_PLACES; ++p) {
          const Vec w = load(panel + (p < places ? p : 0) * WIDTH);
#pragma GCC unroll 4
          for (int64_t r = 0; r < GRAD_ROWS; ++r) {
            total[r][p] = total[r][p] + g[r].a * w.a + g[r].b * w.b;
          }
        }
      });
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p < places; ++p)
          a.patches[(row + r) * (a.K + 1) + k + p] = sum(total[r][p]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* patch = a.patches + (row + r) * (a.K + 1);
      for_pixels(a, row + r, dense, [&](int64_t k, int64_t element) {
        put(static_cast<U*>(a.out) + element, patch[k]);
      });
    }
  }
}

}  // namespace

void patchify_gather(const Patchify& a, int64_t begin, int64_t end) {
  const auto rows = !a.bf16    ? a.x_bf16 ? gather<float, Bf16> : gather<float, float>
                    : a.x_bf16 ? gather<Bf16, Bf16>
                               : gather<Bf16, float>;
  rows(a, begin, end);
}

void patchify_pack(const Patchify& a) { a.bf16 ? pack<Bf16>(a) : pack<float>(a); }

int64_t patchify_tile_rows() { return TILE_ROWS; }

void patchify_forward(const Patchify& a, int64_t begin, int64_t end) {
  a.bf16 ? forward_tiles<Bf16>(a, begin, end) : forward_tiles<float>(a, begin, end);
}

void patchify_backward(const Patchify& a, int64_t begin, int64_t end) {
  a.bf16 ? backward_tasks<Bf16>(a, begin, end) : backward_tasks<float>(a, begin, end);
}

void patchify_reduce(const Patchify& a, int64_t begin, int64_t end) {
  a.bf16 ? reduce<Bf16>(a, begin, end) : reduce<float>(a, begin, end);
}

void patchify_input_backward(const Patchify& a, int64_t begin, int64_t end) {
  const auto rows = !a.bf16    ? a.x_bf16 ? input_rows<float, Bf16> : input_rows<float, float>
                    : a.x_bf16 ? input_rows<Bf16, Bf16>
                               : input_rows<Bf16, float>;
  rows(a, begin, end);
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include "../common.h"

namespace opensora {

SIMD_DECLARE(patchify_gather, const Patchify&, int64_t, int64_t)
SIMD_DECLARE(patchify_pack, const Patchify&)
SIMD_DECLARE_RETURNING(int64_t, patchify_tile_rows)
SIMD_DECLARE(patchify_forward, const Patchify&, int64_t, int64_t)
SIMD_DECLARE(patchify_backward, const Patchify&, int64_t, int64_t)
SIMD_DECLARE(patchify_reduce, const Patchify&, int64_t, int64_t)
SIMD_DECLARE(patchify_input_backward, const Patchify&, int64_t, int64_t)

namespace {

// Rows of grad that add into one partial sum, at least: the sums are 7 % of bfloat16's bytes.
constexpr int64_t ROWS_OF_UNIT = 512;
// Most floats of all partial sums, unless one unit has more.
constexpr int64_t MOST_SUMS = 1 << 21;

// Return the arguments that all three ops share.
Patchify arguments(const Tensor& x, const Tensor& weight) {
  CHECK_KERNEL_DTYPE(x);
  CHECK_KERNEL_DTYPE(weight);
  STD_TORCH_CHECK(x.dim() == 5 && weight.dim() == 5 && weight.is_contiguous() &&
                      weight.size(1) == x.size(1) && weight.numel() > 0,
                  "x must be [B, I, T, H, W] and weight dense [C, I, pt, ph, pw]");
  Patchify a{};
  a.C = weight.size(0);
  a.K = weight.numel() / a.C;
  a.columns = (a.C + PANEL - 1) / PANEL * PANEL;
  for (int64_t i = 0; i < 5; ++i) a.sizes[i] = x.size(i), a.strides[i] = x.stride(i);
  for (int64_t i = 0; i < 3; ++i) {
    a.patch[i] = weight.size(i + 2);
    a.counts[i] = (x.size(i + 2) + a.patch[i] - 1) / a.patch[i];
  }
  a.S = a.counts[1] * a.counts[2];
  a.N = x.size(0) * a.counts[0] * a.S;
  a.x = x.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.bf16 = weight.scalar_type() == ScalarType::BFloat16;
  a.x_bf16 = x.scalar_type() == ScalarType::BFloat16;
  return a;
}

void set_grad(Patchify& a, const Tensor& grad, const Tensor& weight) {
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == a.N * a.C &&
                      grad.scalar_type() == weight.scalar_type(),
                  "grad must be dense [B, N, C] of weight's dtype");
  a.grad = grad.const_data_ptr();
}

Tensor new_patches(Patchify& a, const Tensor& weight) {
  const int64_t rows = (a.N + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS;
  Tensor patches = torch::stable::new_empty(weight, {rows, a.K + 1}, ScalarType::Float);
  a.patches = patches.mutable_data_ptr<float>();
  return patches;
}

Tensor packed(Patchify& a, const Tensor& weight) {
  Tensor panels = torch::stable::new_empty(weight, {a.columns, a.K + 1}, ScalarType::Float);
  a.panels = panels.mutable_data_ptr<float>();
  SIMD_CALL(patchify_pack)(a);
  return panels;
}

void gather_patches(const Patchify& a) {
  const auto kernel = SIMD_CALL(patchify_gather);
  parallel_for(0, a.N, GRAIN_ELEMENTS / (a.K + 1) + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& positions) {
  Patchify a = arguments(x, weight);
  STD_TORCH_CHECK(
      bias.is_contiguous() && bias.numel() == a.C && bias.scalar_type() == weight.scalar_type(),
      "bias must be dense [C] of weight's dtype");
  STD_TORCH_CHECK(positions.is_contiguous() && positions.numel() == a.S * a.C &&
                      positions.scalar_type() == weight.scalar_type(),
                  "positions must be dense [S, C] of weight's dtype");
  Tensor tokens = torch::stable::new_empty(weight, {x.size(0), a.counts[0] * a.S, a.C});
  if (tokens.numel() == 0) return tokens;
  a.bias = bias.const_data_ptr();
  a.positions = positions.const_data_ptr();
  a.out = tokens.mutable_data_ptr();
  const Tensor panels = packed(a, weight), patches = new_patches(a, weight);
  gather_patches(a);
  const auto kernel = SIMD_CALL(patchify_forward);
  const int64_t rows = SIMD_CALL(patchify_tile_rows)();
  parallel_for(0, (a.N + rows - 1) / rows, GRAIN_ELEMENTS / (a.columns * rows) + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return tokens;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  Patchify a = arguments(x, weight);
  set_grad(a, grad, weight);
  Tensor dweight = torch::stable::empty_like(weight);
  Tensor dbias = torch::stable::new_empty(weight, {a.C});
  a.dweight = dweight.mutable_data_ptr();
  a.dbias = dbias.mutable_data_ptr();
  // As many units as shapes alone allow, so that sums do not depend on the threads.
  const int64_t most = MOST_SUMS / ((a.K + 1) * a.columns) + 1;
  a.rows = a.N / most + 1 < ROWS_OF_UNIT ? ROWS_OF_UNIT : a.N / most + 1;
  a.units = (a.N + a.rows - 1) / a.rows;
  Tensor sums = torch::stable::new_empty(weight, {a.units, a.K + 1, a.columns}, ScalarType::Float);
  a.partial = sums.mutable_data_ptr<float>();
  const Tensor patches = new_patches(a, weight);
  gather_patches(a);
  const auto kernel = SIMD_CALL(patchify_backward);
  const auto reduce = SIMD_CALL(patchify_reduce);
  const int64_t blocks = (a.columns + COLUMNS - 1) / COLUMNS;
  parallel_for(0, a.units * blocks, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { reduce(a, begin, end); });
  return {dweight, dbias};
}

Tensor input_backward(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  Patchify a = arguments(x, weight);
  set_grad(a, grad, weight);
  Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
  if (dx.numel() == 0) return dx;
  a.out = dx.mutable_data_ptr();
  const Tensor panels = packed(a, weight), patches = new_patches(a, weight);
  const auto kernel = SIMD_CALL(patchify_input_backward);
  parallel_for(0, a.N, GRAIN_ELEMENTS / a.columns + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("patchify_forward", TORCH_BOX(&forward));
  m.impl("patchify_backward", TORCH_BOX(&backward));
  m.impl("patchify_input_backward", TORCH_BOX(&input_backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
