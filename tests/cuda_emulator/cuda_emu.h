// CUDA C++ for a CPU: what a kernel of cuda_ext needs to be compiled by g++ and run, one fiber for
// each CUDA thread, one block after the other. For tests on machines without a card.
//
// A kernel file is included into an unnamed namespace after this header, by emulated.py: what has
// no linkage AddressSanitizer surrounds with red zones, static data of templates among it. Vector
// types and __half are NVIDIA's own, from the host side of cuda_fp16.h, so their arithmetic is not
// written down here a second time.
//
// What it cannot show: mistakes in the PTX of portable.cuh, bank conflicts, occupancy, how tensor
// cores round, kernels whose blocks wait for each other.
#pragma once

#include "arithmetic.h"
#include "entry.h"
#include "launch.h"
#include "machine.h"
#include "memory.h"
#include "tensor_core.h"
#include "threads.h"

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)

#define threadIdx (static_cast<const uint3&>(emu::machine.self->index))
#define blockIdx (static_cast<const uint3&>(emu::machine.block_index))
#define blockDim (static_cast<const dim3&>(emu::machine.block))
#define gridDim (static_cast<const dim3&>(emu::machine.grid))

#define EMU_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::machine.dynamic_shared)

// The kernel may have commas in its name, as an instance of a template has.
#define EXPORT_KERNEL(name, ...) const emu::Kernel emu_kernel_##name(#name, &(__VA_ARGS__));
