// One decoding step of a DeepSeek model in float32: every row of the batch is given one token.
//
// A row goes through all layers on one core. Rows share nothing but weights, so threads meet once a step, and a number
// does not depend on what else is in the batch. Weights come packed: panels of 16 columns, [columns/16][inner][16].

#include "products.h"

namespace {

constexpr int64_t CHUNK = 64;  // rows that go through the layers together

struct Layer {
  const float *input_norm, *post_norm, *query_norm, *latent_norm;
  Matrix query_a, query_b, latent, absorbed_key, absorbed_value, output;  // absorbed ones: of the first head
  Matrix gate_up, down;                                                   // dense, or of the shared experts
  Matrix router, expert_gate_up, expert_down;                             // of the first expert
  const float* bias;
};

struct Model {
  const Layer* layers;
  const float *embedding, *norm;
  Matrix head;
  int64_t num_layers, hidden, heads, kv_rank, nope, rope, v_dim;
  int64_t experts, topk, groups, topk_groups, softmax, normalised;
  float scale, eps, routed_scale;
};

struct Step {
  const int64_t *tokens, *positions;
  float* cache;  // [layers][rows][positions][kv_rank + rope]
  int64_t layer_stride, row_stride;
  const float *cos, *sin;  // [positions][rope / 2]
  float* logits;           // [rows][vocabulary]
  int16_t* chosen;         // [rows][layers with experts][topk]
};

// The matrix of a later head or expert.
Matrix nth(const Matrix& m, int64_t number) {
  return {m.panels + number * packed_size(m.inner, m.columns), m.inner, m.columns};
}

constexpr float LATENT_EPS = 1e-6f;  // of the norms of latents, whatever the model's: see nn/attention.py

void norm_rows(int64_t rows, const float* x, int64_t stride, const float* gain, int64_t width, float eps, float* to) {
  for (int64_t row = 0; row < rows; ++row) rms_norm(x + row * stride, gain, width, eps, to + row * stride);
}

// Indices of the largest, largest first; of equal ones the first.
void best_of(const float* values, int64_t count, int64_t wanted, int64_t* out) {
  for (int64_t n = 0; n < wanted; ++n) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i) {
      bool taken = false;
      for (int64_t before = 0; before < n; ++before) taken |= out[before] == i;
      if (!taken && (best < 0 || values[i] > values[best])) best = i;
    }
    out[n] = best;
  }
}

// Memory of one thread, kept from step to step.
struct Buffers {
  std::vector<float> x, normal, low, query, entry, latent_query, weight, mixed, values, gate_up, scores, gates, choice, best,
      own, out;
  std::vector<int64_t> experts, slots, kept;
};

class Chunk {
 public:
  Chunk(const Model& model, const Step& step, int64_t first, int64_t rows, Buffers& buffers)
      : m(model), s(step), first_(first), rows_(rows), b(buffers) {}

  void run() {
    float* x = room(b.x, rows_ * m.hidden);
    normal_ = room(b.normal, rows_ * m.hidden);
    for (int64_t row = 0; row < rows_; ++row)
      copy(x + row * m.hidden, m.embedding + s.tokens[first_ + row] * m.hidden, m.hidden);
    int64_t with_experts = 0, of_all = 0;
    for (int64_t layer = 0; layer < m.num_layers; ++layer) of_all += m.layers[layer].router.panels != nullptr;
    for (int64_t number = 0; number < m.num_layers; ++number) {
      const Layer& layer = m.layers[number];
      norm_rows(rows_, x, m.hidden, layer.input_norm, m.hidden, m.eps, normal_);
      attention(layer, s.cache + number * s.layer_stride, x);
      norm_rows(rows_, x, m.hidden, layer.post_norm, m.hidden, m.eps, normal_);
      if (layer.router.panels) routed(layer, s.chosen + with_experts++ * m.topk, of_all * m.topk, x);
      if (layer.gate_up.panels) dense(layer, x);
    }
    norm_rows(rows_, x, m.hidden, m.norm, m.hidden, m.eps, normal_);
    product(rows_, {normal_, m.hidden}, m.head, s.logits + first_ * m.head.columns, m.head.columns);
  }

