// For every function that level_*.cpp share with other files. If one were not inlined, the linker
// would keep one file's copy for all, and a level's may have instructions that a machine lacks.
#pragma once

#define HW_INLINE inline __attribute__((always_inline))
