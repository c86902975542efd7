/* The library's C interface: no torch, no Python headers. Every size is checked here again, in 64
 * bits, although the binding has checked it: a wrong call must not end the process.
 *
 * Functions that return int give 0, or one of the codes below. Tensors are contiguous; floats are
 * fp32. One caller at a time per pool and per decoder. */
#ifndef HALFWEAVE_API_H
#define HALFWEAVE_API_H
#include <stdint.h>

#if defined(__GNUC__)
#define HW_API __attribute__((visibility("default")))
#else
#define HW_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of structures and functions below; raised with any change of them, here and in library.py, since
 * a library that was built earlier may be the one that is found. */
enum { HW_ABI = 1 };
HW_API int hw_abi(void);

enum { HW_OK = 0, HW_NULL = 1, HW_SHAPE = 2, HW_SIZE = 3, HW_RANGE = 4, HW_MEMORY = 5 };

typedef struct {
  int32_t kind;  /* 0 sparse24_int4, 1 int4, 2 int8; sparse24 of 3 bf16, 4 fp16, 5 fp32;
                    dense of 6 bf16, 7 fp16, 8 fp32 */
  int32_t group; /* columns that share a scale: 32, 64 or 128; any of these for floats */
  int64_t rows, columns;
  const uint8_t* data; /* packed; aligned to 64 bytes */
  int64_t bytes;
} hw_weight;

/* RMSNorm without a bias, LayerNorm with one. */
typedef struct {
  const float *gain, *bias;
} hw_norm;

typedef struct {
  hw_norm attention_norm, mlp_norm; /* [hidden] */
  const float *q_norm, *k_norm;     /* [head_dim], RMSNorm of every head; may be NULL */
  hw_weight linears[7];             /* q k v o gate up down; a plain MLP has a gate without data */
  const float* biases[7];           /* may be NULL */
} hw_block;

typedef struct {
  int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
  int64_t rotary_dim; /* first dimensions of a head that rotary positions turn, an even number */
  int64_t window;     /* positions that a token sees, its own included; 0: all */
  int64_t cache_bits; /* 16: keys and values as fp16; 8: as codes with a scale per vector */
  int64_t parallel;   /* 1: the MLP reads the states that attention reads; 0: with what that adds */
  float norm_eps;
  int32_t activation; /* 0 SiLU, 1 GELU, 2 GELU by tanh, 3 ReLU */
} hw_shape;

typedef struct {
  hw_weight embedding, head;    /* [vocab, hidden] */
  hw_norm embedding_norm, norm; /* [hidden]; the first has no gain where there is none */
  hw_weight positions;          /* [positions, hidden], added to embeddings; may have no data */
  int64_t first_position;       /* its row for position 0 */
  const float* frequencies;     /* [rotary_dim / 2], radians per position */
  const float* slopes;          /* [heads], of a score per position of distance; may be NULL */
} hw_ends;

typedef struct {
  uint8_t* data; /* aligned to 4 bytes */
  int64_t bytes, pages;
} hw_cache;

typedef struct {
  int64_t tokens;
  const int32_t* ids;
  const int64_t* positions;
  const int32_t* pages;
  int64_t page_count;         /* of all sequences together */
  const int64_t* pages_start; /* [tokens] */
} hw_batch;

/* The level of that name, the best one for NULL; NULL where this machine cannot run it. */
HW_API const void* hw_level(const char* name);
HW_API const char* hw_level_name(const void* level);

HW_API void* hw_pool_new(int32_t threads);
HW_API void hw_pool_free(void* pool);

/* Reads `bytes` of `data`, a multiple of 128, on all threads, to be timed: the sum of its 64-bit
 * words. */
HW_API int hw_read(void* pool, const uint8_t* data, int64_t bytes, uint64_t* sum);

/* Bytes of a packed weight; -1 for a shape that there cannot be. */
HW_API int64_t hw_packed_bytes(int32_t kind, int32_t group, int64_t rows, int64_t columns);
HW_API int hw_pack(void* pool, hw_weight shape, const uint8_t* values, const uint8_t* meta,
            const uint16_t* scales, uint8_t* out);

/* An int8 or int4 weight in groups of 32 from floats [rows, columns] of the dense kind `from`. */
HW_API int hw_round(void* pool, hw_weight shape, int32_t from, const uint8_t* values, uint8_t* out);

/* y [tokens, rows] = x [tokens, columns] W^T + bias, where bias may be NULL. */
HW_API int hw_linear(const void* level, void* pool, const hw_weight* weight, const float* x,
              int64_t tokens, const float* bias, float* y);

HW_API int hw_decoder_new(const hw_shape* shape, const hw_block* blocks, const hw_ends* ends,
                   void** decoder);
HW_API void hw_decoder_free(void* decoder);
HW_API int64_t hw_page_bytes(const void* decoder);
HW_API int hw_forward(void* decoder, const void* level, void* pool, const hw_batch* batch,
               const hw_cache* cache, float* hidden);
HW_API int hw_logits(void* decoder, const void* level, void* pool, const float* hidden, int64_t tokens,
              float* scores);

#ifdef __cplusplus
}
#endif
#endif
