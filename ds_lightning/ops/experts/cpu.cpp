// The routed experts in float32: a token's row goes to each of its experts, and what they return is summed.
//
// Slots, a token and one of its experts, are sorted by expert. A thread takes an expert; sums over slots have one order,
// whatever the number of threads.

#include "products.h"

namespace {

constexpr int64_t CHUNK = 256;  // rows of an expert that are computed at once

struct Experts {
  const float* x;          // [tokens][hidden]
  const int64_t* indices;  // [tokens][topk]
  const float *gates;      // [tokens][topk]
  const float *gate_up_proj, *down_proj;  // [experts][2 * width][hidden], [experts][hidden][width]
  int64_t tokens, topk, experts, hidden, width;
  int64_t *slots, *places, *ends;  // sorted slots, where each slot went, and the first one of each expert
  float *gate_up, *rows, *out;     // [slots][2 * width], [slots][hidden], [tokens][hidden]
  // Of the backward pass; those of weights start at zero.
  const float* grad_out;
  float *grad_x, *grad_gates, *grad_gate_up_proj, *grad_down_proj;
};

struct Buffers {
  std::vector<float> x, grad, hidden, scaled, gate_up, first, second, third, fourth;
};

class Expert {
 public:
  Expert(const Experts& experts, int64_t number, Buffers& buffers)
      : e(experts), number_(number), gate_up_proj_(experts.gate_up_proj + number * 2 * experts.width * experts.hidden),
        down_proj_(experts.down_proj + number * experts.width * experts.hidden), b(buffers) {}

  void forward() {
    const Matrix gate_up_proj = pack(b.first, gate_up_proj_, e.hidden, 1, 2 * e.width, e.hidden);
    const Matrix down_proj = pack(b.second, down_proj_, e.width, 1, e.hidden, e.width);
    for (int64_t begin = e.ends[number_]; begin < e.ends[number_ + 1]; begin += CHUNK) {
      const int64_t count = std::min(CHUNK, e.ends[number_ + 1] - begin);
      float* gate_up = e.gate_up + begin * 2 * e.width;
      product(count, {gathered(b.x, e.x, begin, count), e.hidden}, gate_up_proj, gate_up, 2 * e.width);
      float* hidden = room(b.hidden, count * e.width);
      for (int64_t row = 0; row < count; ++row)
        swiglu(gate_up + row * 2 * e.width, e.width, e.gates[e.slots[begin + row]], hidden + row * e.width);
      product(count, {hidden, e.width}, down_proj, e.rows + begin * e.hidden, e.hidden);
    }
  }

  void backward() {
    const Matrix gate_up_proj = pack(b.first, gate_up_proj_, 2 * e.width, e.hidden, e.hidden, 1);
    const Matrix down_proj = pack(b.second, down_proj_, e.hidden, e.width, e.width, 1);
    for (int64_t begin = e.ends[number_]; begin < e.ends[number_ + 1]; begin += CHUNK) {
      const int64_t count = std::min(CHUNK, e.ends[number_ + 1] - begin);
      const float* grad = gathered(b.grad, e.grad_out, begin, count);
      float* hidden = room(b.hidden, count * e.width);
      float* scaled = room(b.scaled, count * e.width);  // gradient of the hidden row times its gate value
      float* grad_gate_up = room(b.gate_up, count * 2 * e.width);
      product(count, {grad, e.hidden}, down_proj, scaled, e.width);
      for (int64_t row = 0; row < count; ++row)
        activate(begin + row, hidden + row * e.width, scaled + row * e.width, grad_gate_up + row * 2 * e.width);
      product(e.hidden, {grad, 1, e.hidden}, pack(b.third, hidden, count, e.width, e.width, 1),
              e.grad_down_proj + number_ * e.hidden * e.width, e.width, true);
      const float* x = gathered(b.x, e.x, begin, count);
      product(2 * e.width, {grad_gate_up, 1, 2 * e.width}, pack(b.fourth, x, count, e.hidden, e.hidden, 1),
              e.grad_gate_up_proj + number_ * 2 * e.width * e.hidden, e.hidden, true);
      product(count, {grad_gate_up, 2 * e.width}, gate_up_proj, e.rows + begin * e.hidden, e.hidden);
    }
  }

 private:
  // One row through SwiGLU again, and back.
  void activate(int64_t place, float* hidden, const float* scaled, float* grad_gate_up) {
    const float *gate = e.gate_up + place * 2 * e.width, *up = gate + e.width, value = e.gates[e.slots[place]];
    float *grad_gate = grad_gate_up, *grad_up = grad_gate_up + e.width;
    for (int64_t i = 0; i < e.width; ++i) {
      const float sigmoid = 1.0f / (1.0f + exponential(-gate[i])), act = gate[i] * sigmoid, grad = scaled[i] * value;
      hidden[i] = act * up[i];
      grad_up[i] = grad * act;
      grad_gate[i] = grad * up[i] * (sigmoid + act * (1.0f - sigmoid));
    }
    e.grad_gates[e.slots[place]] = dot(scaled, hidden, e.width);
    for (int64_t i = 0; i < e.width; ++i) hidden[i] *= value;
  }

  const float* gathered(std::vector<float>& buffer, const float* of_tokens, int64_t begin, int64_t count) {
    float* to = room(buffer, count * e.hidden);
    for (int64_t row = 0; row < count; ++row)
      copy(to + row * e.hidden, of_tokens + e.slots[begin + row] / e.topk * e.hidden, e.hidden);
    return to;
  }

  const Experts& e;
  const int64_t number_;
  const float *gate_up_proj_, *down_proj_;
  Buffers& b;
};

template <void (Expert::*pass)()>
void every(const Experts& e, int64_t threads, float* out) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t number = 0; number < e.experts; ++number) {
    static thread_local Buffers buffers;
    if (e.ends[number] < e.ends[number + 1]) (Expert(e, number, buffers).*pass)();
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t token = 0; token < e.tokens; ++token) {
    float* to = out + token * e.hidden;
    for (int64_t slot = token * e.topk; slot < (token + 1) * e.topk; ++slot) {
      const float* from = e.rows + e.places[slot] * e.hidden;
      for (int64_t i = 0; i < e.hidden; ++i) to[i] = slot == token * e.topk ? from[i] : to[i] + from[i];
    }
  }
}

}  // namespace

extern "C" void experts_forward(const Experts* e, int64_t threads) {
  const int64_t count = e->tokens * e->topk;
  std::fill(e->ends, e->ends + e->experts + 1, 0);
  for (int64_t slot = 0; slot < count; ++slot) ++e->ends[e->indices[slot] + 1];
  for (int64_t number = 0; number < e->experts; ++number) e->ends[number + 1] += e->ends[number];
  std::vector<int64_t> next(e->ends, e->ends + e->experts);
  for (int64_t slot = 0; slot < count; ++slot) e->slots[e->places[slot] = next[e->indices[slot]]++] = slot;
  every<&Expert::forward>(*e, threads, e->out);
}

extern "C" void experts_backward(const Experts* e, int64_t threads) { every<&Expert::backward>(*e, threads, e->grad_x); }
