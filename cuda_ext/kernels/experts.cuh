// Which experts a launch computes, and for whom: what every block finds out first.
#pragma once

#include "runs.cuh"

namespace lowmoe {

inline constexpr int kMostPlaces = 128;  // assignments of 8 tokens, 16 experts each

// An expert that has tokens and is here.
struct PresentExpert {
  const uint8_t* planes[layout::kMaxPlanes];  // of its gate|up, or of its down
  int id, first, n_tokens;                    // its places: first to first + n_tokens
};

struct ExpertSizes {
  int n_hidden, n_inner, n_experts, n_active, n_planes, n_tokens;
};

// In shared memory.
struct PresentExperts {
  PresentExpert list[kMostPlaces];  // by id
  int order[kMostPlaces];           // as in Groups
  int place_of[kMostPlaces];        // of an assignment, -1 where its expert is not here
  int count;
  // Seldom asked for, so not in registers: see StripMemory.
  ExpertSizes sizes;
  Regions regions;  // of each matrix
};

// groups and parts, see cuda_ext/ops.py
struct Groups {
  const int64_t* parts;
  const int *first, *order, *active;
};

// What is asked of each expert: a matrix with these regions, at this place of its parts.
struct PartOfExperts {
  Regions regions;
  size_t offset;
};

// The list, by one warp; returns its length. No weight can be asked for before it is there, so
// loads wait for each other once: for the ids.
__device__ __forceinline__ int list_experts(const Groups& groups, const ExpertSizes& sizes,
                                            size_t offset, PresentExpert (&list)[kMostPlaces]) {
  const int lane = threadIdx.x % kLanes, n_active = groups.active[0];
  int count = 0;
  for (int i = lane; i - lane < n_active; i += kLanes) {
    const int id = groups.active[1 + min(i, sizes.n_experts - 1)];  // not behind n_active
    PresentExpert expert{};
    bool is_here = i < n_active;
    if (is_here) {
      expert.id = id, expert.first = groups.first[id];
      expert.n_tokens = groups.first[id + 1] - expert.first;
      const int64_t* parts = groups.parts + static_cast<size_t>(id) * layout::kMaxPlanes;
#pragma unroll
      for (int p = 0; p < layout::kMaxPlanes; p++) {
        is_here = is_here && (p >= sizes.n_planes || parts[p]);
        expert.planes[p] = reinterpret_cast<const uint8_t*>(parts[p] + offset);
      }
    }
    const unsigned here = __ballot_sync(~0u, is_here);
    if (is_here) list[count + __popc(here & ((1u << lane) - 1))] = expert;
    count += __popc(here);
  }
  return count;
}

// Fills `present`, place_of by the next barrier; all threads must call it.
__device__ __forceinline__ void find_experts(const Groups& groups, const ExpertSizes& sizes,
                                             const PartOfExperts& part, PresentExperts& present) {
  for (int a = threadIdx.x; a < sizes.n_tokens * sizes.n_active; a += kThreads) {
    present.order[a] = groups.order[a], present.place_of[a] = -1;
  }
  if (threadIdx.x < kLanes) {
    const int count = list_experts(groups, sizes, part.offset, present.list);
    if (threadIdx.x == 0) {
      present.count = count, present.sizes = sizes, present.regions = part.regions;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x / 8; i < present.count; i += kThreads / 8) {  // up to 8 tokens each
    const PresentExpert& expert = present.list[i];
    const int token = threadIdx.x % 8, place = expert.first + token;
    if (token < expert.n_tokens) present.place_of[present.order[place]] = place;
  }
}

}  // namespace lowmoe
