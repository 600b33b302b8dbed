// RMSNorm in float32, and the way back: one pass over the rows each.

#include "products.h"

namespace {

struct Norm {
  const float *x, *gain;  // [rows][width], rows x_stride apart
  int64_t rows, width, x_stride, block;  // a block of rows has its gradients of the gain summed by one thread
  float eps;
  float *out, *scales;  // [rows][width], [rows]
  const float* grad_out;
  float *grad_x, *grad_gains;  // [rows][width], [blocks][width] that start at zero
};

}  // namespace

extern "C" void norm_forward(const Norm* n, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n->rows; ++row) {
    n->scales[row] = rms_norm(n->x + row * n->x_stride, n->gain, n->width, n->eps, n->out + row * n->width);
  }
}

extern "C" void norm_backward(const Norm* n, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < n->rows; first += n->block) {
    float* grad_gain = n->grad_gains + first / n->block * n->width;
    for (int64_t row = first; row < std::min(first + n->block, n->rows); ++row) {
      const float *x = n->x + row * n->x_stride, *gain = n->gain, *grad = n->grad_out + row * n->width;
      float* grad_x = n->grad_x + row * n->width;
      const float scale = n->scales[row];
      for (int64_t i = 0; i < n->width; ++i) {
        grad_gain[i] += grad[i] * x[i] * scale;
        grad_x[i] = grad[i] * gain[i];
      }
      const float mean = dot(grad_x, x, n->width) * scale * scale / n->width;
      for (int64_t i = 0; i < n->width; ++i) grad_x[i] = scale * (grad_x[i] - mean * x[i]);
    }
  }
}
