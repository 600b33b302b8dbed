// Causal attention of MLA in float32, rotary embedding included: every span of tokens behind its prefix.
//
// A thread takes a head of a group, which is all spans behind one prefix and what that prefix is itself: nobody else
// writes what it writes, and its sums have one order, whatever the number of threads.

#include "products.h"

namespace {

constexpr int64_t BLOCK = 48;  // queries whose scores exist at once

struct Attention {
  const float *query, *key_value, *k_rope;  // [tokens][heads][nope + rope], [tokens][heads][nope + v_dim], [tokens][rope]
  const float *cos, *sin;                   // [positions][rope / 2]
  const int64_t* spans;                     // [spans][4]: first token and tokens of the prefix, the same of the span
  const int64_t* groups;                    // [groups + 1]: first span
  float *out, *log_sum;                     // [tokens][heads][v_dim], [tokens][heads]
  // Of the backward pass; those of keys and values start at zero.
  const float* grad_out;
  float *grad_query, *grad_key_value, *grad_k_rope;  // the last: [heads][tokens][rope]
  int64_t num_groups, positions;                     // token t has the angles of t mod positions
  int64_t k_rope_stride, tokens, heads, nope, rope, v_dim;
  float scale;
};

// Keys and values of some tokens for one head, packed as the products want them, and their gradients.
class Keys {
 public:
  int64_t begin = 0, count = 0;
  Matrix columns{}, value_rows{}, rows{}, value_columns{};  // the first two for scores and output, the others to go back
  float *grad_keys = nullptr, *grad_values = nullptr;

  void load(const Attention& a, int64_t head, int64_t first, int64_t number, bool back) {
    begin = first, count = number;
    const int64_t width = a.nope + a.rope, stride = width + a.v_dim;
    float* to = room(raw_, count * stride);
    for (int64_t token = begin; token < begin + count; ++token, to += stride) {
      const float* from = a.key_value + (token * a.heads + head) * (a.nope + a.v_dim);
      copy(to, from, a.nope);
      copy(to + a.nope, a.k_rope + token * a.k_rope_stride, a.rope);
      copy(to + width, from + a.nope, a.v_dim);
      turn(a, to + a.nope, token, 1.0f);
    }
    columns = pack(columns_, raw_.data(), width, 1, count, stride);
    if (!back) {
      value_rows = pack(value_rows_, raw_.data() + width, count, stride, a.v_dim, 1);
      return;
    }
    rows = pack(rows_, raw_.data(), count, stride, width, 1);
    value_columns = pack(value_columns_, raw_.data() + width, a.v_dim, 1, count, stride);
    grad_keys = room(grad_keys_, count * width), grad_values = room(grad_values_, count * a.v_dim);
    std::fill(grad_keys, grad_keys + count * width, 0.0f);
    std::fill(grad_values, grad_values + count * a.v_dim, 0.0f);
  }

  // Add the gradients to those of the tokens.
  void hand_over(const Attention& a, int64_t head) {
    const int64_t width = a.nope + a.rope;
    for (int64_t i = 0; i < count; ++i) {
      float* to = a.grad_key_value + ((begin + i) * a.heads + head) * (a.nope + a.v_dim);
      float* key = grad_keys + i * width;
      for (int64_t j = 0; j < a.nope; ++j) to[j] += key[j];
      for (int64_t j = 0; j < a.v_dim; ++j) to[a.nope + j] += grad_values[i * a.v_dim + j];
      turn(a, key + a.nope, begin + i, -1.0f);
      to = a.grad_k_rope + (head * a.tokens + begin + i) * a.rope;
      for (int64_t j = 0; j < a.rope; ++j) to[j] += key[a.nope + j];
    }
    count = 0;
  }

  static void turn(const Attention& a, float* x, int64_t token, float direction) {
    const int64_t angles = token % a.positions * (a.rope / 2);
    rotate(x, a.rope, a.cos + angles, a.sin + angles, direction);
  }

 private:
  std::vector<float> raw_, columns_, value_rows_, rows_, value_columns_, grad_keys_, grad_values_;
};

struct Buffers {
  Keys prefix, own;
  std::vector<float> query, scores, grad_scores, query_rows, grad_rows;
};

class Head {
 public:
  Head(const Attention& attention, int64_t head, Buffers& buffers)
      : a(attention), head_(head), width_(attention.nope + attention.rope), b(buffers) {
    b.prefix.count = b.own.count = 0;
  }

  void forward(const int64_t* span) {
    load(span, false);
    const float scale = a.scale;  // in a register: what it is read from might be written to, for all a compiler knows
    const int64_t prefix = b.prefix.count, keys = prefix + b.own.count;
    for (int64_t first = 0; first < b.own.count; first += BLOCK) {
      const int64_t rows = std::min(BLOCK, b.own.count - first), seen = first + rows;
      const Left query = queries(first, rows);
      float* scores = room(b.scores, rows * keys);
      if (prefix) product(rows, query, b.prefix.columns, scores, keys);
      product(rows, query, {b.own.columns.panels, width_, seen}, scores + prefix, keys);
      for (int64_t row = 0; row < rows; ++row) {
        float* score = scores + row * keys;
        const int64_t before = prefix + first + row + 1;
        const float most = scale * largest(score, before);
        for (int64_t i = 0; i < before; ++i) score[i] = exponential(scale * score[i] - most);
        const float total = sum(score, before), share = 1.0f / total;
        for (int64_t i = 0; i < before; ++i) score[i] *= share;
        for (int64_t i = before; i < prefix + seen; ++i) score[i] = 0.0f;
        a.log_sum[(b.own.begin + first + row) * a.heads + head_] = most + std::log(total);
      }
      float* out = a.out + ((b.own.begin + first) * a.heads + head_) * a.v_dim;
      product(rows, {scores + prefix, keys}, b.own.value_rows, out, a.heads * a.v_dim, false, seen);
      if (prefix) product(rows, {scores, keys}, b.prefix.value_rows, out, a.heads * a.v_dim, true);
    }
  }

