// The only file that includes torch headers, and only the stable ABI's: one build runs on every
// torch from 2.11 on. A CPU kernel includes it in its plain build alone (see simd.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

namespace opensora {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Elements per task: below this much work another thread costs more than it brings.
constexpr int64_t GRAIN_ELEMENTS = 32768;

}  // namespace opensora

// Python checks what users pass; these guard the kernel against any other caller of the op.
#define CHECK_KERNEL_DTYPE(t)                                                                  \
  STD_TORCH_CHECK(                                                                             \
      (t).scalar_type() == ScalarType::Float || (t).scalar_type() == ScalarType::BFloat16, #t, \
      " must be float32 or bfloat16")
#define CHECK_ROWS(t)                                                                 \
  STD_TORCH_CHECK((t).is_contiguous() && (t).dim() >= 2, #t, " must be contiguous, ", \
                  "at least [B, C]")
#define CHECK_LIKE(t, other)                                                            \
  STD_TORCH_CHECK((t).numel() == (other).numel() && (t).size(-1) == (other).size(-1) && \
                      (t).scalar_type() == (other).scalar_type(),                       \
                  #t, " must have the shape and dtype of ", #other)
// The branch that a residual takes: its dtype may differ, as under autocast.
#define CHECK_BRANCH(y, x)                                                                       \
  STD_TORCH_CHECK(                                                                               \
      (y).is_contiguous() && (y).dim() >= 2 && (y).numel() == (x).numel() &&                     \
          (y).size(-1) == (x).size(-1) &&                                                        \
          ((y).scalar_type() == ScalarType::Float || (y).scalar_type() == ScalarType::BFloat16), \
      #y, " must be contiguous, float32 or bfloat16, of the shape of ", #x)
#define CHECK_PER_SAMPLE(t, x)                                                                   \
  STD_TORCH_CHECK((t).dim() == 2 && (t).size(0) == (x).size(0) && (t).size(1) == (x).size(-1) && \
                      (t).scalar_type() == (x).scalar_type() &&                                  \
                      ((t).stride(1) == 1 || (t).size(1) == 1),                                  \
                  #t, " must be [B, C] of x's dtype with dense rows")
