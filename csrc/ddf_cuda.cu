// Registers the CUDA kernels of `ddfup::ddf` and `ddfup::ddf_backward` (schema in ddfup/ops/ddf.py) and of
// `ddfup::channel_norm` and `ddfup::channel_norm_backward` (ddfup/ops/norm.py) through PyTorch's stable ABI. Work goes
// to PyTorch's current stream, memory comes from its allocator.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "ddf_launch.cuh"
#include "ddf_torch.h"

namespace ddfup {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The rule of reference.is_channels_last in ddfup/ops/reference.py.
Tensor empty_following(const Tensor& features, const std::vector<int64_t>& sizes) {
  const bool channels_last = features.size(1) > 1 && features.stride(1) == 1 && !features.is_contiguous();
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(sizes, features.scalar_type(), std::nullopt, features.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

struct Launch {
  cudaStream_t stream;

  template <typename Kernel, typename... Arguments>
  void operator()(Kernel* kernel, int64_t blocks, int block_x, int block_y, const Arguments&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < cuda::kMost, "ddfup: the tensors are too large for one kernel launch (", blocks,
                    " blocks)");
    const dim3 grid(static_cast<unsigned>(blocks)), block(block_x, block_y);
    kernel<<<grid, block, 0, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Of the memory that is both, the driver would leave the first-level cache what a kernel's blocks could use.
  template <typename Kernel>
  void prefer_shared_memory(Kernel* kernel) const {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
  }
};

Launch on_current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return {static_cast<cudaStream_t>(stream)};
}

template <typename T>
cuda::Call<T> call_of(const Problem& problem, const Tensor& features, const Tensor& channel_filter,
                      const Tensor& spatial_filter) {
  cuda::Call<T> call{};
  call.problem = problem;
  call.features = static_cast<const T*>(features.data_ptr());
  call.channel_filter = static_cast<const T*>(channel_filter.data_ptr());
  call.spatial_filter = static_cast<const T*>(spatial_filter.data_ptr());
  call.features_strides = strides_of(features);
  call.spatial_strides = strides_of(spatial_filter);
  return call;
}

// Calls `body` with a null pointer of the element type.
template <typename Body>
void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "ddfup: the features must be float32, float64, float16 or bfloat16");
  }
}

