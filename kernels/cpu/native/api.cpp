#include "api.h"

#include <cmath>
#include <new>
#include <vector>

#include "bandwidth.hpp"
#include "decoder.hpp"
#include "elementwise.hpp"
#include "embedding.hpp"
#include "pack.hpp"
#include "round.hpp"

using namespace halfweave;

namespace {

constexpr int64_t kMostRows = (int64_t)1 << 26, kMostColumns = (int64_t)1 << 22;
constexpr int64_t kMostTokens = (int64_t)1 << 20;

bool shape_is_legal(int32_t kind, int32_t group, int64_t rows, int64_t columns) {
  if (kind < 0 || kind >= kKinds || (group != 32 && group != 64 && group != 128)) return false;
  if (rows < 1 || rows > kMostRows || columns < 1 || columns > kMostColumns) return false;
  const int64_t multiple = is_sparse(kind) ? 4 : kind == kInt4 ? 2 : 1;
  return columns % multiple == 0;
}

Weight to_weight(const hw_weight& w) { return {w.kind, w.group, w.rows, w.columns, w.data}; }
Norm to_norm(const hw_norm& norm) { return {norm.gain, norm.bias}; }

DecoderShape to_shape(const hw_shape& s) {
  DecoderShape own = {};
  own.layers = s.layers;
  own.hidden = s.hidden;
  own.heads = s.heads;
  own.kv_heads = s.kv_heads;
  own.head_dim = s.head_dim;
  own.ffn = s.ffn;
  own.vocab = s.vocab;
  own.rotary_dim = s.rotary_dim;
  own.window = s.window;
  own.cache_bits = s.cache_bits;
  own.parallel = s.parallel;
  own.norm_eps = s.norm_eps;
  own.activation = s.activation;
  return own;
}

DecoderEnds to_ends(const hw_ends& ends) {
  DecoderEnds own = {};
  own.embedding = to_weight(ends.embedding);
  own.head = to_weight(ends.head);
  own.embedding_norm = to_norm(ends.embedding_norm);
  own.norm = to_norm(ends.norm);
  own.positions = to_weight(ends.positions);
  own.first_position = ends.first_position;
  own.frequencies = ends.frequencies;
  own.slopes = ends.slopes;
  return own;
}

DecoderBlock to_block(const hw_block& block) {
  DecoderBlock own = {to_norm(block.attention_norm), to_norm(block.mlp_norm), block.q_norm,
                      block.k_norm, {}, {}};
  for (int i = 0; i < kLinears; i++) {
    own.linears[i] = to_weight(block.linears[i]);
    own.biases[i] = block.biases[i];
  }
  return own;
}

int check(const hw_weight& w) {
  if (!w.data) return HW_NULL;
  if (!shape_is_legal(w.kind, w.group, w.rows, w.columns)) return HW_SHAPE;
  if ((uintptr_t)w.data % kLine || w.bytes != to_weight(w).bytes()) return HW_SIZE;
  return HW_OK;
}

int check(const hw_weight& w, int64_t rows, int64_t columns) {
  if (int code = check(w)) return code;
  return w.rows == rows && w.columns == columns ? HW_OK : HW_SHAPE;
}

int check(const hw_shape& s) {
  const int64_t sizes[] = {s.layers, s.hidden, s.heads, s.kv_heads, s.head_dim, s.ffn, s.vocab};
  for (int64_t size : sizes)
    if (size < 1 || size > kMostRows) return HW_SHAPE;
  if (s.heads % s.kv_heads || s.heads * s.head_dim > kMostColumns) return HW_SHAPE;
  if (s.rotary_dim < 0 || s.rotary_dim % 2 || s.rotary_dim > s.head_dim) return HW_SHAPE;
  if (s.window < 0 || (s.cache_bits != 8 && s.cache_bits != 16)) return HW_SHAPE;
  if (s.parallel != 0 && s.parallel != 1) return HW_SHAPE;
  if (s.activation < 0 || s.activation >= kActivations) return HW_SHAPE;
  return std::isfinite(s.norm_eps) && s.norm_eps >= 0 ? HW_OK : HW_SHAPE;
}

int check(const hw_shape& s, const hw_block& block) {
  if (!block.attention_norm.gain || !block.mlp_norm.gain) return HW_NULL;
  const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
  const int64_t rows[] = {q, kv, kv, s.hidden, s.ffn, s.ffn, s.hidden};
  const int64_t columns[] = {s.hidden, s.hidden, s.hidden, q, s.hidden, s.hidden, s.ffn};
  for (int i = 0; i < kLinears; i++) {
    if (i == kGate && !block.linears[i].data) continue;
    if (int code = check(block.linears[i], rows[i], columns[i])) return code;
  }
  return HW_OK;
}

int check(const hw_shape& s, const hw_ends& ends) {
  if (!ends.norm.gain || (s.rotary_dim && !ends.frequencies)) return HW_NULL;
  for (const hw_weight* each : {&ends.embedding, &ends.head})
    if (int code = check(*each, s.vocab, s.hidden)) return code;
  if (!can_embed(ends.embedding.kind)) return HW_SHAPE;
  const hw_weight& table = ends.positions;
  if (!table.data) return HW_OK;
  if (int code = check(table, table.rows, s.hidden)) return code;
  if (!can_embed(table.kind)) return HW_SHAPE;
  return 0 <= ends.first_position && ends.first_position < table.rows ? HW_OK : HW_RANGE;
}

Cache cache_of(const DecoderShape& s, const hw_cache* cache) {
  return {cache ? cache->data : nullptr, cache ? cache->pages : 0, s.layers, s.kv_heads,
          Cache::padded(s.head_dim), s.head_dim, s.cache_bits};
}

int check(const Decoder& decoder, const hw_batch& b, const hw_cache& cache) {
  const DecoderShape& shape = decoder.shape();
  if (!b.ids || !b.positions || !b.pages || !b.pages_start || !cache.data) return HW_NULL;
  if (b.tokens < 1 || b.tokens > kMostTokens) return HW_SHAPE;
  const int64_t page_bytes = cache_of(shape, &cache).page_bytes();
  if ((uintptr_t)cache.data % sizeof(float)) return HW_SIZE;
  if (cache.pages < 1 || cache.bytes / page_bytes < cache.pages) return HW_SIZE;
  for (int64_t i = 0; i < b.page_count; i++)
    if (b.pages[i] < 0 || b.pages[i] >= cache.pages) return HW_RANGE;
  for (int64_t t = 0; t < b.tokens; t++) {
    if (b.ids[t] < 0 || b.ids[t] >= shape.vocab) return HW_RANGE;
    if (b.positions[t] < 0 || b.positions[t] >= decoder.most_positions()) return HW_RANGE;
    if (b.pages_start[t] < 0 || b.pages_start[t] >= b.page_count) return HW_RANGE;
    if (b.positions[t] / kPagePositions >= b.page_count - b.pages_start[t]) return HW_RANGE;
  }
  return HW_OK;
}

// Memory may run out in any call that grows a buffer; nothing may be thrown into C.
template <class Call>
int guarded(const Call& call) {
  try {
    call();
    return HW_OK;
  } catch (const std::exception&) {
    return HW_MEMORY;
  }
}

}  // namespace

