// Run-time CPU dispatch: the compiler clones the function per instruction set and the loader picks one, so the binary
// needs no global -march and runs on any x86-64. Elsewhere it is the plain function.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PEFTKERN_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PEFTKERN_MULTIVERSION
#endif
