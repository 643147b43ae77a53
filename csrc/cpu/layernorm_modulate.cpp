// LayerNorm without affine, fused with adaLN modulation; contract in
// opensora/ops/layernorm_modulate.py.
//
//   forward   y = n * (1 + scale) + shift            n = (x - mean) * rstd, per row of C
//   backward  dx = rstd * (g - mean(g) - n * mean(g * n))      g = dy * (1 + scale)
//             dshift = sum of dy, dscale = sum of dy * n, over the rows that share them
//
// Memory-bound: a row is read from memory once, its statistics and second use come from the first
// cache level. Two-pass variance, float32 throughout, one rounding at the end. Axes: B batch,
// T frames (1 without `select`), S rows per frame, C channels; a row is one of B*T*S.
#include "../simd.h"

namespace opensora {

// One of (shift, scale) or (shift0, scale0): rows [B, C], `stride` elements apart.
struct Modulation {
  const void* shift;
  const void* scale;
  int64_t shift_stride, scale_stride;
};

struct LayernormModulate {
  const void* x;       // [B, T, S, C]
  const void* dy;      // [B, T, S, C], backward only
  void* out;           // y or dx, [B, T, S, C]
  float* partial;      // [B*T*chunks, 2, padded] sums of dy and of dy*n, whole Vecs; backward only
  const bool* select;  // [B, T], or null: the first modulation everywhere
  Modulation chosen, other;
  int64_t T, S, C, chunks, padded;
  float eps;
  bool bf16;  // else float
};

// Rows that add into one partial sum. Fixed, so that gradients do not depend on the threads;
// with 64 the partial sums are 2 % of the bytes moved for bfloat16, 1 % for float.
constexpr int64_t CHUNK = 64;

// Columns that one task adds up, a multiple of every WIDTH: 18 tasks for a sample of 1152 channels.
constexpr int64_t BLOCK = 128;

namespace OPENSORA_SIMD {
namespace {

struct Statistics {
  float mean, rstd;
};

template <class T>
Statistics statistics(const T* x, int64_t C, float eps) {
  const float total = sum_columns(C, [=](int64_t i, int64_t n) { return load(x + i, n); });
  const float mean = total / C;
  const float squares = sum_columns(C, [=](int64_t i, int64_t n) {
    const Vec centred = only<T>(load(x + i, n) - mean, n);
    return centred * centred;
  });
  return {mean, 1.0f / __builtin_sqrtf(squares / C + eps)};
}

const Modulation& modulation(const LayernormModulate& a, int64_t frame) {
  return a.select == nullptr || a.select[frame] ? a.chosen : a.other;
}

template <class T>
__attribute__((flatten)) void forward_rows(const LayernormModulate& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t frame = row / a.S, batch = frame / a.T;
    const Modulation& m = modulation(a, frame);
    const T* x = static_cast<const T*>(a.x) + row * a.C;
    const T* shift = static_cast<const T*>(m.shift) + batch * m.shift_stride;
    const T* scale = static_cast<const T*>(m.scale) + batch * m.scale_stride;
    T* y = static_cast<T*>(a.out) + row * a.C;
    const Statistics s = statistics(x, a.C, a.eps);
    for_columns(a.C, [=](int64_t i, int64_t n) {
      const Vec normed = (load(x + i, n) - s.mean) * s.rstd;
      store(y + i, normed * (load(scale + i, n) + 1.0f) + load(shift + i, n), n);
    });
  }
}

// One unit is a chunk of one frame's rows; its sums go to its own row of `partial`.
template <class T>
__attribute__((flatten)) void backward_unit(const LayernormModulate& a, int64_t unit) {
  const int64_t C = a.C, frame = unit / a.chunks, batch = frame / a.T;
  const int64_t first = frame * a.S + unit % a.chunks * CHUNK, last = (frame + 1) * a.S;
  const Modulation& m = modulation(a, frame);
  const T* scale = static_cast<const T*>(m.scale) + batch * m.scale_stride;
  float* dshift = a.partial + unit * 2 * a.padded;
  float* dscale = dshift + a.padded;
  __builtin_memset(dshift, 0, sizeof(float) * 2 * a.padded);
  for (int64_t row = first; row < first + CHUNK && row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * C;
    const T* dy = static_cast<const T*>(a.dy) + row * C;
    T* dx = static_cast<T*>(a.out) + row * C;
    const Statistics s = statistics(x, C, a.eps);
    Vec sum_g{}, sum_gn{};
    for_columns(C, [&](int64_t i, int64_t n) {
      const Vec normed = (load(x + i, n) - s.mean) * s.rstd;
      const Vec grad = load(dy + i, n);
      const Vec g = grad * (load(scale + i, n) + 1.0f);
      store(dshift + i, load(dshift + i) + grad);
      store(dscale + i, load(dscale + i) + grad * normed);
      sum_g = sum_g + g;
      sum_gn = sum_gn + g * normed;
    });
    const float mean_g = sum(sum_g) / C, mean_gn = sum(sum_gn) / C;
    for_columns(C, [=](int64_t i, int64_t n) {
      const Vec normed = (load(x + i, n) - s.mean) * s.rstd;
      const Vec g = load(dy + i, n) * (load(scale + i, n) + 1.0f);
      store(dx + i, (g - mean_g - normed * mean_gn) * s.rstd, n);
    });
  }
}

}  // namespace

void layernorm_modulate_forward(const LayernormModulate& a, int64_t begin, int64_t end) {
  a.bf16 ? forward_rows<Bf16>(a, begin, end) : forward_rows<float>(a, begin, end);
}

void layernorm_modulate_backward(const LayernormModulate& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    a.bf16 ? backward_unit<Bf16>(a, unit) : backward_unit<float>(a, unit);
  }
}