Tensor ddf_cuda(const Tensor& features, const Tensor& channel_filter, const Tensor& spatial_filter, int64_t scale,
                int64_t kernel_size, int64_t stride, int64_t dilation, int64_t heads, int64_t combine,
                int64_t padding) {
  // Before the device is set, so that an error has nothing to undo.
  const Problem p = problem_of(features, channel_filter, spatial_filter, scale, kernel_size, stride, dilation, heads,
                               combine, padding);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor channel = torch::stable::contiguous(channel_filter);
  Tensor output = empty_following(features, {p.batch, p.channels, p.grid_height * scale, p.grid_width * scale});
  const Launch launch = on_current_stream(features);
  with_type(features.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto call = call_of<T>(p, features, channel, spatial_filter);
    call.result = static_cast<T*>(output.data_ptr());
    call.output_strides = strides_of(output);
    cuda::forward(launch, call);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ddf_backward_cuda(const Tensor& grad_output, const Tensor& features,
                                                     const Tensor& channel_filter, const Tensor& spatial_filter,
                                                     int64_t scale, int64_t kernel_size, int64_t stride,
                                                     int64_t dilation, int64_t heads, int64_t combine, int64_t padding,
                                                     bool needs_features, bool needs_channel, bool needs_spatial) {
  const Problem p = problem_of(features, channel_filter, spatial_filter, scale, kernel_size, stride, dilation, heads,
                               combine, padding);
  check_grad_output(p, grad_output, features);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor channel = torch::stable::contiguous(channel_filter);
  const auto empty = [&](const Tensor& like, bool needed) {
    return torch::stable::new_empty(like, needed ? sizes_of(like) : std::vector<int64_t>{0});
  };
  Tensor grad_features = needs_features ? empty_following(features, sizes_of(features)) : empty(features, false);
  Tensor grad_channel = empty(channel_filter, needs_channel);
  Tensor grad_spatial = empty(spatial_filter, needs_spatial);
  const Launch launch = on_current_stream(features);
  with_type(features.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    std::vector<Tensor> scratch;  // the allocator reuses freed memory in the order of the stream
    const auto allocate = [&](int64_t count) {
      constexpr auto kType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
      scratch.push_back(torch::stable::new_empty(features, {count}, kType));
      return static_cast<cuda::Accumulator<T>*>(scratch.back().data_ptr());
    };
    auto call = call_of<T>(p, features, channel, spatial_filter);
    call.grad_output = static_cast<const T*>(grad_output.data_ptr());
    call.output_strides = strides_of(grad_output);
    if (needs_features) {
      call.result = static_cast<T*>(grad_features.data_ptr());
      call.result_strides = strides_of(grad_features);
      cuda::grad_features(launch, call);
    }
    if (needs_channel) {
      call.result = static_cast<T*>(grad_channel.data_ptr());
      cuda::grad_channel(launch, allocate, call);
    }
    if (needs_spatial) {
      call.result = static_cast<T*>(grad_spatial.data_ptr());
      cuda::grad_spatial(launch, allocate, call);
    }
  });
  return {grad_features, grad_channel, grad_spatial};
}

void check_norm_channels(int64_t channels) {
  STD_TORCH_CHECK(channels <= cuda::kNormChannels, "ddfup: channel_norm is for at most ", cuda::kNormChannels,
                  " channels; got ", channels);
}

Tensor channel_norm_cuda(const Tensor& rows, const Tensor& weight, const Tensor& bias, double eps) {
  const int64_t channels = check_channel_norm(rows, weight, bias);
  check_norm_channels(channels);
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor out = torch::stable::new_empty(rows, rows.sizes());
  cuda::NormCall call{};
  call.in = static_cast<const float*>(rows.data_ptr());
  call.weight = static_cast<const float*>(weight.data_ptr());
  call.bias = static_cast<const float*>(bias.data_ptr());
  call.out = static_cast<float*>(out.data_ptr());
  call.rows = rows.numel() / channels;
  call.channels = static_cast<int>(channels);
  call.eps = static_cast<float>(eps);
  cuda::channel_norm(on_current_stream(rows), call);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> channel_norm_backward_cuda(const Tensor& grad_output, const Tensor& rows,
                                                              const Tensor& weight, double eps) {
  const int64_t channels = check_channel_norm_backward(grad_output, rows, weight);
  check_norm_channels(channels);
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_output);
  const Tensor grad_rows = torch::stable::new_empty(rows, rows.sizes());
  const Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  const Tensor grad_bias = torch::stable::new_empty(weight, weight.sizes());
  Tensor scratch;  // the allocator reuses freed memory in the order of the stream
  const auto allocate = [&](int64_t count) {
    scratch = torch::stable::new_empty(rows, {count});
    return static_cast<float*>(scratch.data_ptr());
  };
  cuda::NormBackwardCall call{};
  call.grad = static_cast<const float*>(grad.data_ptr());
  call.in = static_cast<const float*>(rows.data_ptr());
  call.weight = static_cast<const float*>(weight.data_ptr());
  call.grad_in = static_cast<float*>(grad_rows.data_ptr());
  call.grad_weight = static_cast<float*>(grad_weight.data_ptr());
  call.grad_bias = static_cast<float*>(grad_bias.data_ptr());
  call.rows = rows.numel() / channels;
  call.channels = static_cast<int>(channels);
  call.eps = static_cast<float>(eps);
  cuda::channel_norm_backward(on_current_stream(rows), allocate, call);
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace
}  // namespace ddfup

STABLE_TORCH_LIBRARY_IMPL(ddfup, CUDA, m) {
  m.impl("ddf", TORCH_BOX(&ddfup::ddf_cuda));
  m.impl("ddf_backward", TORCH_BOX(&ddfup::ddf_backward_cuda));
  m.impl("channel_norm", TORCH_BOX(&ddfup::channel_norm_cuda));
  m.impl("channel_norm_backward", TORCH_BOX(&ddfup::channel_norm_backward_cuda));
}
