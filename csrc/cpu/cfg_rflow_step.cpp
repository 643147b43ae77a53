// One step of the rectified-flow sampler; contract in opensora/ops/cfg_rflow_step.py.
//
//   v = u + g * (c - u),    y = z + v * dt where the mask is true, z elsewhere
//
// Every product and sum is rounded on its own, as eager PyTorch does: CMakeLists.txt compiles this
// file with -ffp-contract=off. Memory-bound. Axes: B batch, C channels, T frames, H x W pixels.
#include "../simd.h"

namespace opensora {

struct CfgRflowStep {
  const float* z;              // [B, C, T, H, W]
  const void* velocity;        // c, then, where it is guided, u
  const bool* mask;            // [B, T], or null: all frames move
  const float *dt, *guidance;  // [B]; guidance or null: scale
  float* y;                    // [copies, B, C, T, H, W]
  int64_t B, C, T, H, W;       // H = 1 where the velocity's rows follow one another
  int64_t strides[5], mask_strides[2], copies;
  float scale;
  bool bf16, guided;  // bf16: the velocity
};

namespace OPENSORA_SIMD {
namespace {

typedef uint16_t Halves __attribute__((vector_size(BYTES / 2), aligned(1), may_alias));

inline Vec in_order(const float* from) { return load(from); }

inline Vec in_order(const Bf16* from) {
  const Halves* at = (const Halves*)from;
  return {(Floats)(__builtin_convertvector(at[0], Bits) << 16),
          (Floats)(__builtin_convertvector(at[1], Bits) << 16)};
}

// Load columns that are `step` apart, in the order of lanes that float has.
template <class T>
inline Vec load_apart(const T* from, int64_t step, int64_t count) {
  if (step == 1 && count == WIDTH) return in_order(from);
  float wide[WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) wide[i] = to_float(from[i * step]);
  return load(wide);
}

template <class T>
__attribute__((flatten)) void step_elements(const CfgRflowStep& a, int64_t begin, int64_t end) {
  const int64_t size = a.B * a.C * a.T * a.H * a.W, step = a.strides[4];
  while (begin < end) {
    const int64_t run = begin / a.W, frame = run / a.H % a.T, plane = run / (a.H * a.T);
    const int64_t sample = plane / a.C, rest = (run + 1) * a.W - begin;
    const int64_t count = rest < end - begin ? rest : end - begin;
    const T* cond = static_cast<const T*>(a.velocity) + sample * a.strides[0] +
                    plane % a.C * a.strides[1] + frame * a.strides[2] + run % a.H * a.strides[3] +
                    begin % a.W * step;
    const T* uncond = cond + a.B * a.strides[0];
    const bool moves =
        a.mask == nullptr || a.mask[sample * a.mask_strides[0] + frame * a.mask_strides[1]];
    const float g = a.guidance == nullptr ? a.scale : a.guidance[sample], dt = a.dt[sample];
    for_columns(count, [&](int64_t i, int64_t n) {
      Vec y = load(a.z + begin + i, n);
      if (moves) {
        Vec v = load_apart(cond + i * step, step, n);
        if (a.guided) {
          const Vec u = load_apart(uncond + i * step, step, n);
          v = u + (v - u) * g;
        }
        y = y + v * dt;
      }
      for (int64_t copy = 0; copy < a.copies; ++copy) store(a.y + copy * size + begin + i, y, n);
    });
    begin += count;
  }
}

}  // namespace

void cfg_rflow_step_forward(const CfgRflowStep& a, int64_t begin, int64_t end) {
  a.bf16 ? step_elements<Bf16>(a, begin, end) : step_elements<float>(a, begin, end);
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include "../common.h"

namespace opensora {

SIMD_DECLARE(cfg_rflow_step_forward, const CfgRflowStep&, int64_t, int64_t)

namespace {

const float* row_of_samples(const Tensor& t, int64_t B) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 1 && t.size(0) == B,
      "guidance and dt must be dense float32 [B]");
  return t.const_data_ptr<float>();
}

Tensor forward(const Tensor& z, const Tensor& velocity, const std::optional<Tensor>& guidance,
               double scale, const Tensor& dt, const std::optional<Tensor>& mask, int64_t copies) {
  CHECK_KERNEL_DTYPE(velocity);
  STD_TORCH_CHECK(z.dim() == 5 && z.is_contiguous() && z.scalar_type() == ScalarType::Float,
                  "z must be dense float32 [B, C, T, H, W]");
  STD_TORCH_CHECK(velocity.dim() == 5 &&
                      (velocity.size(0) == z.size(0) || velocity.size(0) == 2 * z.size(0)) &&
                      velocity.size(1) >= z.size(1) && velocity.size(2) == z.size(2) &&
                      velocity.size(3) == z.size(3) && velocity.size(4) == z.size(4) && copies >= 1,
                  "velocity must be [B or 2B, >= C, T, H, W]");
  CfgRflowStep a{};
  a.B = z.size(0), a.C = z.size(1), a.T = z.size(2), a.H = z.size(3), a.W = z.size(4);
  a.dt = row_of_samples(dt, a.B);
  if (guidance) a.guidance = row_of_samples(*guidance, a.B);
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 2 && mask->scalar_type() == ScalarType::Bool &&
                        mask->size(0) == a.B && mask->size(1) == a.T,
                    "mask must be bool [B, T]");
    a.mask = mask->const_data_ptr<bool>();
    for (int64_t i = 0; i < 2; ++i) a.mask_strides[i] = mask->stride(i);
  }
  Tensor y = torch::stable::new_empty(z, {copies * a.B, a.C, a.T, a.H, a.W});
  if (z.numel() == 0) return y;
  for (int64_t i = 0; i < 5; ++i) a.strides[i] = velocity.stride(i);
  if (a.strides[3] == a.W * a.strides[4]) a.W *= a.H, a.H = 1;
  a.z = z.const_data_ptr<float>();
  a.velocity = velocity.const_data_ptr();
  a.y = y.mutable_data_ptr<float>();
  a.copies = copies;
  a.scale = static_cast<float>(scale);
  a.bf16 = velocity.scalar_type() == ScalarType::BFloat16;
  a.guided = velocity.size(0) != a.B;
  const auto kernel = SIMD_CALL(cfg_rflow_step_forward);
  parallel_for(0, z.numel(), GRAIN_ELEMENTS,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("cfg_rflow_step_forward", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
