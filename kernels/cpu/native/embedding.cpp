#include "embedding.hpp"

#include "float_values.hpp"
#include "walk.hpp"

namespace halfweave {
void unpack_row(const Weight& w, int64_t row, float* out) {
  const int64_t lane = row % kTileRows, size = float_bytes(w.kind);
  const uint8_t* tile = w.data + row / kTileRows * w.tile_bytes();
  if (holds_floats(w.kind))
    return each_float_block(w, tile, [&](const uint8_t* data, int64_t column) {
      for (int64_t i = 0; i < kBlock && column + i < w.columns; i++)
        to_floats(w.kind, data + (i * kTileRows + lane) * size, 1, out + column + i);
    });
  each_block(w, tile, 0, w.columns,
             [&](const uint8_t* data, const uint16_t* scales, int64_t column) {
               const float scale = half_to_float(scales[lane]);
               for (int64_t i = 0; i < kBlock && column + i < w.columns; i++)
                 out[column + i] = scale * (int8_t)data[i / 4 * kLine + 4 * lane + i % 4];
             });
}

}  // namespace halfweave
