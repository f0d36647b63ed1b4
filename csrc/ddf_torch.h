// What the libraries of all devices ask of their arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace ddfup {

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
  return channels;
}

}  // namespace ddfup
