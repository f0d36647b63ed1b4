// The formula of the decoupled dynamic filter, its sizes and its options; shared by every backend, free of torch and CUDA.
//
//   out[n, c, y*s + i, x*s + j] = sum over u, v in [0, K) of
//       mix(channel[n, i*s + j, c, u, v], spatial[n, ((i*s + j)*heads + g)*K*K + u*K + v, y, x])
//       * features[n, c, y*stride + (u - K/2)*dilation, x*stride + (v - K/2)*dilation]
//
//   s = scale, i and j in [0, s), g = c / (C / heads), mix = product or sum; x and y run over the grid.
//   Features outside the image are 0 (Padding::kZeros) or those of the nearest pixel (Padding::kReplicate).
#pragma once

#include <cstdint>

namespace ddfup {

// The integer codes are part of the op's schema: ddfup/ops/ddf.py holds the same table.
enum class Combine : int64_t { kMul = 0, kAdd = 1 };
enum class Padding : int64_t { kZeros = 0, kReplicate = 1 };

struct Problem {
  int64_t batch, channels;             // N, C
  int64_t height, width;               // of the features
  int64_t grid_height, grid_width;     // ceil(height / stride), ceil(width / stride); output = scale * grid
  int64_t scale, kernel_size, stride, dilation, heads;
  Combine combine;
  Padding padding;
};

// Element strides of a 4-d tensor (N, C, H, W). The channel filter (N, S, C, K, K) is always contiguous.
struct Strides {
  int64_t n, c, y, x;
};

}  // namespace ddfup
