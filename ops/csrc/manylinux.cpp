// Lets libraries that are built on a new Linux run on every one that has glibc 2.28 (manylinux_2_28): defines what
// compilers take from later releases of glibc and libstdc++ where they find them.
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// libstdc++ has these constructors since GCC 9; before, every library had its own.
#if _GLIBCXX_RELEASE >= 9
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
#endif

extern "C" {

// glibc 2.32: whether counters of references may do without atomic operations. Here they never do.
#if __has_include(<sys/single_threaded.h>)
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif

// glibc 2.29 gave `exp` a new version, which handles errors in another way. The values are the same.
#if defined(__x86_64__) || defined(__aarch64__)
double old_exp(double);
#ifdef __x86_64__
__asm__(".symver old_exp, exp@GLIBC_2.2.5");
#else
__asm__(".symver old_exp, exp@GLIBC_2.17");
#endif
__attribute__((visibility("hidden"))) double own_exp(double x) __asm__("exp");
double own_exp(double x) { return old_exp(x); }
#endif
}

#endif
