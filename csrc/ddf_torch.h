// What the libraries of all devices ask of their arguments: whoever calls an op by itself, or a program exported with
// it, has passed no other check.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "ddf.h"

namespace ddfup {

inline Strides strides_of(const torch::stable::Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline bool is_floating(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline bool is_beside(const torch::stable::Tensor& tensor, const torch::stable::Tensor& first) {
  return tensor.device() == first.device();
}

// Arguments of ddfup::ddf.
inline Problem problem_of(const torch::stable::Tensor& features, const torch::stable::Tensor& channel,
                          const torch::stable::Tensor& spatial, int64_t scale, int64_t kernel_size, int64_t stride,
                          int64_t dilation, int64_t heads, int64_t combine, int64_t padding) {
  STD_TORCH_CHECK(features.dim() == 4 && channel.dim() == 5 && spatial.dim() == 4, "ddfup: wrong number of axes");
  STD_TORCH_CHECK(scale > 0 && kernel_size > 0 && kernel_size % 2 == 1 && stride > 0 && dilation > 0 && heads > 0 &&
                      features.size(1) % heads == 0,
                  "ddfup: option out of range");
  Problem p{};
  p.batch = features.size(0);
  p.channels = features.size(1);
  p.height = features.size(2);
  p.width = features.size(3);
  p.grid_height = spatial.size(2);
  p.grid_width = spatial.size(3);
  p.scale = scale;
  p.kernel_size = kernel_size;
  p.stride = stride;
  // Taps further out than the image see the same padding, and this keeps the tiles small.
  p.dilation = std::min(dilation, std::max(p.height, p.width));
  p.heads = heads;
  p.combine = static_cast<Combine>(combine);
  p.padding = static_cast<Padding>(padding);
  STD_TORCH_CHECK(p.channels > 0 && p.height > 0 && p.width > 0, "ddfup: features without pixels");
  STD_TORCH_CHECK(spatial.size(0) == p.batch && spatial.size(1) == scale * scale * heads * kernel_size * kernel_size &&
                      p.grid_height == (p.height + stride - 1) / stride &&
                      p.grid_width == (p.width + stride - 1) / stride,
                  "ddfup: spatial_filter does not fit the features");
  STD_TORCH_CHECK(channel.size(0) == p.batch && channel.size(1) == scale * scale && channel.size(2) == p.channels &&
                      channel.size(3) == kernel_size && channel.size(4) == kernel_size,
                  "ddfup: channel_filter does not fit the features");
  STD_TORCH_CHECK(is_floating(features), "ddfup: dtype must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(channel.scalar_type() == features.scalar_type() && spatial.scalar_type() == features.scalar_type(),
                  "ddfup: the three tensors must have one dtype");
  STD_TORCH_CHECK(is_beside(channel, features) && is_beside(spatial, features),
                  "ddfup: the three tensors must be on one device");
  return p;
}

// What ddfup::ddf_backward has besides.
inline void check_grad_output(const Problem& p, const torch::stable::Tensor& grad_output,
                              const torch::stable::Tensor& features) {
  STD_TORCH_CHECK(grad_output.dim() == 4 && grad_output.size(0) == p.batch && grad_output.size(1) == p.channels &&
                      grad_output.size(2) == p.grid_height * p.scale && grad_output.size(3) == p.grid_width * p.scale &&
                      grad_output.scalar_type() == features.scalar_type() && is_beside(grad_output, features),
                  "ddfup: grad_output does not fit the output");
}

// Arguments of ddfup::channel_norm; returns the number of channels.
inline int64_t check_channel_norm(const torch::stable::Tensor& rows, const torch::stable::Tensor& weight,
                                  const torch::stable::Tensor& bias) {
  using torch::headeronly::ScalarType;
  const int64_t axes = rows.dim();
  STD_TORCH_CHECK(axes > 0 && rows.is_contiguous() && weight.is_contiguous() && bias.is_contiguous(),
                  "ddfup: rows must be contiguous");
  const int64_t channels = rows.size(axes - 1);
  STD_TORCH_CHECK(channels > 0 && weight.numel() == channels && bias.numel() == channels,
                  "ddfup: weight and bias must have one value per channel");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
                      bias.scalar_type() == ScalarType::Float,
                  "ddfup: channel_norm is for float32");
  STD_TORCH_CHECK(is_beside(weight, rows) && is_beside(bias, rows), "ddfup: weight and bias must be beside the rows");
  return channels;
}

// Arguments of ddfup::channel_norm_backward, whose `grad` may have any strides; returns the number of channels.
inline int64_t check_channel_norm_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& rows,
                                           const torch::stable::Tensor& weight) {
  const int64_t channels = check_channel_norm(rows, weight, weight);
  const auto sizes = grad.sizes(), expected = rows.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()) &&
                      grad.scalar_type() == rows.scalar_type() && is_beside(grad, rows),
                  "ddfup: grad does not fit the rows");
  return channels;
}

}  // namespace ddfup
