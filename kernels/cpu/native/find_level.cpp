#include <cstring>

#include "level.hpp"

namespace halfweave {
namespace {

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool runs_avx512_vnni() {
#if defined(HALFWEAVE_EMULATE_AVX512)  // tests: its instructions are spelt out in others
  return true;
#elif defined(__x86_64__)
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

const Level* find_level(const char* name) {
  const Level* levels[] = {
      runs_avx512_vnni() ? avx512_vnni_level() : nullptr,
      runs_avx2() ? avx2_level() : nullptr,
      portable_level(),
  };
  for (const Level* level : levels)
    if (level && (!name || !strcmp(level->name, name))) return level;
  return nullptr;
}

}  // namespace halfweave
