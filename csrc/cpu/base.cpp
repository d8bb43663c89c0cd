// What every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define SVDECODE_TARGET base
#include "operators.inc"
