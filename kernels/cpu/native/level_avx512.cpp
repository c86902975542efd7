#include "level.hpp"

#if defined(__AVX512VNNI__) || defined(HALFWEAVE_EMULATE_AVX512)
#include "lanes_avx512.hpp"
#include "make_level.hpp"

namespace halfweave {

const Level* avx512_vnni_level() {
  static const Level level = make_level<Avx512Vnni>("avx512_vnni");
  return &level;
}

}  // namespace halfweave
#else
const halfweave::Level* halfweave::avx512_vnni_level() { return nullptr; }
#endif
