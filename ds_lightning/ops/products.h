// What the kernels for a CPU share: products of float32 matrices on one core, and a fast exponential.
//
// The right factor of a product is packed: panels of 16 columns, [columns/16][inner][16], the last one filled with
// zeros. A number of a product does not depend on how many rows it is computed with.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t PANEL = 16;

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 12;  // floats of a register; rows whose sums fit into registers
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 6;
#else
constexpr int LANES = 4, TILE = 4;
#endif
constexpr int PARTS = PANEL / LANES;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef float Loose __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));  // anywhere in memory

inline Lanes lanes(const float* from) { return *reinterpret_cast<const Loose*>(from); }

inline float across(Lanes sums) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

inline float dot(const float* a, const float* b, int64_t n) {
  Lanes sums = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sums += lanes(a + i) * lanes(b + i);
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += a[i] * b[i];
  return across(sums);
}

inline float sum(const float* x, int64_t n) {
  Lanes sums = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sums += lanes(x + i);
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += x[i];
  return across(sums);
}

inline float largest(const float* x, int64_t n) {
  float most = x[0];
  int64_t i = 0;
  if (n >= LANES) {
    Lanes all = lanes(x);
    for (i = LANES; i + LANES <= n; i += LANES) all = lanes(x + i) > all ? lanes(x + i) : all;
    for (int lane = 0; lane < LANES; ++lane) most = std::max(most, all[lane]);
  }
  for (; i < n; ++i) most = std::max(most, x[i]);
  return most;
}

// Short rows: a call of memcpy takes longer than they do.
inline void copy(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) *reinterpret_cast<Loose*>(to + i) = lanes(from + i);
  for (; i < n; ++i) to[i] = from[i];
}

struct Matrix {  // packed
  const float* panels;
  int64_t inner, columns;
};

inline int64_t packed_size(int64_t inner, int64_t columns) { return inner * ((columns + PANEL - 1) / PANEL * PANEL); }

// The left factor of a product: element (row, k) is at row * row_stride + k * inner_stride.
struct Left {
  const float* data;
  int64_t row_stride, inner_stride = 1;
};

template <int ROWS>
void tile(Left a, const float* panel, int64_t inner, float* c, int64_t c_stride, int64_t columns, bool add) {
  Lanes sums[ROWS][PARTS] = {};
  for (int64_t k = 0; k < inner; ++k, a.data += a.inner_stride, panel += PANEL) {
    Lanes b[PARTS];
    for (int part = 0; part < PARTS; ++part) b[part] = lanes(panel + part * LANES);
    for (int row = 0; row < ROWS; ++row)
      for (int part = 0; part < PARTS; ++part) sums[row][part] += a.data[row * a.row_stride] * b[part];
  }
  for (int row = 0; row < ROWS; ++row) {
    float* to = c + row * c_stride;
    for (int part = 0; part < PARTS; ++part, to += LANES)
      if (columns >= (part + 1) * LANES) {
        Loose& all = *reinterpret_cast<Loose*>(to);
        all = add ? all + sums[row][part] : sums[row][part];
      } else {
        for (int64_t lane = 0; lane < columns - part * LANES; ++lane)
          to[lane] = add ? to[lane] + sums[row][part][lane] : sums[row][part][lane];
      }
  }
}

template <int ROWS = TILE>
void tile_of(int64_t rows, Left a, const float* panel, int64_t inner, float* c, int64_t c_stride, int64_t columns,
             bool add) {
  if (rows == ROWS) return tile<ROWS>(a, panel, inner, c, c_stride, columns, add);
  if constexpr (ROWS > 1) tile_of<ROWS - 1>(rows, a, panel, inner, c, c_stride, columns, add);
}

// c = a m, or c += a m; of m only the first rows where inner is less than it has.
inline void product(int64_t rows, Left a, const Matrix& m, float* c, int64_t c_stride, bool add = false,
                    int64_t inner = -1) {
  constexpr int64_t DEPTH = 512;  // so that a panel stays in the first cache
  if (inner < 0) inner = m.inner;
  for (int64_t first = 0; first < inner || first == 0; first += DEPTH) {
    const int64_t depth = std::min(DEPTH, inner - first);
    for (int64_t column = 0; column < m.columns; column += PANEL) {
      const float* panel = m.panels + column * m.inner + first * PANEL;
      const int64_t columns = std::min(PANEL, m.columns - column);
      for (int64_t row = 0; row < rows; row += TILE) {
        const Left from{a.data + row * a.row_stride + first * a.inner_stride, a.row_stride, a.inner_stride};
        tile_of(std::min<int64_t>(TILE, rows - row), from, panel, depth, c + row * c_stride + column, c_stride, columns,
                add || first > 0);
      }
    }
  }
}

template <typename T>
T* room(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// Pack the matrix whose element (k, column) is at k * inner_stride + column * column_stride.
inline Matrix pack(std::vector<float>& buffer, const float* data, int64_t inner, int64_t inner_stride, int64_t columns,
                   int64_t column_stride) {
  float* to = room(buffer, packed_size(inner, columns));
  for (int64_t first = 0; first < columns; first += PANEL) {
    const int64_t width = std::min(PANEL, columns - first);
    for (int64_t k = 0; k < inner; ++k, to += PANEL) {
      const float* from = data + k * inner_stride + first * column_stride;
      for (int64_t column = 0; column < width; ++column) to[column] = from[column * column_stride];
      for (int64_t column = width; column < PANEL; ++column) to[column] = 0.0f;
    }
  }
  return {buffer.data(), inner, columns};
}

// exp to 2 units in the last place, written so that compilers make vectors of it (Cephes' polynomial).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the constant rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + (127 - 0x4b400000)) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// to = silu(gate) * up * factor, of gate and up side by side; to may be the gate.
inline void swiglu(const float* gate_up, int64_t width, float factor, float* to) {
  const float *gate = gate_up, *up = gate_up + width;
  for (int64_t i = 0; i < width; ++i) to[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i] * factor;
}

// One row of RMSNorm; returns the factor of the row.
inline float rms_norm(const float* x, const float* gain, int64_t width, float eps, float* to) {
  const float factor = 1.0f / std::sqrt(dot(x, x, width) / width + eps);
  for (int64_t i = 0; i < width; ++i) to[i] = x[i] * factor * gain[i];
  return factor;
}

// Rotate the pairs of channels (0, 1), (2, 3), ... by the angles of a position, or back.
inline void rotate(float* x, int64_t channels, const float* cos, const float* sin, float direction = 1.0f) {
  for (int64_t pair = 0; pair < channels / 2; ++pair) {
    const float re = x[2 * pair], im = x[2 * pair + 1], s = direction * sin[pair];
    x[2 * pair] = re * cos[pair] - im * s;
    x[2 * pair + 1] = re * s + im * cos[pair];
  }
}

}  // namespace
