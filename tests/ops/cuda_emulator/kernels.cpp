// The CUDA kernels and their launch plans, behind C functions for the tests.

// clang-format off: the emulator comes before the kernels.
#define DDFUP_CUDA_EMULATOR
#include "emulator.h"
#include "ddf_launch.cuh"
// clang-format on

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <limits>
#include <set>
#include <string>

namespace {

using ddfup::Strides;

std::set<std::string> launched;
std::string text;  // what the last call of a function below returned

// Remembers the kernel's name and runs it, unless only the names are wanted.
struct Launch {
  bool dry;

  template <typename Kernel, typename... Arguments>
  void operator()(Kernel* kernel, int64_t blocks, int block_x, int block_y, const Arguments&... arguments) const {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname)
      throw std::runtime_error("a kernel has no name");
    char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    launched.insert(name ? name : info.dli_sname);
    std::free(name);
    if (!dry) emulator::launch(kernel, blocks, block_x, block_y, arguments...);
  }

  template <typename Kernel>
  void prefer_shared_memory(Kernel*) const {}
};

enum class Wanted : int { kOutput, kGradFeatures, kGradChannel, kGradSpatial };

struct Arguments {
  ddfup::Problem problem;
  const void *features, *channel_filter, *spatial_filter, *grad_output;
  void* result;
  Strides features_strides, spatial_strides, output_strides, result_strides;
  int64_t enough_blocks, least_filled;
};

template <typename T>
void run(Wanted wanted, bool dry, const Arguments& a) {
  namespace cuda = ddfup::cuda;
  cuda::Call<T> call{};
  call.problem = a.problem;
  call.enough_blocks = a.enough_blocks;
  call.least_filled = a.least_filled;
  call.features = static_cast<const T*>(a.features);
  call.channel_filter = static_cast<const T*>(a.channel_filter);
  call.spatial_filter = static_cast<const T*>(a.spatial_filter);
  call.grad_output = static_cast<const T*>(a.grad_output);
  call.result = static_cast<T*>(a.result);
  call.features_strides = a.features_strides;
  call.spatial_strides = a.spatial_strides;
  call.output_strides = a.output_strides;
  call.result_strides = a.result_strides;
  using A = cuda::Accumulator<T>;
  std::vector<std::vector<A>> scratch;
  const auto allocate = [&scratch](int64_t count) {
    scratch.emplace_back(count, std::numeric_limits<A>::quiet_NaN());
    return scratch.back().data();
  };
  const Launch launch{dry};
  switch (wanted) {
    case Wanted::kOutput:
      return cuda::forward(launch, call);
    case Wanted::kGradFeatures:
      return cuda::grad_features(launch, call);
    case Wanted::kGradChannel:
      return cuda::grad_channel(launch, allocate, call);
    case Wanted::kGradSpatial:
      return cuda::grad_spatial(launch, allocate, call);
  }
}

}  // namespace

// Computes one of `Wanted`, or with `dry` only finds the kernels for it. Returns the message of an error, or nothing.
extern "C" const char* ddf_emulate(int wanted, const char* type, bool reversed, bool dry, const Arguments* arguments) {
  text.clear();
  emulator::reversed = reversed;
  const std::string name = type;
  const auto what = static_cast<Wanted>(wanted);
  try {
    if (name == "float32") {
      run<float>(what, dry, *arguments);
    } else if (name == "float64") {
      run<double>(what, dry, *arguments);
    } else if (name == "float16") {
      run<__half>(what, dry, *arguments);
    } else if (name == "bfloat16") {
      run<__nv_bfloat16>(what, dry, *arguments);
    } else {
      text = "unknown type " + name;
    }
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

extern "C" const char* ddf_channel_norm(const float* in, int64_t rows, int channels, const float* weight,
                                        const float* bias, float eps, bool reversed, float* out) {
  text.clear();
  emulator::reversed = reversed;
  ddfup::cuda::NormCall call{};
  call.in = in, call.weight = weight, call.bias = bias, call.out = out;
  call.rows = rows, call.channels = channels, call.eps = eps;
  try {
    ddfup::cuda::channel_norm(Launch{false}, call);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

extern "C" const char* ddf_channel_norm_backward(const float* grad, const float* in, int64_t rows, int channels,
                                                 const float* weight, float eps, int64_t enough_blocks, bool reversed,
                                                 float* grad_in, float* grad_weight, float* grad_bias) {
  text.clear();
  emulator::reversed = reversed;
  ddfup::cuda::NormBackwardCall call{};
  call.enough_blocks = enough_blocks;
  call.grad = grad, call.in = in, call.weight = weight;
  call.grad_in = grad_in, call.grad_weight = grad_weight, call.grad_bias = grad_bias;
  call.rows = rows, call.channels = channels, call.eps = eps;
  std::vector<float> scratch;
  const auto allocate = [&scratch](int64_t count) {
    scratch.assign(count, std::numeric_limits<float>::quiet_NaN());
    return scratch.data();
  };
  try {
    ddfup::cuda::channel_norm_backward(Launch{false}, allocate, call);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

// Names of the kernels launched since the last call, one per line.
extern "C" const char* ddf_launched() {
  text.clear();
  for (const std::string& name : launched) text += name + "\n";
  launched.clear();
  return text.c_str();
}

// Rounds there and back, for a check of the emulator's own half types.
extern "C" float ddf_round(const char* type, float value) {
  if (std::string(type) == "float16") return __half2float(__float2half_rn(value));
  return __uint_as_float(static_cast<unsigned>(__float2bfloat16_rn(value).bits) << 16);
}