 private:
  void attention(const Layer& layer, float* cache, float* x) {
    const int64_t head_width = m.nope + m.rope, width = m.kv_rank + m.rope;
    float* query = room(b.query, rows_ * m.heads * head_width);
    if (layer.query_a.panels) {
      const int64_t rank = layer.query_a.columns;
      float* low = room(b.low, rows_ * rank);
      product(rows_, {normal_, m.hidden}, layer.query_a, low, rank);
      norm_rows(rows_, low, rank, layer.query_norm, rank, LATENT_EPS, low);
      product(rows_, {low, rank}, layer.query_b, query, m.heads * head_width);
    } else {
      product(rows_, {normal_, m.hidden}, layer.query_b, query, m.heads * head_width);
    }
    float* entry = room(b.entry, rows_ * width);
    product(rows_, {normal_, m.hidden}, layer.latent, entry, width);
    norm_rows(rows_, entry, width, layer.latent_norm, m.kv_rank, LATENT_EPS, entry);

    float* latent_query = room(b.latent_query, rows_ * m.heads * width);
    for (int64_t head = 0; head < m.heads; ++head)
      product(rows_, {query + head * head_width, m.heads * head_width}, nth(layer.absorbed_key, head),
              latent_query + head * width, m.heads * width);
    float* mixed = room(b.mixed, rows_ * m.heads * m.kv_rank);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t position = s.positions[first_ + row];
      const float *cos = s.cos + position * m.rope / 2, *sin = s.sin + position * m.rope / 2;
      float* past = cache + (first_ + row) * s.row_stride;
      rotate(entry + row * width + m.kv_rank, m.rope, cos, sin);
      copy(past + position * width, entry + row * width, width);
      for (int64_t head = 0; head < m.heads; ++head) {
        float* to = latent_query + (row * m.heads + head) * width;
        copy(to + m.kv_rank, query + (row * m.heads + head) * head_width + m.nope, m.rope);
        rotate(to + m.kv_rank, m.rope, cos, sin);
        attend(to, past, position + 1, mixed + (row * m.heads + head) * m.kv_rank);
      }
    }
    float* values = room(b.values, rows_ * m.heads * m.v_dim);
    for (int64_t head = 0; head < m.heads; ++head)
      product(rows_, {mixed + head * m.kv_rank, m.heads * m.kv_rank}, nth(layer.absorbed_value, head),
              values + head * m.v_dim, m.heads * m.v_dim);
    product(rows_, {values, m.heads * m.v_dim}, layer.output, x, m.hidden, true);
  }

  void attend(const float* query, const float* past, int64_t positions, float* out) {
    const int64_t width = m.kv_rank + m.rope;
    float* weight = room(b.weight, positions);
    for (int64_t p = 0; p < positions; ++p) weight[p] = m.scale * dot(query, past + p * width, width);
    const float most = largest(weight, positions);
    for (int64_t p = 0; p < positions; ++p) weight[p] = exponential(weight[p] - most);
    const float total = sum(weight, positions);
    std::fill(out, out + m.kv_rank, 0.0f);
    for (int64_t p = 0; p < positions; ++p) {
      const float share = weight[p] / total;
      for (int64_t i = 0; i < m.kv_rank; ++i) out[i] += share * past[p * width + i];
    }
  }

  void dense(const Layer& layer, float* x) {
    const int64_t width = layer.down.inner;
    float* gate_up = room(b.gate_up, rows_ * 2 * width);
    product(rows_, {normal_, m.hidden}, layer.gate_up, gate_up, 2 * width);
    for (int64_t row = 0; row < rows_; ++row) swiglu(gate_up + row * 2 * width, width, 1.0f, gate_up + row * 2 * width);
    product(rows_, {gate_up, 2 * width}, layer.down, x, m.hidden, true);
  }

  void routed(const Layer& layer, int16_t* chosen, int64_t chosen_stride, float* x) {
    float* scores = room(b.scores, rows_ * m.experts);
    float* gates = room(b.gates, rows_ * m.topk);
    int64_t* experts = room(b.experts, rows_ * m.topk);
    product(rows_, {normal_, m.hidden}, layer.router, scores, m.experts);
    for (int64_t row = 0; row < rows_; ++row) {
      choose(layer, scores + row * m.experts, experts + row * m.topk, gates + row * m.topk);
      for (int64_t slot = 0; slot < m.topk; ++slot)
        chosen[(first_ + row) * chosen_stride + slot] = static_cast<int16_t>(experts[row * m.topk + slot]);
    }
    const int64_t width = layer.expert_down.inner;
    float* own = room(b.own, rows_ * m.hidden);
    float* gate_up = room(b.gate_up, rows_ * 2 * width);
    float* out = room(b.out, rows_ * m.hidden);
    for (int64_t expert = 0; expert < m.experts; ++expert) {
      b.slots.clear();
      for (int64_t slot = 0; slot < rows_ * m.topk; ++slot)
        if (experts[slot] == expert) b.slots.push_back(slot);
      const int64_t count = static_cast<int64_t>(b.slots.size());
      for (int64_t i = 0; i < count; ++i)
        copy(own + i * m.hidden, normal_ + b.slots[i] / m.topk * m.hidden, m.hidden);
      product(count, {own, m.hidden}, nth(layer.expert_gate_up, expert), gate_up, 2 * width);
      for (int64_t i = 0; i < count; ++i) swiglu(gate_up + i * 2 * width, width, gates[b.slots[i]], gate_up + i * 2 * width);
      product(count, {gate_up, 2 * width}, nth(layer.expert_down, expert), out, m.hidden);
      for (int64_t i = 0; i < count; ++i) {
        float* to = x + b.slots[i] / m.topk * m.hidden;
        for (int64_t j = 0; j < m.hidden; ++j) to[j] += out[i * m.hidden + j];
      }
    }
  }

  // The routers of DeepSeek-V3 (with a bias) and V2: see ops/topk_gate/reference.py.
  void choose(const Layer& layer, float* scores, int64_t* experts, float* gates) {
    if (m.softmax) {
      const float most = largest(scores, m.experts);
      for (int64_t e = 0; e < m.experts; ++e) scores[e] = std::exp(scores[e] - most);
      const float total = sum(scores, m.experts);
      for (int64_t e = 0; e < m.experts; ++e) scores[e] /= total;
    } else {
      for (int64_t e = 0; e < m.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    }
    float* choice = room(b.choice, m.experts);
    for (int64_t e = 0; e < m.experts; ++e) choice[e] = scores[e] + (layer.bias ? layer.bias[e] : 0.0f);
    if (m.groups > 1) {
      const int64_t size = m.experts / m.groups;
      float* best = room(b.best, m.groups);
      for (int64_t g = 0; g < m.groups; ++g) {
        int64_t two[2];
        best_of(choice + g * size, size, layer.bias ? 2 : 1, two);
        best[g] = choice[g * size + two[0]] + (layer.bias ? choice[g * size + two[1]] : 0.0f);
      }
      b.kept.resize(m.topk_groups);
      best_of(best, m.groups, m.topk_groups, b.kept.data());
      for (int64_t g = 0; g < m.groups; ++g) {
        bool kept = false;
        for (int64_t k : b.kept) kept |= k == g;
        if (!kept) std::fill(choice + g * size, choice + (g + 1) * size, -INFINITY);
      }
    }
    best_of(choice, m.experts, m.topk, experts);
    for (int64_t slot = 0; slot < m.topk; ++slot) gates[slot] = scores[experts[slot]];
    const float whole = m.normalised ? sum(gates, m.topk) + 1e-20f : 1.0f;
    for (int64_t slot = 0; slot < m.topk; ++slot) gates[slot] *= m.routed_scale / whole;
  }

  const Model& m;
  const Step& s;
  const int64_t first_, rows_;
  Buffers& b;
  float* normal_ = nullptr;
};

}  // namespace