// Add up the partial sums into blocks [begin, end) of dmodulation [B, 2 or 4, C].
void layernorm_modulate_reduce(const LayernormModulate& a, void* dmodulation, int64_t begin,
                               int64_t end) {
  const int64_t sets = a.select == nullptr ? 1 : 2, blocks = (a.C + BLOCK - 1) / BLOCK;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks, column = block % blocks * BLOCK;
    const int64_t batch = row / (2 * sets), other = row / 2 % sets, which = row % 2;
    const int64_t rest = a.C - column;
    for_columns(rest < BLOCK ? rest : BLOCK, [&](int64_t i, int64_t n) {
      Vec total{};
      for (int64_t frame = batch * a.T; frame < (batch + 1) * a.T; ++frame) {
        if (a.select != nullptr && a.select[frame] == (other == 1)) continue;
        for (int64_t unit = frame * a.chunks; unit < (frame + 1) * a.chunks; ++unit) {
          total = total + load(a.partial + (unit * 2 + which) * a.padded + column + i);
        }
      }
      const int64_t at = row * a.C + column + i;
      a.bf16 ? store(static_cast<Bf16*>(dmodulation) + at, total, n)
             : store(static_cast<float*>(dmodulation) + at, total, n);
    });
  }
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include "../common.h"

