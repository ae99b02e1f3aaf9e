// Helper threads that are started once, spin briefly for the next work and then sleep.
//
// A team is the calling thread plus whichever helpers are free: calls from several threads share the helpers, and a call
// that finds none (or whose helpers wake late) simply does everything itself. Work is claimed item by item.
#pragma once

#include <atomic>
#include <cstdint>

namespace experts {

// Items 0 .. items-1 in any order and on any thread, all of them before the next phase's first.
struct Phase {
    void (*work)(const void* context, int64_t item);
    const void* context;
    int64_t items;
    alignas(64) std::atomic<int64_t> claimed{0};
    alignas(64) std::atomic<int64_t> finished{0};
};

// Runs the phases in order on up to `threads` threads; returns when all is done and no helper touches `phases` any more.
void run_team(Phase* phases, int64_t count, int64_t threads);

void end_helpers();

}  // namespace experts
