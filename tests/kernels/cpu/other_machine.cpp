// The portable level on a machine of another architecture, beside that of this machine, which the
// Python tests check. `other_machine write FILE` here, then `other_machine compare FILE` there:
// every format at shapes with ragged edges, and a small decoder. Ends with 0 if all agree.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"

namespace {

constexpr int kKinds = 9, kFirstFloats = 3, kFirstDense = 6;
constexpr int kSparse24Int4 = 0, kInt4 = 1, kInt8 = 2, kDenseBf16 = 6;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// The same numbers everywhere: integers only, made floats by exact steps.
class Draw {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state_ >> 33);
  }
  float number() { return ((int32_t)(bits() & 0xFFFF) - 0x8000) / 32768.f; }
  std::vector<float> numbers(int64_t count) {
    std::vector<float> found(count);
    for (float& each : found) each = number();
    return found;
  }

 private:
  uint64_t state_ = 1;
};

// Packed bytes at an address that is a multiple of 64.
struct Packed {
  std::vector<uint8_t> memory;
  hw_weight weight;
};

bool is_sparse(int kind) {
  return kind == kSparse24Int4 || (kind >= kFirstFloats && kind < kFirstDense);
}
int float_bytes(int kind) { return kind % 3 == 2 ? 4 : 2; }

// Floats of a kind: about -1 to 1, by their bits.
void draw_floats(Draw& draw, int kind, int64_t count, std::vector<uint8_t>& out) {
  const int size = float_bytes(kind);
  out.resize(count * size);
  for (int64_t i = 0; i < count; i++) {
    const float value = draw.number();
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (size == 4) {
      memcpy(&out[4 * i], &bits, 4);
      continue;
    }
    const uint16_t bf16 = bits >> 16, fp16 = (draw.bits() & 0x83FF) | 0x3000;  // +-0.125 to 0.25
    memcpy(&out[2 * i], kind % 3 == 0 ? &bf16 : &fp16, 2);
  }
}

Packed draw_weight(Draw& draw, void* pool, int kind, int group, int64_t rows, int64_t columns) {
  static constexpr uint8_t kPairs[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};  // first kept, second kept
  std::vector<uint8_t> values, meta(rows * ((columns + 7) / 8));
  std::vector<uint16_t> scales(rows * ((columns + group - 1) / group));
  if (kind >= kFirstFloats) {
    draw_floats(draw, kind, rows * (is_sparse(kind) ? columns / 2 : columns), values);
  } else {
    const int columns_of_a_byte = kind == kSparse24Int4 ? 4 : kind == kInt4 ? 2 : 1;
    values.resize(rows * (columns / columns_of_a_byte));
    for (uint8_t& each : values) each = (uint8_t)draw.bits();
  }
  for (uint8_t& each : meta) each = kPairs[draw.bits() % 6] | kPairs[draw.bits() % 6] << 4;
  for (uint16_t& each : scales) each = 0x2000 | (draw.bits() & 0x3FF);  // 1/128 to 1/64
  Packed packed;
  const int64_t bytes = hw_packed_bytes(kind, group, rows, columns);
  expect(bytes > 0, "a legal shape");
  packed.memory.resize(bytes + 64);
  auto* start = (uint8_t*)(((uintptr_t)packed.memory.data() + 63) / 64 * 64);
  packed.weight = {kind, group, rows, columns, start, bytes};
  const int code =
      hw_pack(pool, packed.weight, values.data(), meta.data(), scales.data(), start);
  expect(!code, "hw_pack");
  return packed;
}

// Results one after the other, each with how far it may be off, as a part of its greatest number.
class Results {
 public:
  Results(const char* mode, const char* path)
      : writes_(!strcmp(mode, "write")), file_(std::fopen(path, writes_ ? "wb" : "rb")) {
    expect(file_, "opening the file");
  }
  ~Results() { std::fclose(file_); }

  void take(const std::vector<float>& found, float bound, const char* what) {
    if (writes_) {
      expect(std::fwrite(found.data(), 4, found.size(), file_) == found.size(), "writing");
      return;
    }
    std::vector<float> wanted(found.size());
    expect(std::fread(wanted.data(), 4, wanted.size(), file_) == wanted.size(), "reading");
    float greatest = 0, off = 0;
    for (size_t i = 0; i < found.size(); i++) {
      greatest = std::max(greatest, std::fabs(wanted[i]));
      // Not a maximum, which a NaN would pass.
      if (!(std::fabs(found[i] - wanted[i]) <= off)) off = std::fabs(found[i] - wanted[i]);
    }
    if (off <= bound * greatest && greatest > 0) return;
    std::fprintf(stderr, "%s: off by %g, greatest %g\n", what, off, greatest);
    std::exit(1);
  }