namespace opensora {

SIMD_DECLARE(layernorm_modulate_forward, const LayernormModulate&, int64_t, int64_t)
SIMD_DECLARE(layernorm_modulate_backward, const LayernormModulate&, int64_t, int64_t)
SIMD_DECLARE(layernorm_modulate_reduce, const LayernormModulate&, void*, int64_t, int64_t)

namespace {

// Rows or units per task: below this much work another thread costs more than it brings.
constexpr int64_t GRAIN_ELEMENTS = 32768;

LayernormModulate arguments(const Tensor& x, const std::optional<Tensor>& select, double eps) {
  CHECK_KERNEL_DTYPE(x);
  CHECK_ROWS(x);
  LayernormModulate a{};
  a.x = x.const_data_ptr();
  a.T = 1;
  if (select) {
    STD_TORCH_CHECK(select->is_contiguous() && select->dim() == 2 &&
                        select->scalar_type() == ScalarType::Bool && select->size(0) == x.size(0),
                    "select must be contiguous bool [B, T]");
    a.select = select->const_data_ptr<bool>();
    a.T = select->size(1);
  }
  a.C = x.size(-1);
  const int64_t frames = x.size(0) * a.T;
  a.S = x.numel() == 0 ? 0 : x.numel() / (frames * a.C);
  STD_TORCH_CHECK(a.S * frames * a.C == x.numel(), "select's frames must divide x's tokens");
  a.chunks = (a.S + CHUNK - 1) / CHUNK;
  a.padded = (a.C + BLOCK - 1) / BLOCK * BLOCK;
  a.eps = static_cast<float>(eps);
  a.bf16 = x.scalar_type() == ScalarType::BFloat16;
  return a;
}

Tensor forward(const Tensor& x, const Tensor& shift, const Tensor& scale,
               const std::optional<Tensor>& select, const std::optional<Tensor>& shift0,
               const std::optional<Tensor>& scale0, double eps) {
  LayernormModulate a = arguments(x, select, eps);
  CHECK_PER_SAMPLE(shift, x);
  CHECK_PER_SAMPLE(scale, x);
  a.chosen = {shift.const_data_ptr(), scale.const_data_ptr(), shift.stride(0), scale.stride(0)};
  if (select) {
    STD_TORCH_CHECK(shift0 && scale0, "select needs shift0 and scale0");
    CHECK_PER_SAMPLE(*shift0, x);
    CHECK_PER_SAMPLE(*scale0, x);
    a.other = {shift0->const_data_ptr(), scale0->const_data_ptr(), shift0->stride(0),
               scale0->stride(0)};
  }
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  a.out = y.mutable_data_ptr();
  const auto kernel = SIMD_CALL(layernorm_modulate_forward);
  parallel_for(0, x.numel() / a.C, GRAIN_ELEMENTS / a.C + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& scale,
                                    const std::optional<Tensor>& select,
                                    const std::optional<Tensor>& scale0, double eps) {
  LayernormModulate a = arguments(x, select, eps);
  CHECK_ROWS(dy);
  CHECK_LIKE(dy, x);
  CHECK_PER_SAMPLE(scale, x);
  a.chosen = {nullptr, scale.const_data_ptr(), 0, scale.stride(0)};
  if (select) {
    STD_TORCH_CHECK(scale0, "select needs scale0");
    CHECK_PER_SAMPLE(*scale0, x);
    a.other = {nullptr, scale0->const_data_ptr(), 0, scale0->stride(0)};
  }
  const int64_t B = x.size(0), units = B * a.T * a.chunks, sums = select ? 4 : 2;
  Tensor dx = torch::stable::empty_like(x);
  Tensor dmodulation = torch::stable::new_empty(x, {B, sums, a.C});
  Tensor partial = torch::stable::new_empty(x, {units, 2, a.padded}, ScalarType::Float);
  a.dy = dy.const_data_ptr();
  a.out = dx.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr<float>();
  const auto kernel = SIMD_CALL(layernorm_modulate_backward);
  parallel_for(0, units, GRAIN_ELEMENTS / (a.C * CHUNK + 1) + 1,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  const auto reduce = SIMD_CALL(layernorm_modulate_reduce);
  void* sums_out = dmodulation.mutable_data_ptr();
  parallel_for(0, B * sums * ((a.C + BLOCK - 1) / BLOCK), 1,
               [&](int64_t begin, int64_t end) { reduce(a, sums_out, begin, end); });
  return {dx, dmodulation};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("layernorm_modulate_forward", TORCH_BOX(&forward));
  m.impl("layernorm_modulate_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
