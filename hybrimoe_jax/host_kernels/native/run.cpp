// A run of experts as phases of independent items, so that one expert already occupies every core: x is made ready
// (copied to rows that suit the cache, or quantised), then gate and up by rows of the expert width, their product
// quantised where the format says so, then down by rows of the model width. An item of the last phase owns its
// columns of `out` and adds the experts in the order given: nothing depends on which thread takes what.
//
// What lies between the phases is in scratch of the calling thread that only grows. A run that needs more than
// SCRATCH_BYTES of it goes in several waves; so does one whose experts have different formats.

#include "run.h"

#include <algorithm>

#include "team.h"
#include "wave.h"

namespace experts {
namespace {

struct Scratch {
    Bytes ready, acts_at, records_at;
    std::vector<const void*> inputs;
    std::vector<float*> acts;
    std::vector<void*> records;
    std::vector<Share> shares;
};

Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

Share share_of(const Expert& expert) {
    Share made = {};
    made.gate = make_matrix(expert.data, expert.format, expert.hidden, expert.width);
    made.up = make_matrix(made.gate.data + made.gate.bytes, expert.format, expert.hidden, expert.width);
    made.down = make_matrix(made.gate.packed() ? made.up.data + made.up.bytes : expert.down, expert.format,
                            expert.width, expert.hidden);
    return made;
}

// Fills scratch.shares with what one wave takes, from token `done` of expert i on, and moves both on.
void next_wave(const Call& call, Scratch& scratch, int64_t& i, int64_t& done) {
    scratch.shares.clear();
    int64_t bytes = 0, items = 0, tokens = 0;
    for (; i < call.m; ++i, done = 0) {
        const int64_t left = call.load(i) - done;
        if (left == 0) continue;
        const Expert& expert = *call.records[i];
        if (!scratch.shares.empty() && scratch.shares.back().gate.format != expert.format) break;
        Share share = share_of(expert);
        const int64_t each = float_bytes(expert.hidden) + input_bytes(share.down);
        const int64_t room = std::max<int64_t>((SCRATCH_BYTES - bytes) / each, scratch.shares.empty());
        const int64_t take = std::min(left, room), at = call.start(i) + done;
        if (take == 0) break;
        share.rows = call.starts ? call.rows + at : nullptr;
        share.mix = call.mix + at;
        share.load = take;
        share.first = tokens;
        share.items = items;
        scratch.shares.push_back(share);
        items += items_of(share.gate, take);
        bytes += take * each;
        tokens += take;
        done += take;
        if (take < left) break;
    }
}

// Points every token of the wave's shares at its input, its activations and what they are quantised to.
void place(const Call& call, Scratch& scratch, const char* ready, int64_t step) {
    int64_t act_bytes = 0, record_bytes = 0, tokens = 0;
    for (const Share& share : scratch.shares) {
        act_bytes += share.load * float_bytes(share.down.columns);
        record_bytes += share.down.a8 ? share.load * input_bytes(share.down) : 0;
        tokens += share.load;
    }
    char *act = scratch.acts_at.get(act_bytes), *record = scratch.records_at.get(record_bytes);
    scratch.inputs.resize(tokens);
    scratch.acts.resize(tokens);
    scratch.records.resize(tokens);
    int64_t j = 0;
    for (const Share& share : scratch.shares)
        for (int64_t t = 0; t < share.load; ++t, ++j) {
            scratch.inputs[j] = ready + (share.rows ? share.rows[t] * step : 0);
            scratch.acts[j] = reinterpret_cast<float*>(act);
            scratch.records[j] = share.down.a8 ? record : act;
            act += float_bytes(share.down.columns);
            record += share.down.a8 ? input_bytes(share.down) : 0;
        }
}

}  // namespace

void run(const Isa& isa, const Call& call, int64_t threads) {
    Scratch& scratch = own_scratch();
    int64_t held = -1;  // the format for which x lies ready
    for (int64_t i = 0, done = 0; i < call.m;) {
        next_wave(call, scratch, i, done);
        if (scratch.shares.empty()) break;
        const Share *begin = scratch.shares.data(), *end = begin + scratch.shares.size(), &last = end[-1];
        const Matrix& first = begin->gate;
        const bool as_is = is_ready(first, call.N);
        const int64_t step = as_is ? 0 : input_bytes(first);
        char* ready = as_is ? nullptr : scratch.ready.get(call.N * step);
        const int64_t unready = as_is || held == first.format ? 0 : call.N;
        const Readying readying = {&isa, &first, unready, call.x, call.D, ready, step};
        if (!as_is) held = first.format;
        place(call, scratch, as_is ? reinterpret_cast<const char*>(call.x) : ready, step);
        int64_t work = 0, most = 0;
        for (const Share* share = begin; share < end; ++share) {
            work += 3 * call.D * share->gate.rows * (READ + share->load);
            most = std::max(most, share->load);
        }
        const Wave wave = {&isa, call.out, call.D, item_rows(last.down, most), begin, end,
                           scratch.inputs.data(), scratch.acts.data(), scratch.records.data()};
        const int64_t tokens = scratch.inputs.size();
        Phase phases[4] = {{ready_rows, &readying, readying_items(readying)},
                           {inward, &wave, last.items + items_of(last.gate, last.load)},
                           {requantise, &wave, first.a8 ? tokens : 0},
                           {outward, &wave, items_of(last.down, most)}};
        run_team(phases, 4, std::min(threads, 1 + work / GRAIN));
    }
}

}  // namespace experts
