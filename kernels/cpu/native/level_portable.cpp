#include "lanes_portable.hpp"
#include "make_level.hpp"

namespace halfweave {

const Level* portable_level() {
  static const Level level = make_level<Portable>("portable");
  return &level;
}

}  // namespace halfweave