 private:
  bool writes_;
  FILE* file_;
};

void run_linears(Draw& draw, const void* level, void* pool, Results& results) {
  static constexpr int64_t kShapes[][2] = {{16, 32}, {1, 4}, {37, 100}, {48, 576}};
  for (int kind = 0; kind < kKinds; kind++)
    for (int group : {32, 64, 128})
      for (auto [rows, columns] : kShapes)
        for (int64_t tokens : {1, 3, 21}) {
          const Packed packed = draw_weight(draw, pool, kind, group, rows, columns);
          const std::vector<float> x = draw.numbers(tokens * columns), bias = draw.numbers(rows);
          std::vector<float> y(tokens * rows);
          const int code = hw_linear(level, pool, &packed.weight, x.data(), tokens, bias.data(),
                                     y.data());
          expect(!code, "hw_linear");
          results.take(y, 1e-5f, "a linear");
        }
}

// Grouped heads of 20 dimensions, a window, norms of heads, and a prompt in two calls; the MLP beside
// the attention where keys and values have 8 bits.
void run_decoder(Draw& draw, const void* level, void* pool, int cache_bits, Results& results) {
  constexpr int64_t kHidden = 60, kHeads = 3, kHeadDim = 20, kFfn = 88, kVocab = 50, kTokens = 40;
  const hw_shape shape = {2,    kHidden,  kHeads, 1,          kHeadDim, kFfn,
                          kVocab, kHeadDim, 24,     cache_bits, cache_bits == 8, 1e-5f, 0};
  const int64_t q = kHeads * kHeadDim;
  const int64_t rows[] = {q, kHeadDim, kHeadDim, kHidden, kFfn, kFfn, kHidden};
  const int64_t columns[] = {kHidden, kHidden, kHidden, q, kHidden, kHidden, kFfn};
  const std::vector<float> gain(kFfn, 1.f), frequencies = draw.numbers(kHeadDim / 2);
  std::vector<Packed> weights;
  hw_block blocks[2] = {};
  for (hw_block& block : blocks) {
    block.attention_norm = block.mlp_norm = {gain.data(), nullptr};
    block.q_norm = block.k_norm = gain.data();
    for (int i = 0; i < 7; i++) {
      const int kind = i % 2 ? kSparse24Int4 : kInt4;
      weights.push_back(draw_weight(draw, pool, kind, 64, rows[i], columns[i]));
      block.linears[i] = weights.back().weight;
    }
  }
  const Packed embedding = draw_weight(draw, pool, kDenseBf16, 32, kVocab, kHidden);
  const Packed head = draw_weight(draw, pool, kInt8, 32, kVocab, kHidden);
  const hw_ends ends = {embedding.weight, head.weight, {}, {gain.data(), nullptr}, {}, 0,
                        frequencies.data(), nullptr};
  void* decoder = nullptr;
  expect(!hw_decoder_new(&shape, blocks, &ends, &decoder), "hw_decoder_new");

  std::vector<float> memory(3 * hw_page_bytes(decoder) / 4);
  const hw_cache cache = {(uint8_t*)memory.data(), (int64_t)memory.size() * 4, 3};
  const int32_t pages[] = {2, 0, 1};
  std::vector<int32_t> ids(kTokens);
  std::vector<int64_t> positions(kTokens), starts(kTokens, 0);
  for (int64_t t = 0; t < kTokens; t++) ids[t] = draw.bits() % kVocab, positions[t] = t;
  for (int64_t start : {0, 19}) {
    const int64_t count = start ? kTokens - start : 19;
    const hw_batch batch = {count, &ids[start], &positions[start], pages, 3, starts.data()};
    std::vector<float> hidden(count * kHidden), scores(count * kVocab);
    expect(!hw_forward(decoder, level, pool, &batch, &cache, hidden.data()), "hw_forward");
    expect(!hw_logits(decoder, level, pool, hidden.data(), count, scores.data()), "hw_logits");
    // A sum that differs in its last bit may be rounded to another of 256 codes further on.
    results.take(scores, 1e-2f, cache_bits == 8 ? "a decoder, 8-bit cache" : "a decoder");
  }
  hw_decoder_free(decoder);
}

}  // namespace

int main(int count, char** words) {
  expect(count == 3 && (!strcmp(words[1], "write") || !strcmp(words[1], "compare")),
         "usage: other_machine write|compare FILE");
  Results results(words[1], words[2]);
  const void* level = hw_level("portable");
  void* pool = hw_pool_new(2);
  expect(level && pool, "the portable level and a pool");
  Draw draw;
  run_linears(draw, level, pool, results);
  for (int bits : {16, 8}) run_decoder(draw, level, pool, bits, results);
  hw_pool_free(pool);
  return 0;
}
