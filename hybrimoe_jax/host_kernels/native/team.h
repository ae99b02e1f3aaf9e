// Helper threads that are started once, spin briefly for the next work and then sleep.
//
// A team is the calling thread plus whichever helpers are free: calls from several threads share the helpers, and a
// call whose helpers wake late simply does everything itself. Work is claimed item by item. Calls of several threads
// have together no more than the most that one of them asked for, and wait for each other where that is used up; a
// call of one thread never waits.
#pragma once

#include <atomic>
#include <cstdint>

namespace experts {

constexpr int64_t MAX_RANGES = 16;

// Items 0 .. items-1 on any thread, all of them before the next phase's first. Each thread has a range of
// neighbouring items, in order, and helps with the others' when it is done: what a thread reads next lies behind what
// it reads now.
struct Phase {
    void (*work)(const void* context, int64_t item);
    const void* context;
    int64_t items;
    alignas(64) std::atomic<int64_t> finished{0};
    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    } ranges[MAX_RANGES];
};

// Runs the phases in order on up to `threads` threads; returns when all is done and no helper touches `phases` any
// more.
void run_team(Phase* phases, int64_t count, int64_t threads);

void end_helpers();

}  // namespace experts
