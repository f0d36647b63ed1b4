// Layer normalisation of short rows, the channels of a pixel where they are last in memory; free of torch, as
// ddf_kernel.cuh.
//
// A row is too short for a block, and too long for a thread to read it straight from memory, where its neighbours would
// be far away: a block takes many rows at once into shared memory, where each belongs to a thread.
#pragma once

#include "ddf_kernel.cuh"

namespace ddfup {
namespace cuda {

constexpr int kNormValues = 5120;   // floats of shared memory: few enough for eleven blocks at a time
constexpr int kNormChannels = 256;  // more are PyTorch's

struct NormCall {
  const float *in, *weight, *bias;
  float* out;
  int64_t rows;
  int channels, rows_per_block;
  float eps;
};

// An odd distance between the rows in shared memory, so that threads that read the same channel meet no bank twice.
__host__ __device__ constexpr int norm_pitch(int channels) { return channels | 1; }

// VECTOR floats are read and written at a time; it divides the number of channels.
template <int VECTOR>
__global__ void __launch_bounds__(kThreads) channel_norm_kernel(const NormCall call) {
  __shared__ float values[kNormValues];
  const int channels = call.channels, pitch = norm_pitch(channels), pieces = channels / VECTOR;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * call.rows_per_block;
  const int rows = static_cast<int>(min(static_cast<int64_t>(call.rows_per_block), call.rows - first));
  const float* in = call.in + first * channels;
  float* out = call.out + first * channels;
  const int thread = static_cast<int>(threadIdx.x);

  for (int i = thread; i < rows * pieces; i += kThreads) {
    const auto piece = *reinterpret_cast<const Vector<float, VECTOR>*>(in + i * VECTOR);
    float* to = values + i / pieces * pitch + i % pieces * VECTOR;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) to[e] = piece.value[e];
  }
  __syncthreads();
  if (thread < rows) {
    float* row = values + thread * pitch;
    float sum = 0, square = 0;
    for (int c = 0; c < channels; ++c) sum += row[c];
    const float mean = sum / channels;
    for (int c = 0; c < channels; ++c) square += (row[c] - mean) * (row[c] - mean);
    const float scale = 1.0f / sqrtf(square / channels + call.eps);
    for (int c = 0; c < channels; ++c) row[c] = (row[c] - mean) * scale * load(call.weight + c) + load(call.bias + c);
  }
  __syncthreads();
  for (int i = thread; i < rows * pieces; i += kThreads) {
    const float* from = values + i / pieces * pitch + i % pieces * VECTOR;
    Vector<float, VECTOR> piece;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) piece.value[e] = from[e];
    *reinterpret_cast<Vector<float, VECTOR>*>(out + i * VECTOR) = piece;
  }
}

}  // namespace cuda
}  // namespace ddfup