  void backward(const int64_t* span) {
    load(span, true);
    const float scale = a.scale;
    const int64_t prefix = b.prefix.count, keys = prefix + b.own.count, out_stride = a.heads * a.v_dim;
    for (int64_t first = 0; first < b.own.count; first += BLOCK) {
      const int64_t rows = std::min(BLOCK, b.own.count - first), seen = first + rows;
      const int64_t place = ((b.own.begin + first) * a.heads + head_) * a.v_dim;
      const Left query = queries(first, rows), grad{a.grad_out + place, out_stride};
      float* scores = room(b.scores, rows * keys);
      float* grad_scores = room(b.grad_scores, rows * keys);
      if (prefix) product(rows, query, b.prefix.columns, scores, keys);
      product(rows, query, {b.own.columns.panels, width_, seen}, scores + prefix, keys);
      if (prefix) product(rows, grad, b.prefix.value_columns, grad_scores, keys);
      product(rows, grad, {b.own.value_columns.panels, a.v_dim, seen}, grad_scores + prefix, keys);
      for (int64_t row = 0; row < rows; ++row) {
        float *p = scores + row * keys, *g = grad_scores + row * keys;
        const int64_t before = prefix + first + row + 1;
        const float log_sum = a.log_sum[(b.own.begin + first + row) * a.heads + head_];
        const float mean = dot(grad.data + row * out_stride, a.out + place + row * out_stride, a.v_dim);
        for (int64_t i = 0; i < before; ++i) p[i] = exponential(scale * p[i] - log_sum);
        for (int64_t i = 0; i < before; ++i) g[i] = p[i] * (g[i] - mean) * scale;
        for (int64_t i = before; i < prefix + seen; ++i) p[i] = g[i] = 0.0f;
      }
      const Matrix grads = pack(b.grad_rows, grad.data, rows, out_stride, a.v_dim, 1);
      const Matrix turned = pack(b.query_rows, query.data, rows, width_, width_, 1);
      float* grad_query = a.grad_query + ((b.own.begin + first) * a.heads + head_) * width_;
      product(seen, {scores + prefix, 1, keys}, grads, b.own.grad_values, a.v_dim, true);
      product(seen, {grad_scores + prefix, 1, keys}, turned, b.own.grad_keys, width_, true);
      product(rows, {grad_scores + prefix, keys}, b.own.rows, grad_query, a.heads * width_, false, seen);
      if (prefix) {
        product(prefix, {scores, 1, keys}, grads, b.prefix.grad_values, a.v_dim, true);
        product(prefix, {grad_scores, 1, keys}, turned, b.prefix.grad_keys, width_, true);
        product(rows, {grad_scores, keys}, b.prefix.rows, grad_query, a.heads * width_, true);
      }
      for (int64_t row = 0; row < rows; ++row)
        Keys::turn(a, grad_query + row * a.heads * width_ + a.nope, b.own.begin + first + row, -1.0f);
    }
    b.own.hand_over(a, head_);
  }

  void finish_forward() {}
  void finish_backward() { b.prefix.hand_over(a, head_); }

 private:
  // Spans of a group that have a prefix have the same one: it is loaded once.
  void load(const int64_t* span, bool back) {
    b.own.load(a, head_, span[2], span[3], back);
    if (span[1] != b.prefix.count) b.prefix.load(a, head_, span[0], span[1], back);
  }

  Left queries(int64_t first, int64_t rows) {
    float* query = room(b.query, rows * width_);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = b.own.begin + first + row;
      copy(query + row * width_, a.query + (token * a.heads + head_) * width_, width_);
      Keys::turn(a, query + row * width_ + a.nope, token, 1.0f);
    }
    return {query, width_};
  }

  const Attention& a;
  const int64_t head_, width_;
  Buffers& b;
};

template <void (Head::*pass)(const int64_t*), void (Head::*finish)()>
void every(const Attention& a, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t unit = 0; unit < a.num_groups * a.heads; ++unit) {
    static thread_local Buffers buffers;
    const int64_t group = unit / a.heads;
    Head head(a, unit % a.heads, buffers);
    for (int64_t span = a.groups[group]; span < a.groups[group + 1]; ++span) (head.*pass)(a.spans + 4 * span);
    (head.*finish)();
  }
}

}  // namespace

extern "C" void attention_forward(const Attention* a, int64_t threads) { every<&Head::forward, &Head::finish_forward>(*a, threads); }

extern "C" void attention_backward(const Attention* a, int64_t threads) { every<&Head::backward, &Head::finish_backward>(*a, threads); }
