// Assertions of the checked build (GROOTVL_CHECKED=1 in the environment of setup.py), where an ordinary build limits
// indices, so that a damaged tree leads to wrong results but not outside of the arrays. A failed one ends the CUDA
// context with a message that names the condition.
#pragma once

#ifdef GROOTVL_CHECKED
#undef NDEBUG
#include <cassert>
#define GROOTVL_ASSERT(condition) assert(condition)
#else
#define GROOTVL_ASSERT(condition) static_cast<void>(0)
#endif
