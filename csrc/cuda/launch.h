// The CUDA operators as the bindings call them: pointers to device memory and a stream.
#pragma once

#include <stddef.h>

#include "../arguments.h"

namespace svdecode {
namespace cuda {

// Bytes of uninitialised device memory that a call needs; the caller owns it, so no two calls share any.
size_t scratch_bytes(const Rows& rows);

void fused_steer(const SteerArguments& arguments, void* scratch, void* stream);
void steer_sample(const SampleArguments& arguments, void* scratch, void* stream);
void steer_topk(const TopkArguments& arguments, void* scratch, void* stream);

}  // namespace cuda
}  // namespace svdecode
