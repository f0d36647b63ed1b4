// Registers the CPU kernels of ddfup::ddf and ddfup::ddf_backward, whose schema stands in ddfup/ops/ddf.py, of
// ddfup::channel_norm, of ddfup/ops/norm.py, and of ddfup::convex_filters, of ddfup/ops/convex.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ddf_cpu_backward.h"
#include "ddf_cpu_convex.h"
#include "ddf_cpu_forward.h"
#include "ddf_cpu_norm.h"
#include "ddf_cpu_pixels.h"
#include "ddf_torch.h"

namespace {

using ddfup::Problem;
using ddfup::Strides;
using ddfup::strides_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct InParallel {
  template <typename Task>
  void operator()(int64_t count, const Task& task) const {
    if (count > 0) torch::stable::parallel_for(0, count, 1, task);
  }
};

// The same rule as is_channels_last in ddfup/ops/reference.py.
bool is_channels_last(const Tensor& features) {
  return features.size(1) > 1 && features.stride(1) == 1 && !features.is_contiguous();
}

// Lets the system back a large new tensor with huge pages: clearing single pages costs more than the op itself.
Tensor with_huge_pages(Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish; may be refused
#endif
  return tensor;
}

Tensor empty_following(const Tensor& features, int64_t height, int64_t width) {
  if (!is_channels_last(features))
    return with_huge_pages(torch::stable::new_empty(features, {features.size(0), features.size(1), height, width}));
  const Tensor nhwc =
      with_huge_pages(torch::stable::new_empty(features, {features.size(0), height, width, features.size(1)}));
  return torch::stable::transpose(torch::stable::transpose(nhwc, 1, 3), 2, 3);
}

// Calls `run` with a null pointer of the storage type.
template <typename Run>
void dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return run(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<ddfup::Float16*>(nullptr));
    case ScalarType::BFloat16:
      return run(static_cast<ddfup::BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "ddfup: dtype must be float32, float64, float16 or bfloat16");
  }
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* write(const Tensor& tensor, bool wanted = true) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

Tensor ddf_forward_cpu(const Tensor& features, const Tensor& channel_filter, const Tensor& spatial_filter,
                       int64_t scale, int64_t kernel_size, int64_t stride, int64_t dilation, int64_t heads,
                       int64_t combine, int64_t padding) {
  const Problem p = ddfup::problem_of(features, channel_filter, spatial_filter, scale, kernel_size, stride, dilation,
                                      heads, combine, padding);
  const Tensor channel = torch::stable::contiguous(channel_filter);
  const Tensor out = empty_following(features, p.grid_height * scale, p.grid_width * scale);
  dispatch(features.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = [&](auto* kind) {
      using Kernel = std::remove_pointer_t<decltype(kind)>;
      const Kernel forward(p, read<T>(features), strides_of(features), read<T>(channel), read<T>(spatial_filter),
                           strides_of(spatial_filter), write<T>(out), strides_of(out),
                           torch::stable::get_num_threads());
      forward.run(InParallel());
    };
    // Not worth its compilation for float64.
    if constexpr (!std::is_same_v<T, double>)
      if (ddfup::PixelForward<T>::serves(p, strides_of(features), strides_of(out)))
        return run(static_cast<ddfup::PixelForward<T>*>(nullptr));
    run(static_cast<ddfup::Forward<T>*>(nullptr));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> ddf_backward_cpu(const Tensor& grad_output, const Tensor& features,
                                                    const Tensor& channel_filter, const Tensor& spatial_filter,
                                                    int64_t scale, int64_t kernel_size, int64_t stride,
                                                    int64_t dilation, int64_t heads, int64_t combine, int64_t padding,
                                                    bool needs_features, bool needs_channel, bool needs_spatial) {
  const Problem p = ddfup::problem_of(features, channel_filter, spatial_filter, scale, kernel_size, stride, dilation,
                                      heads, combine, padding);
  ddfup::check_grad_output(p, grad_output, features);
  const Tensor channel = torch::stable::contiguous(channel_filter);
  const Tensor grad_features =
      needs_features ? empty_following(features, p.height, p.width) : torch::stable::new_empty(features, {0});
  const Tensor grad_channel =
      needs_channel ? torch::stable::new_empty(channel, channel.sizes()) : torch::stable::new_empty(features, {0});
  const Tensor grad_spatial = needs_spatial
                                  ? with_huge_pages(torch::stable::new_empty(spatial_filter, spatial_filter.sizes()))
                                  : torch::stable::new_empty(features, {0});
  dispatch(features.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const ddfup::Backward<T> backward(p, read<T>(grad_output), strides_of(grad_output), read<T>(features),
                                      strides_of(features), read<T>(channel), read<T>(spatial_filter),
                                      strides_of(spatial_filter), write<T>(grad_features, needs_features),
                                      needs_features ? strides_of(grad_features) : Strides{},
                                      write<T>(grad_channel, needs_channel), write<T>(grad_spatial, needs_spatial));
    backward.run(InParallel());
  });
  return {grad_features, grad_channel, grad_spatial};
}

Tensor channel_norm_cpu(const Tensor& rows, const Tensor& weight, const Tensor& bias, double eps) {
  const int64_t channels = ddfup::check_channel_norm(rows, weight, bias);
  const Tensor out = torch::stable::new_empty(rows, rows.sizes());
  const ddfup::RowNorm norm(read<float>(rows), rows.numel() / channels, channels, read<float>(weight),
                            read<float>(bias), static_cast<float>(eps), write<float>(out));
  norm.run(InParallel());
  return out;
}

Tensor convex_filters_cpu(const Tensor& rows, const Tensor& weight, const Tensor& bias, int64_t taps) {
  STD_TORCH_CHECK(rows.dim() == 4 && rows.is_contiguous() && weight.is_contiguous() && bias.is_contiguous(),
                  "ddfup: rows must be contiguous");
  const int64_t channels = rows.size(3), planes = bias.numel(), pixels = rows.size(1) * rows.size(2);
  STD_TORCH_CHECK(taps > 0 && planes % taps == 0 && weight.numel() == planes * channels,
                  "ddfup: weight and bias must have a row for every tap of every filter");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
                      bias.scalar_type() == ScalarType::Float,
                  "ddfup: convex_filters is for float32");
  const Tensor out = torch::stable::new_empty(rows, {rows.size(0), planes, rows.size(1), rows.size(2)});
  const ddfup::ConvexFilters filters(read<float>(rows), rows.size(0), pixels, static_cast<int>(channels),
                                     read<float>(weight), read<float>(bias), static_cast<int>(planes / taps),
                                     static_cast<int>(taps), write<float>(out));
  filters.run(InParallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddfup, CPU, m) {
  m.impl("ddf", TORCH_BOX(&ddf_forward_cpu));
  m.impl("ddf_backward", TORCH_BOX(&ddf_backward_cpu));
  m.impl("channel_norm", TORCH_BOX(&channel_norm_cpu));
  m.impl("convex_filters", TORCH_BOX(&convex_filters_cpu));
}