int hw_abi(void) { return HW_ABI; }
const void* hw_level(const char* name) { return find_level(name); }
const char* hw_level_name(const void* level) { return level ? ((const Level*)level)->name : ""; }

void* hw_pool_new(int32_t threads) {
  Pool* pool = nullptr;
  if (threads < 1 || threads > 1024 || guarded([&] { pool = new Pool(threads); })) return nullptr;
  return pool;
}
void hw_pool_free(void* pool) { delete (Pool*)pool; }

int hw_read(void* pool, const uint8_t* data, int64_t bytes, uint64_t* sum) {
  if (!pool || !data || !sum) return HW_NULL;
  if (bytes < 1 || bytes % kReadBytes) return HW_SIZE;
  *sum = read_all(*(Pool*)pool, data, bytes);
  return HW_OK;
}

int64_t hw_packed_bytes(int32_t kind, int32_t group, int64_t rows, int64_t columns) {
  if (!shape_is_legal(kind, group, rows, columns)) return -1;
  return Weight{kind, group, rows, columns, nullptr}.bytes();
}

int hw_pack(void* pool, hw_weight shape, const uint8_t* values, const uint8_t* meta,
            const uint16_t* scales, uint8_t* out) {
  if (!pool || !values || !out) return HW_NULL;
  if (!scales && !holds_floats(shape.kind)) return HW_NULL;
  if (!meta && is_sparse(shape.kind)) return HW_NULL;
  shape.data = out;
  if (int code = check(shape)) return code;
  const Weight w = to_weight(shape);
  return guarded([&] {
    ((Pool*)pool)->run([&](int thread, int threads) {
      pack(w, {values, meta, scales}, out, share(w.tiles(), thread, threads),
           share(w.tiles(), thread + 1, threads));
    });
  });
}

