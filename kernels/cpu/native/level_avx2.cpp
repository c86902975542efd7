#include "level.hpp"

#ifdef __AVX2__
#include "lanes_avx2.hpp"
#include "make_level.hpp"

namespace halfweave {

const Level* avx2_level() {
  static const Level level = make_level<Avx2>("avx2");
  return &level;
}

}  // namespace halfweave
#else
const halfweave::Level* halfweave::avx2_level() { return nullptr; }
#endif