// Do a step for all rows, on so many threads: those of torch, whose OpenMP this shares.
extern "C" void decode(const Model* model, const Step* step, int64_t rows, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t thread = 0; thread < threads; ++thread) {
    static thread_local Buffers buffers;
    const int64_t last = rows * (thread + 1) / threads;
    for (int64_t row = rows * thread / threads; row < last; row += CHUNK)
      Chunk(*model, *step, row, std::min(CHUNK, last - row), buffers).run();
  }
}

// Choose a token a row, and give its log-probability: see draw() in sampling.py, with nothing cut off.
extern "C" void draw(const float* logits, const float* chances, int64_t rows, int64_t vocab, float temperature,
                     int64_t* tokens, float* logprobs, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    static thread_local std::vector<float> buffer;
    const float *score = logits + row * vocab, most = largest(score, vocab) / temperature;
    float* mass = room(buffer, vocab);
    for (int64_t i = 0; i < vocab; ++i) mass[i] = exponential(score[i] / temperature - most);
    double total = 0.0, before = 0.0;
    for (int64_t i = 0; i < vocab; ++i) total += mass[i];
    const double wanted = chances[row] * total;  // chance has 24 bits: less than the total
    int64_t token = 0;
    while ((before += mass[token]) <= wanted) ++token;
    tokens[row] = token;
    logprobs[row] = score[token] / temperature - most - static_cast<float>(std::log(total));
  }
}