int hw_round(void* pool, hw_weight shape, int32_t from, const uint8_t* values, uint8_t* out) {
  if (!pool || !values || !out) return HW_NULL;
  if ((shape.kind != kInt8 && shape.kind != kInt4) || shape.group != kBlock) return HW_SHAPE;
  if (from < kDenseBf16 || from >= kKinds) return HW_SHAPE;
  shape.data = out;
  if (int code = check(shape)) return code;
  const Weight w = to_weight(shape);
  return guarded([&] {
    ((Pool*)pool)->run([&](int thread, int threads) {
      round_weight(w, from, values, out, share(w.tiles(), thread, threads),
                   share(w.tiles(), thread + 1, threads));
    });
  });
}

int hw_linear(const void* level, void* pool, const hw_weight* weight, const float* x,
              int64_t tokens, const float* bias, float* y) {
  if (!level || !pool || !weight || !x || !y) return HW_NULL;
  if (tokens < 1 || tokens > kMostTokens) return HW_SHAPE;
  if (int code = check(*weight)) return code;
  return guarded([&] {
    const Weight w = to_weight(*weight);
    const Product product = {&w, bias, y};
    Linears().multiply(*(const Level*)level, *(Pool*)pool, x, tokens, w.columns, &product, 1);
  });
}

int hw_decoder_new(const hw_shape* shape, const hw_block* blocks, const hw_ends* ends,
                   void** decoder) {
  if (!shape || !blocks || !ends || !decoder) return HW_NULL;
  if (int code = check(*shape)) return code;
  for (int64_t i = 0; i < shape->layers; i++)
    if (int code = check(*shape, blocks[i])) return code;
  if (int code = check(*shape, *ends)) return code;
  return guarded([&] {
    std::vector<DecoderBlock> own(shape->layers);
    for (int64_t i = 0; i < shape->layers; i++) own[i] = to_block(blocks[i]);
    *decoder = new Decoder(to_shape(*shape), own, to_ends(*ends));
  });
}
void hw_decoder_free(void* decoder) { delete (Decoder*)decoder; }

int64_t hw_page_bytes(const void* decoder) {
  return decoder ? cache_of(((const Decoder*)decoder)->shape(), nullptr).page_bytes() : -1;
}

int hw_forward(void* decoder, const void* level, void* pool, const hw_batch* batch,
               const hw_cache* cache, float* hidden) {
  if (!decoder || !level || !pool || !batch || !cache || !hidden) return HW_NULL;
  Decoder& own = *(Decoder*)decoder;
  if (int code = check(own, *batch, *cache)) return code;
  const Batch tokens = {batch->tokens, batch->ids, batch->positions, batch->pages,
                        batch->pages_start};
  return guarded([&] {
    own.forward(*(const Level*)level, *(Pool*)pool, tokens, cache_of(own.shape(), cache), hidden);
  });
}

int hw_logits(void* decoder, const void* level, void* pool, const float* hidden, int64_t tokens,
              float* scores) {
  if (!decoder || !level || !pool || !hidden || !scores) return HW_NULL;
  if (tokens < 1 || tokens > kMostTokens) return HW_SHAPE;
  return guarded([&] {
    ((Decoder*)decoder)->logits(*(const Level*)level, *(Pool*)pool, hidden, tokens, scores);
  });
}
