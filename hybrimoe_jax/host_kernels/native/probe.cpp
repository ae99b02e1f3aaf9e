// How fast this machine reads memory and multiplies, with the threads and the instructions that the kernels use.

#include <algorithm>

#include "experts.h"
#include "team.h"

namespace experts {
namespace {

constexpr int64_t CHUNK = 1 << 20;  // bytes of an item

struct Reading {
    const Isa* isa;
    const char* data;
    int64_t bytes;
    bool several;
};

void read_chunk(const void* context, int64_t item) {
    const Reading& all = *static_cast<const Reading*>(context);
    const int64_t from = item * CHUNK, bytes = std::min(CHUNK, all.bytes - from);
    volatile float total = all.isa->read_all(reinterpret_cast<const float*>(all.data + from), bytes / 4, all.several);
    (void)total;
}

struct Multiplying {
    const Isa* isa;
    int64_t rounds;
    std::atomic<int64_t>* done;
};

void multiply_chunk(const void* context, int64_t) {
    const Multiplying& all = *static_cast<const Multiplying*>(context);
    float result;
    *all.done += all.isa->multiply_adds(all.rounds, &result);
    volatile float kept = result;
    (void)kept;
}

}  // namespace

}  // namespace experts

using namespace experts;

extern "C" {

// `several`: each thread reads several streams side by side.
int64_t probe_read(int64_t isa, const void* data, int64_t bytes, int64_t threads, int64_t several) {
    const Reading reading = {&isa_number(isa), static_cast<const char*>(data), bytes, several != 0};
    Phase phase = {read_chunk, &reading, (bytes + CHUNK - 1) / CHUNK};
    run_team(&phase, 1, threads);
    return bytes;
}

int64_t probe_arithmetic(int64_t isa, int64_t count, int64_t threads) {
    constexpr int64_t PARTS = 16;  // of a thread's work, so that all end together
    std::atomic<int64_t> done{0};
    const Multiplying multiplying = {&isa_number(isa), std::max<int64_t>(1, count / PARTS / 256), &done};
    Phase phase = {multiply_chunk, &multiplying, PARTS * threads};
    run_team(&phase, 1, threads);
    return done;
}
}
