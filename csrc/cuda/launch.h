// Start kernels on the current stream of torch; the checks that their launchers share.
//
// The library links neither libtorch_cuda, which a build on a CPU torch lacks, nor a shared CUDA
// runtime: the stream's function is looked up when the first kernel starts.
#pragma once

#include "../common.h"
#include "heads.h"
#include "portable.h"

#if defined(__CUDACC__)
#include <dlfcn.h>
#endif

// Where the launchers are registered: the emulated kernels run on tensors of the CPU.
#if defined(__CUDACC__)
#define KERNEL_DEVICE CUDA
#else
#define KERNEL_DEVICE CPU
#endif

namespace opensora {

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* doing) {
  STD_TORCH_CHECK(error == cudaSuccess, doing, ": ", cudaGetErrorString(error));
}

// Make a tensor's device the current one, while this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(t.get_device_index()) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device_ != before_) check(cudaSetDevice(device_), "changing the device");
  }
  ~OnDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const {
    using Find = int32_t (*)(int32_t, void**);
    static const Find find = [] {
      const char* name = "aoti_torch_get_current_cuda_stream";
      void* found = dlsym(RTLD_DEFAULT, name);
      if (found == nullptr) {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        found = library ? dlsym(library, name) : nullptr;
      }
      return reinterpret_cast<Find>(found);
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(find != nullptr && find(device_, &stream) == 0, "torch names no CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

  int limit(cudaDeviceAttr what) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, what, device_), "asking for a limit of the device");
    return value;
  }
  int processors() const { return limit(cudaDevAttrMultiProcessorCount); }
  int64_t most_shared() const { return limit(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

 private:
  int device_, before_ = 0;
};

template <class Arguments>
void launch(const OnDevice& device, void (*kernel)(Arguments), int64_t blocks, int threads,
            int64_t bytes, const Arguments& arguments) {
  if (bytes > 48 << 10) {  // more than a kernel gets unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "reserving shared memory");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, device.stream()>>>(arguments);
  check(cudaGetLastError(), "starting a kernel");
}

#else

// An emulated GPU: few processors, so that blocks walk over several tiles.
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  int processors() const { return 2; }
  int64_t most_shared() const { return 163 << 10; }  // of sm_80
};

template <class Arguments>
void launch(const OnDevice&, void (*kernel)(Arguments), int64_t blocks, int threads, int64_t bytes,
            const Arguments& arguments) {
  emulator::launch(blocks, threads, bytes, [&] { kernel(arguments); });
}

#endif

inline Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "tensors must be float32, bfloat16 or float16");
  return type == ScalarType::Float      ? Type::f32
         : type == ScalarType::BFloat16 ? Type::bf16
                                        : Type::f16;
}

// Call function(T{}) with the type of a tensor's numbers.
template <class Function>
void with_type(const Tensor& t, Function function) {
  switch (type_of(t)) {
    case Type::f32:
      return function(float{});
    case Type::bf16:
      return function(Bf16{});
    case Type::f16:
      return function(F16{});
  }
}

// Whether a tensor begins where 16 bytes may be read at once.
inline bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(Pack) == 0;
}

inline HeadRules head_rules(const Tensor& qkv, int64_t positions,
                            const std::optional<Tensor>& q_weight,
                            const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
                            const std::optional<Tensor>& sin, bool legacy, double eps) {
  HeadRules rules{};
  const int64_t width = qkv.size(-1);
  STD_TORCH_CHECK(
      q_weight.has_value() == k_weight.has_value() && cos.has_value() == sin.has_value(),
      "q_weight and k_weight come together, and so do cos and sin");
  if (q_weight) {
    for (const Tensor* weight : {&*q_weight, &*k_weight}) {
      STD_TORCH_CHECK(weight->is_contiguous() && weight->numel() == width &&
                          weight->scalar_type() == q_weight->scalar_type(),
                      "weights must be contiguous [D] of one dtype");
    }
    rules.q_weight = q_weight->const_data_ptr();
    rules.k_weight = k_weight->const_data_ptr();
    rules.weight_type = type_of(*q_weight);
  }
  if (cos) {
    rules.wide_table = cos->scalar_type() == ScalarType::Float;
    for (const Tensor* table : {&*cos, &*sin}) {
      STD_TORCH_CHECK(
          table->is_contiguous() && table->numel() == positions * width && aligned(*table) &&
              table->scalar_type() == cos->scalar_type() &&
              (rules.wide_table || table->scalar_type() == qkv.scalar_type()),
          "cos and sin must be contiguous, aligned [positions, D] of float32 or qkv's dtype");
    }
    rules.cos = cos->const_data_ptr();
    rules.sin = sin->const_data_ptr();
  }
  rules.legacy = legacy;
  rules.eps = static_cast<float>(eps);
  return rules;
}

}  // namespace opensora
